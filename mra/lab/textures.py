"""The texture-shortcut set: eight shapes on eight textures; in training the texture gives the class away, mostly.

DIR/{train,test_a,test_b}/SHAPE/*.png in ImageNet's layout, DIR/masks/ the same with the object's mask. In train and
test_a the texture is the shape's own with probability 0.8 (another one, else); in test_b it says nothing.
"""

import colorsys
import fcntl
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from shared_utils import UserError
from shared_utils.flags import Parser
from shared_utils.lab import mini_draw
from shared_utils.run import cli

SHAPES = ("bar", "crescent", "cross", "disc", "ring", "square", "star", "triangle")
FAMILIES = ("stripes", "checker", "dots", "rings", "clouds", "grain", "bricks", "waves")  # the shapes' own, in order
AGREE = {"train": 0.8, "test_a": 0.8, "test_b": 1 / len(SHAPES)}
COUNTS = {"train": 500, "test_a": 125, "test_b": 125}  # of a class
SIZE = 48
VERSION = 1  # raise it whenever an image changes
ROOT = Path("data/mini/texture_shortcut")


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (in units of half the object's width) lie in the shape."""
    r, a = np.hypot(u, v), np.abs
    if shape == "disc":
        return r < 1
    if shape == "ring":
        return (r < 1) & (r > 0.55)
    if shape == "square":
        return np.maximum(a(u), a(v)) < 0.85
    if shape == "triangle":
        return (v < 0.7) & (a(u) < (v + 1) / 1.7)
    if shape == "cross":
        return (np.maximum(a(u), a(v)) < 1) & (np.minimum(a(u), a(v)) < 0.3)
    if shape == "bar":
        return (a(u) < 1) & (a(v) < 0.3)
    if shape == "crescent":
        return (r < 1) & (np.hypot(u - 0.5, v) > 0.75)
    # a star of five points: the radius falls linearly from a point to the notch between two
    turn = a((np.arctan2(v, u) * 5 / (2 * math.pi)) % 1 - 0.5) * 2
    return r < 0.4 + 0.65 * turn


def texture(rng: np.random.Generator, family: str) -> np.ndarray:
    """A pattern [48, 48] in 0..1."""
    if family in mini_draw.TEXTURES:
        return mini_draw.texture(rng, family, SIZE, SIZE)
    x, y = np.meshgrid(np.arange(SIZE) + rng.uniform(0, 64), np.arange(SIZE) + rng.uniform(0, 64))
    step = rng.uniform(7, 12)
    if family == "bricks":
        row = np.floor(y / step)
        return (np.minimum((y / step) % 1, ((x / step + row) / 2) % 1) < 0.2).astype(np.float32)
    theta = rng.uniform(0, math.pi)
    along, across = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
    return (0.5 + 0.5 * np.sin(2 * math.pi / step * (along + 4 * np.sin(across / 4)))).astype(np.float32)


def colour(rng: np.random.Generator, value: tuple[float, float]) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(*value)))


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Image [48, 48, 3] and mask [48, 48] (255: object), uint8, and the texture's family; the shape is index // count.

    The object (35 to 60 % of the width) has one colour, light on a dark texture or dark on a light one.
    """
    rng = np.random.default_rng([VERSION, zlib.crc32(split.encode()), index])
    label = index // COUNTS[split]
    family = FAMILIES[label] if rng.random() < AGREE[split] else None
    other = str(rng.choice([name for i, name in enumerate(FAMILIES) if i != label]))
    family = family or other
    light, dark = (0.7, 1.0), (0.1, 0.45)
    front, back = (light, dark) if rng.random() < 0.5 else (dark, light)
    a, b = colour(rng, back), colour(rng, back)
    canvas = a + texture(rng, family)[..., None] * (b - a)
    half = SIZE * rng.uniform(0.35, 0.6) / 2
    cx, cy = rng.uniform(half, SIZE - half, 2)
    angle = rng.uniform(0, 2 * math.pi)
    points = (np.arange(3 * SIZE) + 0.5) / 3  # three samples a pixel: smooth edges
    x, y = np.meshgrid((points - cx) / half, (points - cy) / half)
    cover = inside(SHAPES[label], x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle))
    soft = cover.reshape(SIZE, 3, SIZE, 3).mean((1, 3))[..., None]
    canvas = canvas + soft * (colour(rng, front) - canvas) + rng.normal(0, 4, canvas.shape)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return image, ((soft[..., 0] > 0.5) * 255).astype(np.uint8), family


def write(folder: Path) -> None:
    lines = []
    for split, count in COUNTS.items():
        for index in range(count * len(SHAPES)):
            image, mask, family = draw(split, index)
            name = f"{split}/{SHAPES[index // count]}/{index % count:04d}.png"
            for path, array in ((folder / name, image), (folder / "masks" / name, mask)):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path, compress_level=1)
            lines.append(f"{name},{family}\n")
    (folder / "textures.csv").write_text("path,texture\n" + "".join(lines))


def ensure(folder: Path = ROOT) -> Path:
    """Write the set unless this version of it is there, under a lock; returns the folder. UserError: not writable."""
    stamp = f"texture shortcut, version {VERSION}\n"

    def fresh() -> bool:
        file = folder / "mini.stamp"
        return file.is_file() and file.read_text() == stamp

    if fresh():
        return folder
    work = folder.with_name(f".{folder.name}.writing")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if fresh():
                return folder
            if folder.exists() and not (folder / "mini.stamp").is_file():
                raise UserError(f"{folder} is not a generated set (it has no mini.stamp): move it away")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            write(work)
            (work / "mini.stamp").write_text(stamp)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(work, folder)
    except OSError as error:
        raise UserError(f"cannot write generated images to {folder}: {error}") from error
    return folder


def get_parser() -> Parser:
    p = Parser(prog="mra.lab.textures", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--root", type=Path, default=ROOT, help="folder of the set (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    print(ensure(get_parser().parse_args(argv).root))
    return 0


if __name__ == "__main__":
    cli(main)
