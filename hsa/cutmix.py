"""CutMix of a query with a view of its neighbour: one box, one ratio for all images of a batch share."""

import numpy as np
import torch
from torch import Tensor

Box = tuple[int, int, int, int, float]


def draw_box(height: int, width: int, alpha: float, rng: np.random.Generator) -> Box:
    """A box of side ratio sqrt(1 - lambda), lambda ~ Beta(alpha, alpha), around a uniform pixel, clipped.

    Returns: x1, y1, x2, y2 (columns x, rows y, the ends excluded) and mu, the share of the pixels outside the box.
        Clipping makes the mean of mu about .675 at 224 pixels and alpha 2, though that of lambda is .5.

    Source: release main_moco.py (which draws the row first and then the column).
    """
    ratio = np.sqrt(1.0 - rng.beta(alpha, alpha))
    (y1, y2), (x1, x2) = (_span(size, ratio, int(rng.integers(size))) for size in (height, width))
    return x1, y1, x2, y2, 1 - (x2 - x1) * (y2 - y1) / (height * width)


def _span(size: int, ratio: float, centre: int) -> tuple[int, int]:
    half = int(size * ratio) // 2
    return max(centre - half, 0), min(centre + half, size)


def paste(query: Tensor, other: Tensor, box: Box) -> Tensor:
    """`query` [B, C, H, W] with the box taken from `other`; a new tensor."""
    x1, y1, x2, y2, _ = box
    mix = query.clone()
    mix[..., y1:y2, x1:x2] = other[..., y1:y2, x1:x2]
    return mix


def mix_shares(query: Tensor, other: Tensor, boxes: list[Box]) -> tuple[Tensor, Tensor]:
    """Paste a box of its own into each contiguous share of the batch: one process acts as `len(boxes)` processes.

    Returns: mix [B, C, H, W] and mu [B] (CPU, float64).
    """
    size = len(query) // len(boxes)
    parts = [
        paste(a, b, box) for a, b, box in zip(query.split(size), other.split(size), boxes, strict=True)
    ]  # fmt: skip
    mu = torch.tensor([box[4] for box in boxes], dtype=torch.float64).repeat_interleave(size)
    return torch.cat(parts), mu
