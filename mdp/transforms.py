"""Two independent augmentations of an image with its label map (paper 2106.04121; recipes [inferred]).

`moco` is MoCo v2's recipe, `mmseg` mmsegmentation's training pipeline. A label goes through the geometry of its own
view, with nearest neighbours. Crop and resize come first and in one PIL call, so that the colour operations only see
`crop_size` pixels. All randomness comes from the global python, numpy and torch generators (`shared_utils.data.Keyed`).
"""

import random

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, RGB in 0..255
IGNORE = 255
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the source
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
AUGMENTATIONS = ("moco", "mmseg")

_SCALE = torch.tensor(STD).reciprocal()[:, None, None]
_SHIFT = (-torch.tensor(MEAN) / torch.tensor(STD))[:, None, None]


def normalise(image: Image.Image) -> Tensor:
    """RGB image [H, W] -> float [3, H, W], (x - mean) / std with the ImageNet statistics."""
    return torch.addcmul(_SHIFT, F.pil_to_tensor(image).float(), _SCALE)


def label_tensor(label: Image.Image) -> Tensor:
    """Mode L label map [H, W] -> uint8 [H, W]."""
    return torch.from_numpy(np.array(label))


def flip_both(image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Mirror both left to right with probability 0.5."""
    if random.random() < 0.5:
        return F.horizontal_flip(image), F.horizontal_flip(label)
    return image, label


class MoCoView:
    """A view by MoCo v2's recipe: crop of scale 0.2-1, flip, jitter, grey, blur; float [3, s, s], uint8 [s, s]."""

    def __init__(self, crop_size: int):
        self.size = crop_size
        self.jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)

    def geometry(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        """The same random box and flip for both."""
        top, left, h, w = RandomResizedCrop.get_params(image, scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3])  # type: ignore[arg-type]
        box, size = (left, top, left + w, top + h), (self.size, self.size)
        return flip_both(image.resize(size, BILINEAR, box=box), label.resize(size, NEAREST, box=box))

    def colour(self, image: Image.Image) -> Image.Image:
        """Colour jitter (p 0.8), grey (p 0.2), Gaussian blur with sigma 0.1-2 (p 0.5), in this order."""
        image = self.jitter(image)
        if random.random() < 0.2:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return image

    def __call__(self, image: Image.Image, label: Image.Image) -> tuple[Tensor, Tensor]:
        image, label = self.geometry(image, label)
        return normalise(self.colour(image)), label_tensor(label)


class MmsegView:
    """A view by mmsegmentation's recipe: resize ratio 0.5-2, crop, cat_max_ratio 0.75, flip, photometric distortion.

    The resize is around (4 s, s) keeping the aspect, as mmsegmentation's (2048, 512) at crop 512. A crop that the image
    does not fill is padded at the right and at the bottom: 0 after normalisation, label 255.
    """

    def __init__(self, crop_size: int, ratio: tuple[float, float] = (0.5, 2.0), cat_max_ratio: float = 0.75):
        self.size, self.ratio, self.cat_max_ratio = crop_size, ratio, cat_max_ratio

    def geometry(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        """The same random box and flip for both; only the crop is resampled, not the enlarged image around it."""
        s, (w, h) = self.size, image.size
        factor = random.uniform(*self.ratio) * min(4 * s / max(w, h), s / min(w, h))
        new_w, new_h = max(1, round(w * factor)), max(1, round(h * factor))
        size = (min(s, new_w), min(s, new_h))
        for _ in range(11):  # the first crop and up to 10 more, the last one taken as it is
            left, top = random.randint(0, new_w - size[0]), random.randint(0, new_h - size[1])
            box = _box(left, top, size, (w / new_w, h / new_h), (w, h))
            cropped = label.resize(size, NEAREST, box=box)
            counts = np.bincount(np.asarray(cropped).ravel(), minlength=256)[:IGNORE]
            if np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return flip_both(image.resize(size, BILINEAR, box=box), cropped)

    def colour(self, image: Image.Image) -> Image.Image:
        """Brightness +-32, contrast and saturation 0.5-1.5, hue +-18 of 180, each with probability 0.5."""
        image = _levels(image, shift=random.uniform(-32, 32) if _coin() else 0.0)
        contrast_first = _coin()
        contrast = random.uniform(0.5, 1.5) if _coin() else 1.0
        saturation = random.uniform(0.5, 1.5) if _coin() else 1.0
        hue = random.randint(-18, 17) if _coin() else 0
        if contrast_first:
            image = _levels(image, gain=contrast)
        if saturation != 1.0 or hue:
            x = np.arange(256)
            turned = (x + round(hue * 256 / 180)) % 256  # PIL's hue circle has 256 steps
            table = [turned, np.clip(x * saturation, 0, 255).astype(int), x]
            image = image.convert("HSV").point(np.concatenate(table).tolist()).convert("RGB")
        return image if contrast_first else _levels(image, gain=contrast)

    def __call__(self, image: Image.Image, label: Image.Image) -> tuple[Tensor, Tensor]:
        image, label = self.geometry(image, label)
        padding = (0, self.size - image.width, 0, self.size - image.height)  # left, right, top, bottom
        view = torch.nn.functional.pad(normalise(self.colour(image)), padding, value=0.0)
        return view, torch.nn.functional.pad(label_tensor(label), padding, value=IGNORE)


def _box(left: int, top: int, size: tuple[int, int], step: tuple[float, float], limit: tuple[int, int]) -> Box:
    """A crop of `size` in the resized image -> its box in the source, whose pixels are `step` apart."""
    right, bottom = (left + size[0]) * step[0], (top + size[1]) * step[1]
    return (
        left * step[0],
        top * step[1],
        min(right, limit[0]),
        min(bottom, limit[1]),
    )  # rounding must not leave the image


def _levels(image: Image.Image, gain: float = 1.0, shift: float = 0.0) -> Image.Image:
    """clip(gain x + shift, 0, 255) on every channel, through a table of 256 entries."""
    if gain == 1.0 and shift == 0.0:
        return image
    return image.point(np.clip(np.arange(256) * gain + shift, 0, 255).astype(int).tolist() * 3)


def _coin() -> bool:
    return random.random() < 0.5


class TwoViews:
    """(image, label map in mode L) -> q, q_label, k, k_label: float [3, s, s], uint8 [s, s] local ids, 255 = ignore."""

    def __init__(self, aug: str = "moco", crop_size: int = 224):
        if aug not in AUGMENTATIONS:
            raise ValueError(f"aug must be one of {', '.join(AUGMENTATIONS)}, not {aug!r}")
        self.view = MoCoView(crop_size) if aug == "moco" else MmsegView(crop_size)

    def __call__(self, image: Image.Image, label: Image.Image) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*self.view(image, label), *self.view(image, label))
