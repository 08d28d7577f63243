"""FixMatch's RandAugment on batches of bytes, on any device, to the bit as PIL has it.

Images are uint8 [N, 3, H, W]. An operation is applied to the images that have drawn it, all at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Draws(NamedTuple):
    """What happens to N images, twice, on the CPU: [N, 2] each."""

    operation: Tensor  # its number in NAMES
    level: Tensor  # 1 to 9
    sign: Tensor  # -1 or 1, of shifts, shears and turns
    apply: Tensor  # bool


def draw(count: int, generator: torch.Generator) -> Draws:
    """For `count` images, as FixMatch draws: any operation, any level, each applied with chance 0.5."""
    shape = (count, 2)
    operation = torch.randint(len(NAMES), shape, generator=generator)
    level = torch.randint(1, 10, shape, generator=generator)
    sign, apply = torch.randint(2, (2, *shape), generator=generator)
    return Draws(operation, level, 2 * sign - 1, apply.bool())


def keyed(u: np.ndarray) -> Draws:
    """The same from numbers in 0..1, [N, 8], that are keyed by image and view (`shared_utils.feed`)."""
    a, b, c, d = torch.from_numpy(u).unflatten(1, (4, 2)).unbind(1)
    return Draws((a * len(NAMES)).long(), 1 + (b * 9).long(), 2 * (c < 0.5).long() - 1, d < 0.5)


def augmented(x: Tensor, draws: Draws) -> Tensor:
    """The augmented images, uint8 [N, 3, H, W]; x stays as it is."""
    x = x.clone()
    for turn in range(2):
        operation = draws.operation[:, turn].masked_fill(~draws.apply[:, turn], 0)  # 0: identity
        for number in range(1, len(NAMES)):
            rows = torch.nonzero(operation == number).flatten()
            if len(rows):
                level, sign = draws.level[rows, turn], draws.sign[rows, turn]
                there = rows.to(x.device, non_blocking=True)
                x[there] = OPERATIONS[NAMES[number]](x[there], level, sign)
    return x


def _per_image(values: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def _lookup(x: Tensor, table: Tensor) -> Tensor:
    """Levels [n, 3, H, W] through tables [n, 3, 256]."""
    return table.to(torch.uint8).gather(2, x.flatten(2).long()).view(x.shape)


def _histogram(x: Tensor) -> Tensor:
    """[n, 3, 256]"""
    counts = torch.zeros(*x.shape[:2], 256, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(2, x.flatten(2).long(), torch.ones_like(counts[:, :, :1]).expand(x.flatten(2).shape))


def _autocontrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    low, high = x.flatten(2).amin(2, keepdim=True).double(), x.flatten(2).amax(2, keepdim=True).double()
    levels = torch.arange(256, device=x.device, dtype=torch.float64)
    scale = levels[255] / (high - low).clamp_min(1)  # a number over a tensor would be its reciprocal times it
    table = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return _lookup(x, torch.where(high > low, table, levels))


def _equalize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    counts = _histogram(x)
    brightest = x.flatten(2).amax(2, keepdim=True).long()
    step = (counts.sum(2, keepdim=True) - counts.gather(2, brightest)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255)
    return _lookup(x, torch.where(step > 0, table, torch.arange(256, device=x.device)))


def _grey(x: Tensor) -> Tensor:
    """Luma of bytes [n, 1, H, W], Pillow's 16-bit weights."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=x.device).view(3, 1, 1)
    return ((x.int() * weights).sum(1, keepdim=True) + 0x8000) >> 16


def _blend(base: Tensor, x: Tensor, level: Tensor) -> Tensor:
    """base + factor * (x - base), cut to whole levels; factor 0.14 to 0.86."""
    factor = _per_image(0.05 + 0.09 * level.double(), x, torch.float32)
    base = base.float()
    return (base + factor * (x.float() - base)).to(torch.uint8)


def _brightness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x), x, level)


def _color(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(_grey(x), x, level)


def _contrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend((_grey(x).double().mean((1, 2, 3), keepdim=True) + 0.5).floor(), x, level)


def _sharpness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    whole = x.float()
    total = 9 * F.avg_pool2d(whole, 3, 1) + 4 * whole[:, :, 1:-1, 1:-1]  # a 3 x 3 mean, the middle five times
    smooth = whole.clone()  # the outermost pixels stay
    smooth[:, :, 1:-1, 1:-1] = (2 * total.round().long() + 13).div(26, rounding_mode="floor").float()
    return _blend(smooth, x, level)


def _posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return x & _per_image(256 - 2 ** (4 - 4 * level // 10), x, torch.uint8)


def _solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x.short() < _per_image(256 - 256 * level // 10, x, torch.int16), x, 255 - x)


def _moved(x: Tensor, matrix: Tensor) -> Tensor:
    """Nearest pixels by maps [n, 6] of the result to the image, black from outside: Pillow's 16-bit fixed point."""
    height, width = x.shape[2:]
    a, b, c, d, e, f = matrix.double().T
    fixed = torch.stack([a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e], 1)
    fixed = (fixed * 65536 + 0.5).floor().int().to(x.device, non_blocking=True)
    a, b, c, d, e, f = fixed[:, :, None, None].unbind(1)  # [n, 1, 1]
    rows = torch.arange(height, dtype=torch.int32, device=x.device)[:, None]
    columns = torch.arange(width, dtype=torch.int32, device=x.device)
    across, down = (c + a * columns + b * rows) >> 16, (f + d * columns + e * rows) >> 16  # [n, H, W]
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    place = (down.clamp(0, height - 1) * width + across.clamp(0, width - 1)).long().flatten(1)[:, None]
    found = x.flatten(2).gather(2, place.expand(-1, 3, -1)).view(x.shape)
    return found * inside[:, None]


def _rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    height, width = x.shape[2:]
    rows = []
    for degrees in (3 * level * sign).tolist():
        angle = -math.radians(degrees % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        middle = (width / 2, height / 2)
        rows.append([cos, sin, middle[0] - cos * middle[0] - sin * middle[1],
                     -sin, cos, middle[1] + sin * middle[0] - cos * middle[1]])  # fmt: skip
    return _moved(x, torch.tensor(rows, dtype=torch.float64))


def _affine(place: int, side: int = 0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A shear (`side` 0) or a shift by whole pixels (3: a share of the width, 2: of the height)."""

    def made(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        matrix = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(x), 1)
        amount = 0.03 * level.double() * sign
        matrix[:, place] = (amount * x.shape[side]).trunc() if side else amount
        return _moved(x, matrix)

    return made


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast, "equalize": _equalize, "brightness": _brightness, "color": _color,
    "contrast": _contrast, "sharpness": _sharpness, "posterize": _posterize, "solarize": _solarize,
    "rotate": _rotate, "shear_x": _affine(1), "shear_y": _affine(3),
    "translate_x": _affine(2, side=3), "translate_y": _affine(5, side=2),
}  # fmt: skip
NAMES = ("identity", *OPERATIONS)
