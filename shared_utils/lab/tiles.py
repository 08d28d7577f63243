"""Pictures for readers: captioned tiles beside each other, and the flags and checkpoint of the folders' `strip` tools.

    python -m <folder>.lab.strip

draws what a paper does from a run's checkpoint: one small PNG of at most `WIDTH` pixels, on a CPU, in seconds.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser, runs_root

WIDTH = 900  # pixels of a strip at most
GREEN, RED, GREY, BLUE = (30, 150, 60), (205, 50, 45), (170, 170, 170), (40, 95, 190)
Colour = tuple[int, int, int]
Picture = Tensor | np.ndarray | Image.Image


def strip_parser(folder: str, doc: str, job: str = "pretrain") -> Parser:
    """Flags of `python -m <folder>.lab.strip`; `doc` is the module's, `job` the one whose mini run is the default."""
    p = Parser(prog=f"{folder}.lab.strip", description=doc.splitlines()[0])
    default = runs_root() / folder / job / "mini/checkpoint.pth"
    p.add_argument(
        "--pretrained", type=Path, default=default, help=f"checkpoint (default: of bash {folder}/run_{job}.sh)"
    )
    p.add_argument("--out", type=Path, default=runs_root() / folder / "strip.png", help="file of the picture")
    return p


def open_run(path: Path, parser: argparse.ArgumentParser, command: str, holds: Sequence[str] = ()) -> tuple[Any, Any]:
    """A run's checkpoint and its flags.

    Args:
        parser: of the job that wrote it. command: what makes such a file, for the messages. holds: its entries.

    UserError: no such file, or one of another job.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; make it with: {command}")
    saved = checkpoint.load(path)
    flags = saved.get("args") if isinstance(saved, Mapping) else None
    own = vars(parser.parse_args([]))
    right = False
    if isinstance(flags, Mapping) and all(name in saved for name in holds):
        # An older file does not name its job. A flag may be newer than the file; that of another job lacks flags too,
        # but has some that are unknown here.
        missing, foreign = set(own) - set(flags), set(flags) - set(own)
        right = not missing or (not foreign and len(missing) <= len(own) / 2)
        right = saved["job"] == parser.prog if "job" in saved else right
    if not isinstance(flags, Mapping) or not right:
        raise UserError(f"{path}: not a checkpoint of {parser.prog}; make one with: {command}")
    flags = {**own, **flags}
    paths = {action.dest for action in parser._actions if action.type is Path}
    return saved, argparse.Namespace(**{k: Path(v) if k in paths and v is not None else v for k, v in flags.items()})


def check_numbers(numbers: Sequence[int], count: int) -> None:
    """UserError unless all of --anchors are numbers of the `count` samples."""
    if wrong := [n for n in numbers if not 0 <= n < count]:
        raise UserError(f"--anchors {wrong[0]}: the data has the numbers 0 to {count - 1}")


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def words(text: str, size: int = 13, colour: Colour = (30, 30, 30), width: int = 0) -> Image.Image:
    """Lines of text on white, each broken at `width` pixels if given."""
    face = font(size)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        first, *rest = paragraph.split(" ")
        lines.append(first)
        for word in rest:
            longer = f"{lines[-1]} {word}"
            if width and face.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    high = size + 3
    wide = max(width, *(int(np.ceil(face.getlength(t))) for t in lines))
    out = Image.new("RGB", (wide, high * len(lines)), "white")
    draw = ImageDraw.Draw(out)
    for row, t in enumerate(lines):
        draw.text((0, row * high), t, fill=colour, font=face)
    return out


def picture(x: Picture, height: int) -> Image.Image:
    """[3, H, W] or [H, W] in 0..1, or bytes [H, W, 3] -> an image of that height, without smoothing at multiples."""
    if isinstance(x, Tensor):
        x = x.detach().float().cpu()
        x = x.expand(3, *x.shape) if x.ndim == 2 else x
        x = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(x) if isinstance(x, np.ndarray) else x
    how = Image.Resampling.LANCZOS if height % image.height else Image.Resampling.NEAREST
    return image.resize((round(image.width * height / image.height), height), how)


def tile(x: Picture, height: int, caption: str = "", frame: Colour | None = None) -> Image.Image:
    """A picture with a frame of 3 pixels (white: none) and a caption below it."""
    inner = picture(x, height)
    out = Image.new("RGB", (inner.width + 6, inner.height + 6), frame or "white")
    out.paste(inner, (3, 3))
    return column([out, words(caption, 12)], 1, centred=True) if caption else out


def bars(values: Sequence[float], size: tuple[int, int], colours: Sequence[Colour], top: float = 1.0) -> Image.Image:
    """Bars of these heights (`top`: the whole), width and height of the picture in pixels."""
    out = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(out)
    each = size[0] / len(values)
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        high = round(min(1.0, max(0.0, value / top)) * (size[1] - 1))
        draw.rectangle((round(i * each) + 1, size[1] - 1 - high, round((i + 1) * each) - 2, size[1] - 1), fill=colour)
    draw.line((0, size[1] - 1, size[0], size[1] - 1), fill=GREY)
    return out


def row(cells: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Beside each other, at the same height."""
    out = Image.new(
        "RGB", (sum(c.width for c in cells) + gap * (len(cells) - 1), max(c.height for c in cells)), "white"
    )
    x = 0
    for cell in cells:
        out.paste(cell, (x, 0))
        x += cell.width + gap
    return out


def column(cells: Sequence[Image.Image], gap: int = 4, centred: bool = False) -> Image.Image:
    """Below each other."""
    wide = max(c.width for c in cells)
    out = Image.new("RGB", (wide, sum(c.height for c in cells) + gap * (len(cells) - 1)), "white")
    y = 0
    for cell in cells:
        out.paste(cell, ((wide - cell.width) // 2 if centred else 0, y))
        y += cell.height + gap
    return out


def grid(rows: Sequence[Sequence[Image.Image | str]], gap: int = 6) -> Image.Image:
    """Cells in aligned rows and columns, each in the middle of its place; a string is text."""
    cells = [[words(c, 12) if isinstance(c, str) else c for c in line] for line in rows]
    wide = [max(c.width for c in line) for line in zip(*cells, strict=True)]
    high = [max(c.height for c in line) for line in cells]
    out = Image.new("RGB", (sum(wide) + gap * (len(wide) - 1), sum(high) + gap * (len(high) - 1)), "white")
    for r, line in enumerate(cells):
        for i, c in enumerate(line):
            x, y = sum(wide[:i]) + gap * i, sum(high[:r]) + gap * r
            out.paste(c, (x + (wide[i] - c.width) // 2, y + (high[r] - c.height) // 2))
    return out


def heat(values: Tensor) -> Tensor:
    """[H, W] in 0..1 -> [3, H, W] from dark blue over green to yellow."""
    stops = torch.tensor([[0.15, 0.1, 0.35], [0.15, 0.4, 0.55], [0.2, 0.7, 0.45], [0.99, 0.9, 0.15]])
    place = values.clamp(0, 1).cpu() * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    share = (place - low)[..., None]
    return (stops[low] * (1 - share) + stops[low + 1] * share).permute(2, 0, 1)


def save(strip: Image.Image, path: Path) -> str:
    """Write the PNG in 256 colours and return a line about it. UserError: it cannot be written."""
    strip = strip.crop((0, 0, min(strip.width, WIDTH), strip.height))
    buffer = io.BytesIO()
    strip.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    checkpoint.write(path, lambda handle: handle.write(buffer.getvalue()))
    return f"{path}: {strip.width} x {strip.height} pixels, {len(buffer.getvalue()) / 1024:.0f} KiB"
