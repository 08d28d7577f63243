"""Drawing of the mini data: every sample of every kind as arrays, from (version, kind, split, index) alone.

The objects are the 1,797 handwritten 8x8 digits inside scikit-learn's own package, scaled, coloured and moved over
procedural textures; ``train``, ``val`` and ``test`` never share a glyph, in any kind. Those of the davis kind are
filled shapes with a random outline, because DAVIS' objects have an area. ``mini`` writes the samples to
disk.
"""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from shared_utils import UserError

# Raise it whenever a sample changes: what is on disk is then rebuilt, for all kinds or for those below alone.
VERSION = 1
RAISED = {"davis": 1}

TEXTURES = ("stripes", "checker", "dots", "rings", "clouds", "grain")
GLYPH_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}

IMAGES_PER_CLASS = {"train": 100, "val": 20}
HUES = 8
FILLS = ("plain", "stripes", "checker", "dots")

MOTIONS = ("Circle", "MoveDown", "MoveLeft", "MoveRight", "MoveUp", "ZoomIn")
CLIPS_PER_CLASS = {"train01": 20, "test01": 10, "train02": 20, "test02": 10}

SEQUENCES = {"train": 8, "val": 4}
SEQUENCE_FRAMES = 12

STYLES = ("filled", "outline", "inverted", "striped")
FEWSHOT_DIGITS = {"train": (0, 1, 2, 3, 4, 5), "val": (6, 7), "test": (8, 9)}
FEWSHOT_PER_CLASS = 30


# --- glyphs and paint ------------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[list[Image.Image], np.ndarray]:
    """The glyphs as 12x12 grey images (8x8 ink, margin 2) and their digits [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"mini data draws scikit-learn's digits: pip install scikit-learn ({error})") from error
    data = load_digits()
    ink = np.pad((data.images * (255 / 16)).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return [Image.fromarray(glyph) for glyph in ink], data.target


@cache
def glyph_split(split: str, digit: int) -> tuple[int, ...]:
    """Glyph indices (rows of ``load_digits``) of one digit that ``split`` (train, val or test) may draw; disjoint."""
    rows = np.random.default_rng(digit).permutation(np.flatnonzero(_digits()[1] == digit))
    edges = np.round(np.cumsum([0, *GLYPH_SHARES.values()]) * len(rows)).astype(int)
    place = list(GLYPH_SHARES).index(split)
    return tuple(int(row) for row in rows[edges[place] : edges[place + 1]])


def version(kind: str) -> int:
    """Of the samples of a kind ("segmentation", or a part of it such as "segmentation/voc")."""
    return VERSION + RAISED.get(kind.partition("/")[0], 0)


def _rng(kind: str, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([version(kind), zlib.crc32(f"{kind}/{split}".encode()), index])


def ink(
    glyph: int, shape: tuple[int, int], centre: tuple[float, float], size: float, angle: float = 0.0, thick: int = 1
) -> np.ndarray:
    """Coverage [H, W] float32 in 0..1 of a glyph whose 8x8 box is ``size`` pixels, at ``centre`` (x, y).

    The centre is sub-pixel exact; ``angle`` in radians; ``thick`` pixels are added all around the stroke.
    """
    cos, sin, (cx, cy) = math.cos(angle) * 8 / size, math.sin(angle) * 8 / size, centre
    back = (cos, sin, 6 - cos * cx - sin * cy, -sin, cos, 6 + sin * cx - cos * cy)  # canvas -> glyph
    height, width = shape
    drawn = _digits()[0][glyph].transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    return np.clip(_dilate(np.asarray(drawn), thick).astype(np.float32) * (4 / 255) - 256 / 255, 0, 1)


def _dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Maximum over a square of 2 * pixels + 1 around each place of [H, W]."""
    for axis in (0, 1):
        for _ in range(pixels):
            grown = mask.copy()
            low, high = (slice(None, -1), slice(1, None)) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
            np.maximum(grown[low], mask[high], out=grown[low])
            np.maximum(grown[high], mask[low], out=grown[high])
            mask = grown
    return mask


