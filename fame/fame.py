"""Foreground-background merging (paper section 3, release moco/loader.py): masks from motion and colour, and the merge.

Everything is computed on raw clips in [0, 1], before colour jitter and normalisation, in float32, without gradient.
One mask serves all frames of a clip.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError
from shared_utils.data import mix_key

EPS = 1e-8
MASKS = ("full", "seed", "gauss", "grid", "random", "erase", "none")
FOREGROUND, BACKGROUND = 0.5, 0.1  # shares of the pixels that the two histograms are taken of, whatever beta is


def kernel_size(size: int) -> int:
    """g, the odd width of the Gaussian for clips of `size` pixels: 11 at 112, 23 at 224, 3 at 32."""
    return int(0.1 * size) // 2 * 2 + 1


def blur_matrix(size: int, g: int, sigma: float | Tensor, device: torch.device | None = None) -> Tensor:
    """The Gaussian of `g` taps along one axis as a matrix [size, size] that multiplies a column; reflecting border."""
    at = torch.arange(g, device=device, dtype=torch.float32) - g // 2
    taps = torch.exp(-at.square() / (2 * sigma**2))
    source = torch.arange(size, device=device)[:, None] + torch.arange(g, device=device) - g // 2  # [size, g]
    source = source.abs()
    source = size - 1 - (size - 1 - source).abs()
    matrix = torch.zeros(size, size, device=device)
    return matrix.scatter_add_(1, source, (taps / taps.sum()).expand(size, g))


def blur(x: Tensor, g: int, sigma: float | Tensor) -> Tensor:
    """Gaussian blur of [..., H, W], a product with a matrix on either side; sigma in pixels, one for all."""
    rows, columns = (blur_matrix(n, g, sigma, x.device).to(x.dtype) for n in x.shape[-2:])
    return rows @ x @ columns.T


def stretch(x: Tensor) -> Tensor:
    """Min-max normalisation of each map [B, H, W]: minimum to 0, and divided by (maximum + 1e-8)."""
    x = x - x.amin((1, 2), keepdim=True)
    return x / (x.amax((1, 2), keepdim=True) + EPS)


def largest(x: Tensor, count: int, sign: int = 1) -> Tensor:
    """Indices [B, count] of the largest (sign 1) or smallest (-1) pixels of each map [B, H, W], in no order."""
    return x.flatten(1).topk(count, dim=1, largest=sign > 0, sorted=False).indices


def top_share(x: Tensor, share: float) -> Tensor:
    """Mask [B, H, W] bool with exactly floor(share * H * W) True: the largest pixels of each map."""
    count = int(share * x[0].numel())
    mask = torch.zeros(len(x), x[0].numel(), dtype=torch.bool, device=x.device)
    return mask.scatter_(1, largest(x, count), True).view_as(x)


def motion_and_colour(x: Tensor) -> tuple[Tensor, Tensor]:
    """S_motion [B, H, W], mean over time of the absolute frame differences summed over colours, and the time-mean
    image [B, 3, H, W], of clips [B, 3, T, H, W].

    Frame by frame: a whole clip's differences would be as large as the clip itself, three times over.
    """
    frames = x.unbind(2)  # T times [B, 3, H, W]
    motion, mean = x.new_zeros(len(x), *x.shape[3:]), frames[0].clone()
    for before, after in zip(frames, frames[1:]):
        motion += (before - after).abs_().sum(1)
        mean += after
    return motion.div_(max(1, len(frames) - 1)), mean.div_(len(frames))


def seed_map(motion: Tensor) -> Tensor:
    """Blurred and stretched motion [B, H, W] (steps 2 and 3)."""
    g = kernel_size(motion.shape[-1])
    return stretch(blur(motion, g, g / 3))


def rgb_to_hsv(x: Tensor) -> Tensor:
    """[B, 3, ...] in [0, 1] -> hue in radians 0..2 pi, saturation and value in 0..1 (kornia's convention).

    Saturation is delta / (V + 1e-6); hue is 0 where there is no colour, and the first of equal channels is the largest.
    """
    value, index = x.max(1)
    delta = value - x.amin(1)
    r, g, b = x.unbind(1)
    safe = torch.where(delta == 0, torch.ones_like(delta), delta)
    rc, gc, bc = value - r, value - g, value - b
    sectors = torch.stack([bc - gc, (rc - bc) + 2 * safe, (gc - rc) + 4 * safe]) / safe
    hue = sectors.gather(0, index[None])[0] / 6 % 1
    return torch.stack([2 * math.pi * hue, delta / (value + 1e-6), value], 1)


def colour_ids(image: Tensor, hue: str = "release", bins: int = 10) -> Tensor:
    """Colour id of each pixel of [B, 3, H, W], int64 [B, H, W] in 1..bins^3.

    `release` multiplies the hue, already in radians, by 2 pi once more; `correct` does not.
    """
    h, s, v = rgb_to_hsv(image).unbind(1)
    angle = h * 2 * math.pi if hue == "release" else h
    hx, hy = (s * torch.cos(angle) + 1) / 2, (s * torch.sin(angle) + 1) / 2
    i, j, k = ((z * (bins - 1) + 1).round().long() for z in (hx, hy, v))  # half to even
    return i + bins * (j - 1) + bins**2 * (k - 1)


def soft_foreground(seed: Tensor, ids: Tensor, bins: int = 10, laplace: float = 1.0) -> Tensor:
    """R [B, H, W] in [0, 1): how much more a pixel's colour belongs to F than to G (steps 4 to 7).

    Args:
        seed: the motion map [B, H, W]; F are its largest half, G its smallest tenth.
        ids: colour ids [B, H, W]; laplace: added to every bin of the background's histogram.
    """
    flat = ids.flatten(1)  # [B, H * W]
    size = flat.shape[1]

    def histogram(where: Tensor, start: float) -> Tensor:
        picked = flat.gather(1, where)
        counts = torch.full((len(flat), bins**3 + 1), start, device=seed.device)
        counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=counts.dtype))
        return counts / (counts[:, : bins**3].sum(1, keepdim=True) + EPS)

    fore = histogram(largest(seed, int(FOREGROUND * size)), 0.0).gather(1, flat)
    back = histogram(largest(seed, int(BACKGROUND * size), -1), laplace).gather(1, flat)
    return (fore / (back + fore)).view_as(seed)


def centre_mask(size: int, device: torch.device | None = None) -> Tensor:
    """Soft mask [S, S] of the `gauss` arm: a Gaussian of sigma S / 3 around the centre, 1 at its top (DCLR)."""
    at = torch.arange(size, device=device, dtype=torch.float32) - size // 2
    if size % 2 == 0:
        at += 0.5
    line = torch.exp(-at.square() / (2 * (size / 3) ** 2))
    mask = line[:, None] * line[None]
    return mask / mask.max()


def grid_mask(seed: Tensor, cells: int = 4) -> Tensor:
    """Mask [B, H, W] bool of the `grid` arm: the better half of cells x cells by the sum of the motion map (DCLR)."""
    b, h, w = seed.shape
    scores = F.adaptive_avg_pool2d(seed[:, None], cells)[:, 0]  # [B, cells, cells]
    best = top_share(scores, 0.5)
    rows, columns = torch.arange(h, device=seed.device) * cells // h, torch.arange(w, device=seed.device) * cells // w
    return best[:, rows][:, :, columns]


@torch.no_grad()
def make_mask(
    x: Tensor,
    kind: str = "full",
    beta: float = 0.5,
    hue: str = "release",
    bins: int = 10,
    laplace: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Foreground mask [B, H, W] of raw clips [B, 3, T, H, W] in [0, 1]: bool, or float32 in 0..1 for `gauss`.

    Args:
        kind: `full` (the paper's), or the arms `seed` (motion without the colour step), `gauss`, `grid`, `random`
            (blobs that know nothing of the clip: the top beta of blurred `noise` [B, H, W]).
        beta: share of the pixels that are foreground, exactly floor(beta * H * W) of them.
    """
    size = x.shape[-1]
    if kind == "gauss":
        return centre_mask(size, x.device).expand(len(x), -1, -1)
    if kind == "random":
        if noise is None:
            raise ValueError("the random mask needs noise")
        return top_share(seed_map(noise), beta)
    motion, mean = motion_and_colour(x.float())
    seed = seed_map(motion)
    if kind == "seed":
        return top_share(seed, beta)
    if kind == "grid":
        return grid_mask(seed)
    ids = colour_ids(mean, hue, bins)
    return top_share(seed_map(soft_foreground(seed, ids, bins, laplace)), beta)


def merge(x: Tensor, mask: Tensor, order: Tensor, alpha: float = 1.0) -> Tensor:
    """X'_b = M_b X_b + (1 - M_b) X_order(b) of clips [B, 3, T, H, W], frame by frame (paper equation of the merge).

    Args:
        mask: [B, H, W], bool (pixels are copied, bit for bit) or float32; order: a permutation [B].
        alpha: opacity of the other clip's part: alpha (1 - M) X_order + (1 - alpha + alpha M) X.
    """
    mask = mask[:, None, None]  # [B, 1, 1, H, W]
    if mask.dtype == torch.bool and alpha == 1:
        out = x.index_select(0, order)
        return torch.where(mask, x, out, out=out)
    weight = alpha * (1 - mask.to(x.dtype))
    return weight * x[order] + (1 - weight) * x


def erase(x: Tensor, frame: Tensor, share: Tensor) -> Tensor:
    """Background erasing, the arm of another paper: (1 - l) X + l (one frame of X, repeated).

    Args:
        frame: index of that frame [B]; share: l of each clip [B], the release's line draws it from U(0, 0.3).
    """
    still = x[torch.arange(len(x), device=x.device), :, frame][:, :, None]  # [B, 3, 1, H, W]
    return torch.lerp(x, still, share.view(-1, 1, 1, 1, 1))


class Fame:
    """Mask and merge of a batch; its draws depend on (seed, step, share) alone, not on the device.

    A batch is merged within `shares` equal contiguous parts: one process with N shares draws what N processes draw.
    """

    def __init__(
        self,
        mask: str = "full",
        beta: float = 0.5,
        hue: str = "release",
        bins: int = 10,
        laplace: float = 1.0,
        alpha: float = 1.0,
        seed: int = 0,
    ):
        self.mask, self.beta, self.hue, self.bins, self.laplace = mask, beta, hue, bins, laplace
        self.alpha, self.seed = alpha, seed

    def __call__(self, x: Tensor, step: int, shares: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
        """Merged clips [B, 3, T, H, W] and their masks [B, H, W] (ones where nothing is merged).

        Args:
            step: number of the step; shares: numbers of this batch's parts among those of all processes.
        """
        b, _, t, h, w = x.shape
        part = b // len(shares)
        if self.mask != "none" and part < 2:
            raise UserError(
                f"{part} clip a process (or --bn_splits share): the background comes from another clip of it, so "
                "nothing would be merged; raise --batch_size or lower --bn_splits"
            )
        if self.mask == "none":
            return x, x.new_ones(b, h, w)
        rngs = [torch.Generator().manual_seed(mix_key(self.seed, step, share, 2) >> 1) for share in shares]
        if self.mask == "erase":
            frame = torch.cat([torch.randint(t, (part,), generator=rng) for rng in rngs]).to(x.device)
            share = torch.cat([0.3 * torch.rand(part, generator=rng) for rng in rngs]).to(x.device)
            return erase(x, frame, share), x.new_ones(b, h, w)
        order = torch.cat([torch.randperm(part, generator=rng) + n * part for n, rng in enumerate(rngs)])
        noise = None
        if self.mask == "random":
            noise = torch.cat([torch.rand(part, h, w, generator=rng) for rng in rngs]).to(x.device)
        mask = make_mask(x, self.mask, self.beta, self.hue, self.bins, self.laplace, noise)
        return merge(x, mask, order.to(x.device), self.alpha), mask
