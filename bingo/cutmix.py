"""CutMix of two views of a batch, as the release draws it: one box and one ratio for the batch of a process."""

import math

import numpy as np
import torch
from torch import Tensor

Box = tuple[int, int, int, int, float]


def box_at(height: int, width: int, lam: float, cy: int, cx: int) -> Box:
    """Box of sides sqrt(1 - lam) around the pixel (cy, cx), clipped to the image (release utils.py).

    Returns: (y1, y2, x1, x2, mu); mu is the share of pixels outside the box, after clipping.
    """
    ratio = math.sqrt(1.0 - lam)
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    y1, y2 = max(cy - half_h, 0), min(cy + half_h, height)
    x1, x2 = max(cx - half_w, 0), min(cx + half_w, width)
    return y1, y2, x1, x2, 1 - (y2 - y1) * (x2 - x1) / (height * width)


def draw_box(height: int, width: int, alpha: float, rng: np.random.Generator) -> Box:
    """lambda ~ Beta(alpha, alpha), centre uniform over the pixels; see `box_at`."""
    lam = float(rng.beta(alpha, alpha))
    return box_at(height, width, lam, int(rng.integers(height)), int(rng.integers(width)))


def paste(query: Tensor, other: Tensor, box: Box) -> Tensor:
    """`query` [N, 3, H, W] with the pixels of `other` inside the box; both are left as they are."""
    y1, y2, x1, x2, _ = box
    mix = query.clone()
    mix[:, :, y1:y2, x1:x2] = other[:, :, y1:y2, x1:x2]
    return mix


def mix_shares(query: Tensor, other: Tensor, boxes: list[Box]) -> tuple[Tensor, Tensor]:
    """`paste` with a box of its own for each contiguous share of the batch: one process acts as `len(boxes)`.

    Returns: mix [N, 3, H, W], and mu [N], float64 on the CPU.
    """
    size = len(query) // len(boxes)
    parts = [paste(q, o, box) for q, o, box in zip(query.split(size), other.split(size), boxes, strict=True)]
    return torch.cat(parts), torch.tensor([box[4] for box in boxes], dtype=torch.float64).repeat_interleave(size)
