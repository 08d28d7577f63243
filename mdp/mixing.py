"""Cross-dataset mixing of the query views (paper 2106.04121; box rule from the authors' rebuttal draft, rest inferred).

region: a box of image b, with its labels, is pasted into image a; every pixel keeps one label.
pixel:  x = lambda x_a + (1 - lambda) x_b for the whole crop; every pixel has two labels.
The key views, which feed the bank, are never mixed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Mixed(NamedTuple):
    """x [B, 3, H, W]; y_a, y_b [B, H, W] (y_b = -1 where there is no second label); lam [B] weight of y_a."""

    x: Tensor
    y_a: Tensor
    y_b: Tensor
    lam: Tensor


class Plan(NamedTuple):
    """What is drawn for a batch: partner [B], kind [B] (0 none, 1 region, 2 pixel), lam [B], corner [B, 2] in 0..1."""

    partner: Tensor
    kind: Tensor
    lam: Tensor
    corner: Tensor


def draw_partners(dataset: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each image another image of another dataset; of any when the batch holds one only. [B] -> [B]."""
    b = len(dataset)
    other = dataset[:, None] != dataset[None, :]
    anyone = ~torch.eye(b, dtype=torch.bool, device=dataset.device)
    if b == 1:
        return torch.zeros_like(dataset)
    allowed = torch.where(other.any(1, keepdim=True), other, anyone)
    return torch.multinomial(allowed.float().cpu(), 1, generator=generator)[:, 0].to(dataset.device)


def draw_plan(dataset: Tensor, mix: str, prob: float, beta: float, generator: torch.Generator | None = None) -> Plan:
    """Draw partner, kind, lambda ~ Beta(beta, beta) and box corner for each image (with a CPU generator)."""
    b, device = len(dataset), dataset.device
    gamma = torch._standard_gamma(torch.full((2, b), float(beta)), generator=generator)
    lam = gamma[0] / gamma.sum(0)
    kinds = {"none": [0.0, 0.0], "region": [1.0, 0.0], "pixel": [0.0, 1.0], "both": [0.5, 0.5]}[mix]
    u = torch.rand(b, generator=generator)
    kind = torch.where(u < prob * kinds[0], 1, torch.where(u < prob * (kinds[0] + kinds[1]), 2, 0))
    corner = torch.rand(b, 2, generator=generator)
    partner = draw_partners(dataset, generator)
    return Plan(partner, kind.to(device), lam.to(device), corner.to(device))


def region_box(lam: Tensor, corner: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, x1, y0, y1 [B] in pixels: (r_x, r_y) is the corner, size W sqrt(1 - lambda) x H sqrt(1 - lambda), clipped."""
    side = (1 - lam).clamp(min=0).sqrt()
    x0, y0 = (corner[:, 0] * width).floor(), (corner[:, 1] * height).floor()
    x1 = (x0 + (width * side).round()).clamp(max=width)
    y1 = (y0 + (height * side).round()).clamp(max=height)
    return x0, x1, y0, y1


def apply_plan(x: Tensor, y: Tensor, plan: Plan) -> Mixed:
    """Mix a batch x [B, 3, H, W] with labels y [B, H, W] at full resolution; no loop over images."""
    h, w = y.shape[-2:]
    x0, x1, y0, y1 = (edge[:, None] for edge in region_box(plan.lam, plan.corner, h, w))
    columns, rows = torch.arange(w, device=x.device)[None], torch.arange(h, device=x.device)[None]
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None, :]  # [B, H, W]
    pasted = inside & (plan.kind == 1)[:, None, None]
    blended = plan.kind == 2
    x_b, y_partner = x[plan.partner], y[plan.partner]
    lam = torch.where(blended, plan.lam, 1.0)
    weight = lam.to(x.dtype)[:, None, None, None]
    mixed = torch.where(pasted[:, None], x_b, weight * x + (1 - weight) * x_b)
    y_b = torch.where(blended[:, None, None], y_partner, -1)
    return Mixed(mixed, torch.where(pasted, y_partner, y), y_b, lam)