def texture(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """A pattern [H, W] float32 in 0..1 of one of the TEXTURES, with random phase, direction and period ("plain": 0)."""
    start = rng.uniform(0, 64, 2)
    y, x = np.arange(height)[:, None] + start[0], np.arange(width)[None] + start[1]
    theta, step = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(7, 13)
    if name in ("stripes", "checker", "dots"):
        u = ((x * math.cos(theta) + y * math.sin(theta)) * step).astype(np.float32)
        v = ((y * math.cos(theta) - x * math.sin(theta)) * step).astype(np.float32)
    if name == "stripes":
        out = 0.5 + 0.5 * np.sin(u)
    elif name == "checker":
        out = np.sin(u) * np.sin(v) > 0
    elif name == "dots":
        out = np.cos(u) + np.cos(v) > 0.9
    elif name == "rings":
        out = 0.5 + 0.5 * np.sin(step * np.hypot(x - x.mean(), y - y.mean() + rng.uniform(-20, 20)))
    elif name == "clouds":
        coarse = Image.fromarray(rng.integers(0, 256, (height // 12 + 2, width // 12 + 2), dtype=np.uint8))
        out = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255
    elif name == "grain":
        out = rng.uniform(0, 1, (height, width))
    else:
        out = np.zeros((height, width))
    return out.astype(np.float32)


def _paint(rng: np.random.Generator, name: str, shape: tuple[int, int], tone: Tone) -> np.ndarray:
    """A two-colour texture [H, W, 3] float32 in 0..255, its colours drawn from ``tone``."""
    first, second = tone.draw(rng), tone.draw(rng)
    return first + texture(rng, name, *shape)[..., None] * (second - first)


@dataclass(frozen=True)
class Tone:
    """Ranges of hue, saturation and value from which a colour is drawn."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        hue, saturation, value = (rng.uniform(*span) for span in (self.hue, self.saturation, self.value))
        return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255


def _over(canvas: np.ndarray, paint: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return canvas + cover[..., None] * (paint - canvas)


def _bytes(canvas: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


BRIGHT, DARK = Tone((0, 1), (0.45, 1), (0.75, 1)), Tone((0, 1), (0.2, 0.6), (0.1, 0.4))
PALE, DEEP = Tone((0, 1), (0.1, 0.45), (0.75, 1)), Tone((0, 1), (0.3, 1), (0.05, 0.35))


# --- images ----------------------------------------------------------------------------------------------------------


def _two_sides(rng: np.random.Generator, hue: float) -> tuple[np.ndarray, Tone]:
    """An object's colour of this hue and a background tone it stands out from: light on dark or dark on light."""
    if rng.random() < 0.5:
        return Tone((hue, hue), (0.5, 1), (0.8, 1)).draw(rng), Tone((0, 1), (0.2, 0.7), (0.1, 0.4))
    return Tone((hue, hue), (0.8, 1), (0.3, 0.55)).draw(rng), Tone((0, 1), (0, 0.25), (0.75, 1))


def render_image(split: str, index: int) -> tuple[np.ndarray, dict[str, Any]]:
    """One sample of the images kind: [64, 64, 3] uint8 and its factors; index // images per class is the digit.

    hue (degrees), texture (of the object) and background (a texture) are drawn independently of the class.
    """
    rng, shape, digit = _rng("images", split, index), (64, 64), index // IMAGES_PER_CLASS[split]
    hue, fill, behind = int(rng.integers(HUES)), str(rng.choice(FILLS)), str(rng.choice(TEXTURES))
    colour, tone = _two_sides(rng, (hue + rng.uniform(-0.15, 0.15)) / HUES)
    canvas = _paint(rng, behind, shape, tone)
    spot = (float(rng.uniform(24, 40)), float(rng.uniform(24, 40)))
    cover = ink(int(rng.choice(glyph_split(split, digit))), shape, spot, rng.uniform(34, 54), rng.uniform(-0.3, 0.3))
    canvas = _over(canvas, colour * (1 - 0.5 * texture(rng, fill, *shape)[..., None]), cover)
    factors = {"class": f"digit_{digit}", "hue": hue * 360 // HUES, "texture": fill, "background": behind}
    return _bytes(canvas + rng.normal(0, 4, canvas.shape)), factors


# --- segmentation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """One look and one set of classes of the segmentation kind."""

    shape: tuple[int, int]
    ids: dict[int, int]  # digit -> label
    strangers: tuple[int, ...]  # digits that appear without having a class here
    other: int  # the label of strangers
    border: int  # the label of a ring around each object
    backdrops: tuple[tuple[tuple[str, ...], int, Tone], ...]  # (textures, label, tone), from the top downwards
    objects: Tone
    counts: dict[str, int]


DOMAINS = {
    "voc": Domain(
        shape=(96, 96),
        ids={digit: digit + 1 for digit in range(5)},
        strangers=(5, 6, 7, 8, 9),
        other=0,
        border=255,
        backdrops=((("clouds", "grain"), 0, DARK),),
        objects=BRIGHT,
        counts={"train": 400, "val": 60},
    ),
    "ade": Domain(
        shape=(96, 96),
        ids={digit: digit for digit in range(3, 10)},
        strangers=(0, 1, 2),
        other=0,
        border=0,
        backdrops=((("stripes",), 1, PALE), (("checker",), 2, PALE)),
        objects=DEEP,
        counts={"train": 400, "val": 60},
    ),
    "cityscapes": Domain(  # 2: closed loops, 3: straight strokes, 4: open curves
        shape=(96, 128),
        ids={0: 2, 6: 2, 8: 2, 9: 2, 1: 3, 4: 3, 7: 3, 2: 4, 3: 4, 5: 4},
        strangers=(),
        other=255,
        border=255,
        backdrops=(
            (("rings",), 1, Tone((0.5, 0.7), (0.15, 0.5), (0.3, 0.65))),
            (("dots",), 0, Tone((0.5, 0.7), (0.0, 0.3), (0.3, 0.65))),
        ),
        objects=Tone((-0.05, 0.17), (0.6, 1), (0.6, 0.95)),
        counts={"train": 120, "val": 80},
    ),
}
EGO_ROWS = 5  # Cityscapes ignores the recording car's own bonnet at the lower edge


def _spots(rng: np.random.Generator, shape: tuple[int, int], sizes: Sequence[float]) -> list[tuple[float, float]]:
    """A centre (x, y) for each size, apart from one another where 60 tries find such a place."""
    spots: list[tuple[float, float]] = []
    for size in sizes:
        half, gap = size / 2, 0.0
        best = (shape[1] / 2, shape[0] / 2)
        for _ in range(60):
            spot = (rng.uniform(half, shape[1] - half), rng.uniform(half, shape[0] - half))
            room = min((max(abs(spot[0] - x), abs(spot[1] - y)) for x, y in spots), default=math.inf)
            if room > gap:
                best, gap = spot, room
            if room > size:
                break
        spots.append(best)
    return spots


def render_scene(domain: str, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One segmentation sample of ``voc``, ``ade`` or ``cityscapes``: image [H, W, 3] uint8 and labels [H, W] uint8."""
    rng, kind = _rng(f"segmentation/{domain}", split, index), DOMAINS[domain]
    height, width = kind.shape
    y, x = np.mgrid[:height, :width]
    below = y > height * rng.uniform(0.3, 0.7) + rng.uniform(-0.3, 0.3) * (x - width / 2)
    canvas, label = np.zeros((height, width, 3), np.float32), np.zeros(kind.shape, np.uint8)
    for place, (names, stuff, tone) in enumerate(kind.backdrops):
        area = below if place else np.ones_like(below)
        canvas = _over(canvas, _paint(rng, str(rng.choice(names)), kind.shape, tone), area.astype(np.float32))
        label[area] = stuff
    if domain == "ade" and rng.random() < 0.5:  # a thing that has no class
        top, left, tall, wide = rng.integers((0, 0, 10, 10), (height - 10, width - 10, 30, 40))
        area = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
        canvas = _over(canvas, _paint(rng, "grain", kind.shape, PALE), area.astype(np.float32))
        label[area] = kind.other
    digits = [int(digit) for digit in rng.choice(list(kind.ids), rng.integers(2, 5))]
    if kind.strangers and rng.random() < 0.25:
        digits[-1] = int(rng.choice(kind.strangers))
    sizes = rng.uniform(26, 38, len(digits))
    for digit, size, spot in zip(digits, sizes, _spots(rng, kind.shape, sizes.tolist())):
        cover = ink(int(rng.choice(glyph_split(split, digit))), kind.shape, spot, size, rng.uniform(-0.25, 0.25))
        canvas = _over(canvas, _paint(rng, str(rng.choice(FILLS)), kind.shape, kind.objects), cover)
        inside = cover > 0.5
        if digit in kind.ids:
            label[_dilate(inside, int(rng.integers(1, 3))) & ~inside] = kind.border
        label[inside] = kind.ids.get(digit, kind.other)
    if domain == "cityscapes":
        canvas[-EGO_ROWS:] *= 0.3
        label[-EGO_ROWS:] = 255
    return _bytes(canvas + rng.normal(0, 5, canvas.shape)), label


# --- video and video object segmentation -----------------------------------------------------------------------------


def _window(big: np.ndarray, shape: tuple[int, int], dx: float, dy: float) -> np.ndarray:
    """The middle [H, W] of a larger picture, which has moved by (dx, dy) pixels (rounded)."""
    top, left = (big.shape[0] - shape[0]) // 2 - round(dy), (big.shape[1] - shape[1]) // 2 - round(dx)
    return big[top : top + shape[0], left : left + shape[1]]


def render_clip(part: str, index: int, per_class: int = 0) -> tuple[np.ndarray, dict[str, str]]:
    """One clip of the video kind, [T, 64, 64, 3] uint8 with T in 16..24, and its factors (class, digit, background).

    index // clips per class is the motion (`per_class` of them, 0: as many as the video kind has). The background
    (texture and hue) is that of the motion in ``train01``, that of another motion in ``test01``, and independent of the
    motion in ``train02`` and ``test02``.
    """
    rng, shape, motion = _rng("video", part, index), (64, 64), index // (per_class or CLIPS_PER_CLASS[part])
    behind = {"train01": motion, "test01": (motion + 3) % len(MOTIONS)}.get(part, int(rng.integers(len(MOTIONS))))
    hue, digit, count = behind / len(MOTIONS), int(rng.integers(10)), int(rng.integers(16, 25))
    back = _paint(rng, TEXTURES[behind], shape, Tone((hue - 0.04, hue + 0.04), (0.3, 0.8), (0.1, 0.5)))
    glyph = int(rng.choice(glyph_split(part[:-2], digit)))
    fill = _paint(rng, str(rng.choice(FILLS)), (128, 128), BRIGHT)
    size, reach, turn, phase = rng.uniform((20, 12, -1, 0), (26, 16, 1, 2 * math.pi))
    tilt, (x, y) = rng.uniform(-0.2, 0.2), rng.uniform(30, 34, 2)
    across, frames = rng.uniform(-14, 14), []
    for time_ in np.linspace(-1, 1, count):
        dx, dy, zoom = {
            "MoveLeft": (-reach * time_, across, 1.0),
            "MoveRight": (reach * time_, across, 1.0),
            "MoveUp": (across, -reach * time_, 1.0),
            "MoveDown": (across, reach * time_, 1.0),
            "Circle": (
                reach * math.cos(phase + math.pi * time_),
                reach * math.sin(phase + math.pi * time_) * math.copysign(1, turn),
                1.0,
            ),
            "ZoomIn": (across / 2, across * turn / 2, 1.0 + 0.45 * time_),
        }[MOTIONS[motion]]
        cover = ink(glyph, shape, (x + dx, y + dy), size * zoom, tilt)
        frames.append(_bytes(_over(back, _window(fill, shape, dx, dy), cover)))
    return np.stack(frames), {"class": MOTIONS[motion], "digit": str(digit), "background": TEXTURES[behind]}


def _shades(rng: np.random.Generator, name: str, shape: tuple[int, int], tone: Tone) -> np.ndarray:
    """A texture [H, W, 3] float32 in 0..255 of two shades of one colour."""
    return tone.draw(rng) * (1 - rng.uniform(0.2, 0.4) * texture(rng, name, *shape)[..., None])


def _blob(
    shape: tuple[int, int], centre: tuple[float, float], radius: float, waves: np.ndarray, angle: float
) -> np.ndarray:
    """Coverage [H, W] float32 in 0..1 of a filled shape whose radius varies along its outline.

    Waves [n, 2]: amplitude (a share of the radius) and phase (radians) of 2, 3, ... periods round the outline.
    """
    y, x = np.mgrid[: shape[0], : shape[1]] - np.array(centre[::-1])[:, None, None]
    around = np.arctan2(y, x) - angle
    reach = sum(a * np.cos(k * around + phase) for k, (a, phase) in enumerate(waves, 2))
    return np.clip(0.5 + radius * (1 + reach) - np.hypot(y, x), 0, 1).astype(np.float32)


def render_sequence(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One DAVIS-2016 sequence: frames [12, 96, 160, 3] uint8 and masks [12, 96, 160] uint8, 1 on the one object.

    The object, 5 to 20 % of a frame, moves, turns, breathes and bounces off the edges, before three bands (sky, middle,
    ground) that the camera pans over. Every part has one colour and a texture of its own, light on dark or dark on
    light.
    """
    rng, shape, big = _rng("davis", split, index), (96, 160), (136, 200)
    rows, columns = np.mgrid[: big[0], : big[1]]
    back = np.zeros((*big, 3), np.float32)
    for edge in (0, 0.41, 0.59):  # the frame shows the middle: three parts of about the same height
        line = big[0] * (edge + rng.uniform(-0.04, 0.04)) + rng.uniform(-0.15, 0.15) * (columns - big[1] / 2)
        wave = 3 * np.sin(columns * rng.uniform(0.05, 0.12) + rng.uniform(0, 2 * math.pi))
        paint = _shades(rng, str(rng.choice(TEXTURES)), big, DARK if index % 2 else PALE)
        back = _over(back, paint, (rows >= line + wave if edge else rows >= 0).astype(np.float32))
    fill = _shades(rng, str(rng.choice(FILLS)), (384, 512), BRIGHT if index % 2 else DEEP)
    pan, course, speed = rng.uniform(-1.5, 1.5, 2), rng.uniform(0, 2 * math.pi), rng.uniform(2, 5)
    waves = rng.uniform((0, 0), (0.12, 2 * math.pi), (3, 2))
    radius, spin, beat = rng.uniform((22, -0.05, 3), (28, 0.05, 9))
    room = np.array(shape[::-1]) - 2.4 * radius
    start = rng.uniform(0, 1, 2) * room
    frames, masks = [], []
    for step in range(SEQUENCE_FRAMES):
        way = (start + speed * step * np.array([math.cos(course), math.sin(course)])) % (2 * room)
        x, y = np.minimum(way, 2 * room - way) + 1.2 * radius  # reflected at the edges
        cover = _blob(shape, (x, y), radius * (1 + 0.1 * math.sin(step / beat)), waves, spin * step)
        inside = _window(fill, shape, x - shape[1] / 2, y - shape[0] / 2)
        canvas = _over(_window(back, shape, *(pan * step)), inside, cover)
        frames.append(_bytes(canvas + rng.normal(0, 3, canvas.shape)))
        masks.append((cover > 0.5).astype(np.uint8))
    return np.stack(frames), np.stack(masks)


# --- few-shot --------------------------------------------------------------------------------------------------------


def fewshot_classes(split: str) -> list[str]:
    """Class names of a few-shot split; the splits share no digit, hence no class and no glyph."""
    return [f"digit_{digit}_{style}" for digit in FEWSHOT_DIGITS[split] for style in STYLES]


def render_fewshot(split: str, index: int) -> np.ndarray:
    """One few-shot image [32, 32, 3] uint8; index // images per class is the class in ``fewshot_classes(split)``."""
    rng, shape = _rng("fewshot", split, index), (32, 32)
    digit, style = divmod(index // FEWSHOT_PER_CLASS, len(STYLES))
    glyph = int(rng.choice(glyph_split(split, FEWSHOT_DIGITS[split][digit])))
    colour, tone = _two_sides(rng, rng.uniform())
    canvas = _paint(rng, str(rng.choice(TEXTURES)), shape, tone)
    x, y, size, angle = rng.uniform((14, 14, 22, -0.2), (18, 18, 28, 0.2))
    cover = ink(glyph, shape, (x, y), size, angle, thick=0 if STYLES[style] == "inverted" else 1)
    if STYLES[style] == "outline":
        cover = cover - ink(glyph, shape, (x, y), size, angle, thick=0)
    elif STYLES[style] == "inverted":  # a plate with the digit cut out
        rows, columns = np.mgrid[:32, :32]
        cover = (1 - cover) * (np.maximum(abs(columns - x), abs(rows - y)) < size / 2 + 1)
    elif STYLES[style] == "striped":
        cover = cover * (np.arange(32) // 2 % 2)[:, None]
    return _bytes(_over(canvas, colour, cover.astype(np.float32)) + rng.normal(0, 4, canvas.shape))
