"""What happens to a clip: crop and flip when it is loaded, colours on the device after the merge (release
moco/loader.py).

All frames of a clip share its parameters, and every clip has its own.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from fame.fame import blur, kernel_size, rgb_to_hsv

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # Kinetics
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY, JITTER, BLUR = 0.2, 0.8, 0.5  # probabilities
STRENGTH = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
DRAWS = 7  # uniform numbers a clip: grey, jitter, the four strengths, blur


def as_tensor(frames: np.ndarray) -> Tensor:
    """Frames [T, H, W, 3] uint8 -> clip [3, T, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float().div_(255)


def resize(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, T, H, W] to `size`, bilinear without antialias, as the release's crop does."""
    return F.interpolate(clip, size, mode="bilinear", align_corners=False)


def training_clip(frames: np.ndarray, size: int, min_scale: float = 0.2, flip: float = 0.5) -> Tensor:
    """Random resized crop and flip of frames [T, H, W, 3] uint8 -> [3, T, size, size] in [0, 1]; global generators."""
    shape = torch.empty(1).expand(1, *frames.shape[1:3])
    top, left, h, w = RandomResizedCrop.get_params(shape, [min_scale, 1.0], [3 / 4, 4 / 3])
    clip = resize(as_tensor(frames[:, top : top + h, left : left + w]), (size, size))
    return clip.flip(-1) if float(torch.rand(())) < flip else clip


def testing_clip(frames: np.ndarray, size: int, side: int) -> Tensor:
    """Centre crop [3, T, size, size] in [0, 1] of frames whose short side was brought to `side` (0: as stored)."""
    clip = as_tensor(frames)
    h, w = clip.shape[2:]
    side = side or max(size, min(h, w))  # a frame smaller than the crop has to grow
    if min(h, w) != side:
        clip = resize(clip, (max(side, round(h * side / min(h, w))), max(side, round(w * side / min(h, w)))))
    h, w = clip.shape[2:]
    top, left = round((h - size) / 2), round((w - size) / 2)
    return clip[:, :, top : top + size, left : left + size]


def shrink(frames: np.ndarray, side: int) -> np.ndarray:
    """uint8 frames [T, H, W, 3] with the short side brought down to `side`, antialiased; smaller ones stay."""
    h, w = frames.shape[1:3]
    if min(h, w) <= side:
        return frames
    x = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())  # [T, 3, H, W]
    size = (max(side, round(h * side / min(h, w))), max(side, round(w * side / min(h, w))))
    x = F.interpolate(x.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def draw_sigma(seed: int) -> float:
    """The blur's sigma in pixels ~ U(0.1, 2): one for a whole run, as in the release."""
    return round(0.1 + 1.9 * float(torch.rand((), generator=torch.Generator().manual_seed(seed))), 4)


def normalise(x: Tensor, stats: tuple[tuple[float, ...], tuple[float, ...]] = (MEAN, STD)) -> Tensor:
    """(x - mean) / std of clips [B, 3, T, H, W]."""
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1, 1) for v in stats)
    return (x - mean) / std


def grey(x: Tensor) -> Tensor:
    """Luminance [B, 1, T, H, W] of [B, 3, T, H, W]."""
    return torch.einsum("bcthw,c->bthw", x, x.new_tensor([0.299, 0.587, 0.114]))[:, None]


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """[B, 3, ...] with the hue in radians -> RGB."""
    h, s, v = hsv.unbind(1)
    sector = h * (3 / math.pi)

    def channel(n: int) -> Tensor:
        k = (n + sector) % 6
        return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def _adjust(x: Tensor, which: int, amount: Tensor, formulas: str) -> Tensor:
    """One of brightness, contrast, saturation, hue of clips [n, 3, T, H, W]; `amount` [n] is around 1 (hue: 0)."""
    a = amount.view(-1, 1, 1, 1, 1)
    if which == 0:
        return (x * a if formulas == "torchvision" else x + (a - 1)).clamp(0, 1)
    if which == 1:
        if formulas == "kornia_old":
            return (x * a).clamp(0, 1)
        mean = grey(x).mean((3, 4), keepdim=True)  # of each frame
        return (a * x + (1 - a) * mean).clamp(0, 1)
    if which == 2 and formulas == "torchvision":
        return (a * x + (1 - a) * grey(x)).clamp(0, 1)
    hsv = rgb_to_hsv(x)
    if which == 2:
        hsv[:, 1] = (hsv[:, 1] * a[:, 0]).clamp(0, 1)
    else:
        hsv[:, 0] = (hsv[:, 0] + 2 * math.pi * a[:, 0]) % (2 * math.pi)
    return hsv_to_rgb(hsv)


class Colours:
    """Grey, colour jitter, blur and normalisation of a batch of clips on their device."""

    def __init__(self, size: int, sigma: float | None, formulas: str = "torchvision"):
        """Args: sigma, of the blur, None: no blur (fine-tuning); formulas, `torchvision` or `kornia_old`."""
        self.size, self.sigma, self.formulas = size, sigma, formulas

    @torch.no_grad()
    def __call__(self, x: Tensor, u: Tensor, order: list[int]) -> Tensor:
        """Args: x, raw clips [B, 3, T, H, W], which may be overwritten; u, uniform numbers [B, 7] on the CPU; order of
        brightness 0, contrast 1, saturation 2, hue 3. Returns normalised clips.
        """
        x = x.float()
        for rows in self._rows(u[:, 0] < GREY, x):
            x[rows] = grey(x[rows]).expand(-1, 3, -1, -1, -1)
        for rows in self._rows(u[:, 1] < JITTER, x):
            part = x[rows]
            for which in order:
                amount = (2 * u[rows.cpu(), 2 + which] - 1) * STRENGTH[which] + (which < 3)
                part = _adjust(part, which, amount.to(x.device), self.formulas)
            x[rows] = part
        if self.sigma is None:
            return normalise(x)
        for rows in self._rows(u[:, 6] < BLUR, x):
            x[rows] = blur(x[rows], kernel_size(self.size), self.sigma)
        return normalise(x)

    @staticmethod
    def _rows(chosen: Tensor, x: Tensor) -> list[Tensor]:
        rows = chosen.nonzero()[:, 0]
        return [rows.to(x.device)] if len(rows) else []
