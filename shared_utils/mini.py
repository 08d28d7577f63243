"""Mini data: small data sets that need no download, in the real layouts of the real ones.

The objects are the 1,797 handwritten 8x8 digits inside scikit-learn's own package, drawn moving, scaled and coloured on
procedural textures. Each sample depends on (VERSION, kind, split, index) alone. The five kinds and what they stand for:

- ``images``        ImageNet folders, ten digit classes, with the nuisance factors in ``attributes.csv``
- ``segmentation``  VOC, ADE20K and Cityscapes trees: three visual domains, three conflicting sets of classes
- ``video``         UCF101 folders and lists: the motion is the class, the background a shortcut (01) or not (02)
- ``davis``         DAVIS sequences with several objects
- ``fewshot``       splits of disjoint classes (digit x drawing style)

``train``, ``val`` and ``test`` never share a glyph, in any kind.

    python -m shared_utils.mini [--root data/mini] KIND [KIND ...]|all
"""

from __future__ import annotations

import argparse
import colorsys
import csv
import fcntl
import json
import math
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from shared_utils import UserError
from shared_utils.run import cli

VERSION = 1  # raise it whenever a sample changes: what is on disk is then rebuilt
ROOT = Path("data/mini")
STAMP = "mini.stamp"

TEXTURES = ("stripes", "checker", "dots", "rings", "clouds", "grain")
GLYPH_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}

IMAGES_PER_CLASS = {"train": 100, "val": 20}
HUES = 8
FILLS = ("plain", "stripes", "checker", "dots")

MOTIONS = ("Circle", "MoveDown", "MoveLeft", "MoveRight", "MoveUp", "ZoomIn")
CLIPS_PER_CLASS = {"train01": 20, "test01": 10, "train02": 20, "test02": 10}
FIRST_GROUP = {"test01": 1, "train01": 3, "test02": 7, "train02": 9}  # five clips a group
FPS = 25

SEQUENCES = {"train": 8, "val": 4}
SEQUENCE_FRAMES = 12

STYLES = ("filled", "outline", "inverted", "striped")
FEWSHOT_DIGITS = {"train": (0, 1, 2, 3, 4, 5), "val": (6, 7), "test": (8, 9)}
FEWSHOT_PER_CLASS = 30


