"""The regulariser: sample a transformation t, warp the image with it, decode t from the features of both, its losses.

Every value of the sampler, of the targets and of the losses is that of the AET, AVT and EnAET releases (see README);
that FLAT used the same ones is inferred. All of it is free of labels.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GREY = 128.0  # fill colour of the releases, in pixel units
GROUPS = {"abde": (0, 1, 3, 4), "cf": (2, 5), "gh": (6, 7)}  # coefficients of theta: linear part, shift, perspective

# mean and std of theta for (side, corner shift) under scale 0.8..1.2 and four rotations. 32: AET, AVT, EnAET on CIFAR
# (looser than the empirical 0.763, 17.0, 0.0061). 224: AET on ImageNet. 84 and 28: from 200,000 draws.
TABLE: dict[tuple[int, int], tuple[tuple[float, ...], tuple[float, ...]]] = {
    (32, 4): ((0, 0, 16, 0, 0, 16, 0, 0), (1, 1, 20, 1, 1, 20, 0.015, 0.015)),
    (224, 28): ((0, 0, 112, 0, 0, 112, 6.4e-5, 6.4e-5), (0.75, 0.75, 118, 0.75, 0.75, 118, 7.75e-4, 7.75e-4)),
    (84, 10): ((0, 0, 42, 0, 0, 42, 1.6e-4, 1.6e-4), (0.753, 0.753, 44.15, 0.753, 0.753, 44.15, 2.015e-3, 2.015e-3)),
    (84, 11): ((0, 0, 42, 0, 0, 42, 1.97e-4, 1.97e-4), (0.760, 0.762, 44.5, 0.762, 0.760, 44.5, 2.27e-3, 2.27e-3)),
    (28, 3): ((0, 0, 14, 0, 0, 14, 4.8e-4, 4.8e-4), (0.752, 0.752, 14.7, 0.752, 0.752, 14.7, 5.97e-3, 5.97e-3)),
}


class Family(NamedTuple):
    """A distribution of transformations of s x s images."""

    kind: str  # projective or affine
    s: int
    shift: int  # S, corners move by an integer in -S..S (projective)
    shrink: float
    enlarge: float  # scale ~ U(shrink, enlarge)
    rot: float = 180.0  # degrees, the rest are of the affine family
    translate: float = 0.2  # of the side
    shear: float = 30.0  # degrees

    @property
    def dim(self) -> int:
        return 8 if self.kind == "projective" else 6


class Draw(NamedTuple):
    """Transformations of n images: the map for the warp, and what the decoder is asked for. float64, on the CPU."""

    theta: Tensor  # [n, 8] output-to-input coefficients (a, b, c, d, e, f, g, h)
    target: Tensor  # [n, 8] the same, raw (projective), or [n, 6] already normalised parameters (affine)
    corners: Tensor  # [n, 4, 2] where the corners TL, TR, BR, BL of the image appear (projective; else empty)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """[n] float64 in low..high."""
    return low + (high - low) * torch.rand(n, dtype=torch.float64, generator=generator)


def image_corners(s: int) -> Tensor:
    """[4, 2]: TL, TR, BR, BL in pixels."""
    return torch.tensor([[0, 0], [s, 0], [s, s], [0, s]], dtype=torch.float64)


def place_corners(s: int, scale: Tensor, k: Tensor, shift: Tensor) -> Tensor:
    """Corners p [n, 4, 2]: scaled about c = s/2 + 1/2 (the half pixel is the releases'), rotated by k x 90, moved.

    Args:
        scale: [n]; k: [n] in 0..3, clockwise quarter turns; shift: [n, 4, 2] pixels.
    """
    c = s / 2 + 0.5
    p = (image_corners(s) - c) * scale[:, None, None] + c  # [n, 4, 2]
    order = (torch.arange(4) + k[:, None]) % 4  # p_i <- p_{(i + k) mod 4}
    return p.gather(1, order[:, :, None].expand(-1, -1, 2)) + shift


def homography(source: Tensor, destination: Tensor) -> Tensor:
    """theta [n, 8] with u = (ax + by + c)/(gx + hy + 1), v = (dx + ey + f)/(gx + hy + 1) sending source to destination.

    Args: four points each, [n, 4, 2] float64.
    """
    x, y = source.unbind(-1)  # [n, 4]
    u, v = destination.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1)  # [n, 4, 8]
    rows_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1)
    return torch.linalg.solve(torch.cat([rows_u, rows_v], 1), torch.cat([u, v], 1))


def sample_projective(n: int, family: Family, generator: torch.Generator) -> Draw:
    """As AET, AVT and EnAET: scale, quarter turn, an integer shift of each coordinate of each corner."""
    scale = uniform(n, family.shrink, family.enlarge, generator)
    k = torch.randint(4, (n,), generator=generator)
    shift = torch.randint(-family.shift, family.shift + 1, (n, 4, 2), generator=generator).double()
    p = place_corners(family.s, scale, k, shift)
    # From where a corner appears to where it is taken from: output to input, as an image library's warp wants it.
    theta = homography(p, image_corners(family.s).expand(n, -1, -1))
    return Draw(theta, theta, p)


def affine_matrix(s: int, angle: Tensor, shift: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Output-to-input coefficients [n, 8] (g = h = 0) of rotation, shear and scale about c, then a shift.

    The forward linear map is scale * [[cos a, -sin(a + r)], [sin a, cos(a + r)]]: torchvision 0.2's shear convention.

    Args:
        angle, shear: [n] degrees; shift: [n, 2] pixels; scale: [n].
    """
    a, r = torch.deg2rad(angle), torch.deg2rad(shear)
    linear = torch.stack([a.cos(), -(a + r).sin(), a.sin(), (a + r).cos()], -1).view(-1, 2, 2) * scale[:, None, None]
    inverse = torch.linalg.inv(linear)  # [n, 2, 2]
    c = s / 2 + 0.5
    offset = c - (inverse @ (c + shift)[:, :, None]).squeeze(-1)  # [n, 2]
    top, bottom = inverse.unbind(1)
    flat = torch.zeros(len(angle), 2, dtype=inverse.dtype)
    return torch.cat([top, offset[:, :1], bottom, offset[:, 1:], flat], 1)


def sample_affine(n: int, family: Family, generator: torch.Generator) -> Draw:
    """As AET's affine branch; target (cos, sin of the angle, shift / largest shift, scale and shear in -1..1)."""
    angle = uniform(n, -family.rot, family.rot, generator)
    far = family.translate * family.s
    shift = torch.stack([uniform(n, -far, far, generator) for _ in range(2)], 1).round()  # [n, 2]
    scale = uniform(n, family.shrink, family.enlarge, generator)
    shear = uniform(n, -family.shear, family.shear, generator)
    theta = affine_matrix(family.s, angle, shift, scale, shear)
    middle, half = (family.enlarge + family.shrink) / 2, (family.enlarge - family.shrink) / 2
    a = torch.deg2rad(angle)
    parts = [a.cos(), a.sin(), *(shift / (far or 1)).unbind(1), (scale - middle) / (half or 1)]
    target = torch.stack([*parts, shear / (family.shear or 1)], 1)
    return Draw(theta, target, torch.empty(0, 4, 2))


def sample(n: int, family: Family, generator: torch.Generator) -> Draw:
    """n transformations; `generator` is theirs alone, so that nothing else of a run depends on how many are drawn."""
    return (sample_projective if family.kind == "projective" else sample_affine)(n, family, generator)


@cache
def estimate(family: Family, draws: int = 200_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and std [8] of theta under a family, from a fixed seed; a coefficient that never varies gets std 1."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.cat([sample(10_000, family, generator).theta for _ in range(draws // 10_000)])
    std = theta.std(0)
    return theta.mean(0), torch.where(std > 1e-9, std, 1.0)


def normalisation(family: Family, how: str = "table") -> tuple[Tensor, Tensor]:
    """Mean and std [dim] of the targets, float64; `table` falls back to `estimate` where it has no row."""
    if family.kind == "affine":
        return torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    row = TABLE.get((family.s, family.shift))
    if how == "table" and row and (family.shrink, family.enlarge) == (0.8, 1.2):
        return torch.tensor(row[0], dtype=torch.float64), torch.tensor(row[1], dtype=torch.float64)
    return estimate(family)


# --------------------------------------------------------------------------------------------------------------- images
def source_positions(theta: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Where each output pixel is taken from: u, v [n, s, s] in pixels, the map evaluated at pixel centres."""
    at = torch.arange(s, device=theta.device, dtype=theta.dtype) + 0.5
    x, y = at[None, None, :], at[None, :, None]
    a, b, c, d, e, f, g, h = theta[:, :, None, None].unbind(1)  # [n, 1, 1] each
    w = g * x + h * y + 1
    return (a * x + b * y + c) / w, (d * x + e * y + f) / w


def warp(images: Tensor, theta: Tensor, pad: str = "grey") -> Tensor:
    """Bilinear projective warp on the images' device, equal to Pillow's PERSPECTIVE transform.

    As Pillow: a pixel whose source lies inside the image is interpolated with clamped edges, another one is filled,
    and the result is a whole number (truncated), so that the identity gives the image back exactly.

    Args:
        images: [n, 3, s, s] in pixel units 0..255, before any normalisation (else grey would not be grey).
        theta: [n, 8] output to input.
        pad: `grey`, or `reflect` (no border to read the transformation from).

    Returns: [n, 3, s, s] float32.
    """
    s = images.shape[-1]
    u, v = source_positions(theta.to(images.device, torch.float32), s)  # [n, s, s]
    grid = torch.stack([u, v], -1) * (2 / s) - 1  # align_corners False: -1 and 1 are the outer edges
    mode = "border" if pad == "grey" else "reflection"
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode=mode, align_corners=False)
    out = (out + 2e-3).floor().clamp(0, 255)  # bytes, as the releases store them; the little absorbs float32 rounding
    if pad == "grey":
        inside = (u >= 0) & (u < s) & (v >= 0) & (v < s)
        out = torch.where(inside[:, None], out, GREY)
    return out


# -------------------------------------------------------------------------------------------------------------- decoder
class Decoder(nn.Module):
    """D(f, f_t): parameters of the transformation between two images, from the features of both.

    `linear` one layer on the concatenated features (AET); `mlp` one hidden layer; `block` takes the maps of the
    penultimate stage through a stage of its own (EnAET), which leaves the classifier's last stage free of the task.
    `fc2` predicts a log-variance for the variational loss (AVT).
    """

    def __init__(self, kind: str, c: int, dim: int, variational: bool = False, stage: nn.Module | None = None):
        """Args: c, length of f; dim, of the target; stage, newly made like the encoder's last (`block`)."""
        super().__init__()
        self.kind = kind
        hidden = 2 * c
        self.block: nn.Module | None = None
        self.hidden: nn.Module | None = None
        if kind == "block":
            assert stage is not None
            pool = (nn.BatchNorm2d(c), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.block = nn.Sequential(stage, *pool)
        elif kind == "mlp":
            self.hidden = nn.Sequential(nn.Linear(2 * c, c), nn.ReLU())
            hidden = c
        self.fc = nn.Linear(hidden, dim)
        nn.init.zeros_(self.fc.bias)
        self.fc2: nn.Linear | None = None
        if variational:
            self.fc2 = nn.Linear(hidden, dim)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, f: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, C] (maps [B, C', h, w] for `block`) -> estimate [B, dim], raw log-variance [B, dim] or None."""
        if self.block is not None:
            f, f_t = self.block(torch.cat([f, f_t])).chunk(2)
        z = torch.cat([f, f_t], 1)  # [B, 2C]
        if self.hidden is not None:
            z = self.hidden(z)
        return self.fc(z), None if self.fc2 is None else self.fc2(z)


# --------------------------------------------------------------------------------------------------------------- losses
def aet_loss(mu: Tensor, target: Tensor, smooth: bool = False) -> Tensor:
    """Mean over batch and coefficients of (D(f, f_t) - theta)^2; `smooth`: SmoothL1, less moved by heavy tails."""
    return F.smooth_l1_loss(mu, target) if smooth else F.mse_loss(mu, target)


def avt_loss(mu: Tensor, raw: Tensor, target: Tensor, divide: float = 1000.0) -> Tensor:
    """Sum over coefficients, mean over the batch, of v + (mu - theta)^2 / (exp(v) + 1e-4), v = raw / divide.

    A Gaussian's negative log-likelihood without its half and constants (AVT release, cifar/main.py): about `dim`
    times the scale of `aet_loss`.
    """
    v = raw / divide
    return (v + (mu - target).square() / (v.exp() + 1e-4)).sum(1).mean()


def warm(weight: float, progress: float, slope: float) -> float:
    """lambda at this share of the training: min(slope * progress, 1) * weight; slope 0: constant (EnAET: 10)."""
    return weight * min(slope * progress, 1.0) if slope else weight


@cache
def _turns(s: int) -> Tensor:
    """Linear parts (a, b, d, e) [4, 4] of the four quarter turns."""
    k = torch.arange(4)
    p = place_corners(s, torch.ones(4, dtype=torch.float64), k, torch.zeros(4, 4, 2, dtype=torch.float64))
    return homography(p, image_corners(s).expand(4, -1, -1))[:, list(GROUPS["abde"])]


def nearest_turn(theta: Tensor, s: int) -> Tensor:
    """The quarter turn [n] that the linear part of theta [n, 8] (not normalised) is closest to in direction."""
    return (theta[:, list(GROUPS["abde"])].double().cpu() @ _turns(s).T).argmax(1)


@torch.no_grad()
def telemetry(mu: Tensor, target: Tensor, mean: Tensor, std: Tensor, family: Family) -> dict[str, Tensor]:
    """What to watch of a batch [n, dim]: the squared error by group and clipped, and quarter turns told apart (%)."""
    square = (mu - target).float().square()
    out = {"at/clipped": square.clamp(max=1).mean()}
    if family.kind == "projective":
        out |= {f"at/{name}": square[:, list(columns)].mean() for name, columns in GROUPS.items()}
        raw = [x.double().cpu() * std + mean for x in (mu, target)]
        turns = [nearest_turn(x, family.s) for x in raw]
        out["acc/rotation"] = 100 * (turns[0] == turns[1]).float().mean()
    return out


def side_shift(s: int) -> int:
    """S = s/8, and 10 at 84 pixels as anywhere (int)."""
    return int(s / 8)


def chance(target: Tensor) -> float:
    """Squared error of the best constant on these targets [n, dim]: what a decoder that sees nothing reaches."""
    return float((target - target.mean(0)).square().mean())