# --- glyphs and paint ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _digits() -> tuple[list[Image.Image], np.ndarray]:
    """The glyphs as 12x12 grey images (8x8 ink, margin 2) and their digits [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"mini data draws scikit-learn's digits: pip install scikit-learn ({error})") from error
    data = load_digits()
    ink = np.pad((data.images * (255 / 16)).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return [Image.fromarray(glyph) for glyph in ink], data.target


@lru_cache(maxsize=None)
def glyph_split(split: str, digit: int) -> tuple[int, ...]:
    """Glyph indices (rows of ``load_digits``) of one digit that ``split`` (train, val or test) may draw; disjoint."""
    rows = np.random.default_rng(digit).permutation(np.flatnonzero(_digits()[1] == digit))
    edges = np.round(np.cumsum([0, *GLYPH_SHARES.values()]) * len(rows)).astype(int)
    place = list(GLYPH_SHARES).index(split)
    return tuple(int(row) for row in rows[edges[place] : edges[place + 1]])


def _rng(kind: str, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, zlib.crc32(f"{kind}/{split}".encode()), index])


def ink(
    glyph: int, shape: tuple[int, int], centre: tuple[float, float], size: float, angle: float = 0.0, thick: int = 1
) -> np.ndarray:
    """Coverage [H, W] float32 in 0..1 of a glyph whose 8x8 box is ``size`` pixels, at ``centre`` (x, y), sub-pixel exact.

    ``angle`` in radians; ``thick`` pixels are added all around the stroke.
    """
    cos, sin, (cx, cy) = math.cos(angle) * 8 / size, math.sin(angle) * 8 / size, centre
    back = (cos, sin, 6 - cos * cx - sin * cy, -sin, cos, 6 + sin * cx - cos * cy)  # canvas -> glyph
    height, width = shape
    drawn = _digits()[0][glyph].transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    drawn = drawn.point([min(255, max(0, 4 * (level - 64))) for level in range(256)])
    return np.asarray(_grow(drawn, thick), np.float32) / 255


def _grow(mask: Image.Image, pixels: int) -> Image.Image:
    return mask.filter(ImageFilter.MaxFilter(2 * pixels + 1)) if pixels else mask


def _dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    return np.asarray(_grow(Image.fromarray(mask.astype(np.uint8) * 255), pixels)) > 0


def texture(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """A pattern [H, W] float32 in 0..1 of one of the TEXTURES, with random phase, direction and period ("plain": 0)."""
    y, x = np.mgrid[:height, :width] + rng.uniform(0, 64, (2, 1, 1))
    theta, step = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(7, 13)
    u, v = (x * math.cos(theta) + y * math.sin(theta)) * step, (y * math.cos(theta) - x * math.sin(theta)) * step
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


def _jpg(path: Path, rgb: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, quality=95)


def _png(path: Path, array: np.ndarray, palette: Sequence[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)  # turns mode L into mode P, the indices stay
    image.save(path)


def _lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def _table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def voc_palette() -> list[int]:
    """PASCAL VOC's 256 colours, flat: the bits of the index spread over the channels, highest bit first."""
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((np.arange(256) >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours.ravel().tolist()


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
CITIES = {"train": ("aachen", "bochum", "hanover"), "val": ("frankfurt", "munster")}
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
    for digit, size, spot in zip(digits, sizes, _spots(rng, kind.shape, sizes)):
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


def _write_segmentation(folder: Path) -> None:
    voc, ade, city = folder / "VOCdevkit/VOC2012", folder / "ade/ADEChallengeData2016", folder / "cityscapes"
    palette = voc_palette()
    for split in ("train", "val"):
        names = [f"2012_{1000 * (split == 'val') + i:06d}" for i in range(DOMAINS["voc"].counts[split])]
        for i, name in enumerate(names):
            image, label = render_scene("voc", split, i)
            _jpg(voc / f"JPEGImages/{name}.jpg", image)
            _png(voc / f"SegmentationClassAug/{name}.png", label, palette)
        for part in ("train", "trainaug") if split == "train" else ("val",):
            _lines(voc / f"ImageSets/Segmentation/{part}.txt", names)
        for i in range(DOMAINS["ade"].counts[split]):
            image, label = render_scene("ade", split, i)
            name = f"{'training' if split == 'train' else 'validation'}/ADE_{split}_{i + 1:08d}"
            _jpg(ade / f"images/{name}.jpg", image)
            _png(ade / f"annotations/{name}.png", label)
        for i in range(DOMAINS["cityscapes"].counts[split]):
            image, label = render_scene("cityscapes", split, i)
            town = CITIES[split][i % len(CITIES[split])]
            name = f"{split}/{town}/{town}_{i // len(CITIES[split]):06d}_000019"
            _png(city / f"leftImg8bit/{name}_leftImg8bit.png", image)
            _png(city / f"gtFine/{name}_gtFine_labelTrainIds.png", label)


# --- the folders on disk ---------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], None]] = {
    "segmentation": _write_segmentation,
}


def _stamp(kind: str) -> str:
    return f"mini data, kind {kind}, version {VERSION}\n"


def _fresh(kind: str, folder: Path) -> bool:
    try:
        return (folder / STAMP).read_text() == _stamp(kind)
    except OSError:
        return False


def ensure(kind: str, root: Path | str = ROOT) -> Path:
    """Write ``<root>/<kind>`` unless this version of it is there already; return that folder.

    The data is written beside its place and renamed into it, under a lock: a killed writer leaves nothing half-made,
    and of two processes the second waits and finds the work done. Raises UserError for an unknown kind, a root that
    cannot be written, and a folder of that name that this module did not make (it is never touched).
    """
    if kind not in WRITERS:
        raise UserError(f"unknown mini data kind '{kind}': choose from {', '.join(WRITERS)}")
    root = Path(root)
    folder, work, old = root / kind, root / f".{kind}.writing", root / f".{kind}.old"
    if _fresh(kind, folder):
        return folder
    if folder.exists() and not (folder / STAMP).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not mini data (no {STAMP} in it): choose another root, or move it away"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _fresh(kind, folder):
                return folder
            for leftover in (work, old):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                work.mkdir()
                WRITERS[kind](work)
                (work / STAMP).write_text(_stamp(kind))
                if folder.exists():
                    os.rename(folder, old)
                os.rename(work, folder)
            finally:
                for leftover in (work, old):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write mini data to {root}: {error}") from error
    return folder


def main(argv: list[str] | None = None) -> int:
    """Command line: write the named kinds and print one line for each."""
    parser = argparse.ArgumentParser(prog="python -m shared_utils.mini", description="Write mini data sets.")
    parser.add_argument("kinds", nargs="+", metavar="KIND", help=f"{', '.join(WRITERS)}, or all")
    parser.add_argument("--root", type=Path, default=ROOT, help="parent folder (default: %(default)s)")
    args = parser.parse_args(argv)
    for kind in WRITERS if "all" in args.kinds else args.kinds:
        start = time.perf_counter()
        folder = ensure(kind, args.root)
        files = Counter(path.suffix[1:] for path in folder.rglob("*.*") if path.name != STAMP and path.is_file())
        counts = ", ".join(f"{count} {suffix}" for suffix, count in files.most_common())
        print(f"{folder}: {counts} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    cli(main)
