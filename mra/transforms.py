"""Crops, FixMatch's RandAugment, colours and normalisation of an image, by PIL and torchvision.

A PIL image of any size goes in (`Jitter`, `Lighting`: a tensor [3, H, W] in 0..1), a normalised tensor [3, size, size]
comes out. `shared_utils/strong.py` has RandAugment's operations for whole batches.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms as T

from shared_utils.augment import MEAN, STD

STATS = {
    "imagenet": (MEAN, STD),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # pixels in -1..1
}


def fit(size: int) -> Callable[[Image.Image], Image.Image]:
    """Images of that very size as they are, others: shorter side to size * 256 / 224, centre crop."""
    shrink = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])
    return lambda image: image if image.size == (size, size) else shrink(image)


def tensor(stats: str = "imagenet") -> T.Compose:
    return T.Compose([T.ToTensor(), T.Normalize(*STATS[stats])])


def test_transform(size: int, stats: str = "imagenet") -> T.Compose:
    return T.Compose([fit(size), tensor(stats)])


def _enhance(kind: Any) -> Callable[[Image.Image, int], Image.Image]:
    return lambda image, level: kind(image).enhance(0.05 + 0.09 * level)  # 0.14 to 0.86


def _sign() -> int:
    return -1 if random.random() < 0.5 else 1


def _affine(make: Callable[[float, Image.Image], tuple[float, ...]]) -> Callable[[Image.Image, int], Image.Image]:
    """A shift or shear by at most 0.3 of the side, either way; what comes from outside is black."""
    return lambda image, level: image.transform(
        image.size, Image.Transform.AFFINE, make(0.03 * level * _sign(), image), Image.Resampling.NEAREST
    )


# Operations of FixMatch's RandAugment at levels 1 to 9, in the ranges of kekmodel/FixMatch-pytorch.
FIXMATCH_OPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, level: ImageOps.posterize(image, 4 + 4 * level // 10),  # bits: 4 to 7
    "solarize": lambda image, level: ImageOps.solarize(image, 256 - 256 * level // 10),
    "rotate": lambda image, level: image.rotate(3 * level * _sign()),  # degrees
    "shear_x": _affine(lambda v, image: (1, v, 0, 0, 1, 0)),
    "shear_y": _affine(lambda v, image: (1, 0, 0, v, 1, 0)),
    "translate_x": _affine(lambda v, image: (1, 0, int(v * image.width), 0, 1, 0)),
    "translate_y": _affine(lambda v, image: (1, 0, 0, 0, 1, int(v * image.height))),
}


class FixMatchAugment:
    """RandAugment as FixMatch draws it (kekmodel/FixMatch-pytorch, and the TensorFlow release's own with RandAugment).

    Two of the 14 operations, each with a level of its own (1 to 9 of 10) and applied with probability 0.5, so an image
    stays as it is in (0.5 + 0.5 / 14)^2 = 29 % at least. Its Cutout comes after MRA, see main_fixmatch.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        for operation in random.choices(list(FIXMATCH_OPS.values()), k=2):
            level = random.randint(1, 9)
            if random.random() < 0.5:
                image = operation(image, level)
        return image


class Jitter:
    """Brightness, contrast and saturation in random order, each moved by up to `strength` of itself, either way.

    On tensors [3, H, W] in 0..1 and not cut to that range after it, as in CutMix's release.
    """

    def __init__(self, strength: float):
        self.strength = strength

    def __call__(self, x: Tensor) -> Tensor:
        for kind in random.sample(("brightness", "contrast", "saturation"), 3):
            grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)  # [1, H, W]
            other = {"brightness": torch.zeros(()), "contrast": grey.mean(), "saturation": grey}[kind]
            x = x.lerp(other.expand_as(x), random.uniform(-self.strength, self.strength))
        return x


class Lighting:
    """AlexNet's noise along the principal colours of ImageNet: shares ~ N(0, std) of them added to every pixel."""

    VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
    VECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

    def __init__(self, std: float):
        self.std = std

    def __call__(self, x: Tensor) -> Tensor:
        return x + (self.VECTORS @ (self.VALUES * torch.randn(3) * self.std)).view(3, 1, 1)


POLICIES: dict[str, Callable[[], Any] | None] = {
    "none": None, "fixmatch": FixMatchAugment, "randaugment": T.RandAugment, "autoaugment": T.AutoAugment,
    "trivial": T.TrivialAugmentWide,
}  # fmt: skip
PADDINGS = ("reflect", "constant")  # of padded crops; constant: black


def train_transform(
    size: int, crop: str = "resized", policy: str = "none", stats: str = "imagenet", min_scale: float = 0.08,
    padding_mode: str = "reflect", color_jitter: float = 0.0, lighting: float = 0.0,
) -> T.Compose:  # fmt: skip
    """Crop (resized as for ImageNet, padded by size / 8 as for CIFAR), flip, a policy, jitter, lighting, normalise.

    Crop `none`: the middle of the image, not flipped.
    """
    made = POLICIES[policy]
    colours: list[Any] = [Jitter(color_jitter)] if color_jitter else []
    colours += [Lighting(lighting)] if lighting else []
    return T.Compose(
        [
            geometry(size, crop, min_scale, padding_mode=padding_mode),
            *([made()] if made else []),
            T.ToTensor(),
            *colours,
            T.Normalize(*STATS[stats]),
        ]
    )


def geometry(
    size: int, crop: str, min_scale: float = 0.08, bicubic: bool = False, padding_mode: str = "reflect"
) -> T.Compose:
    mode = T.InterpolationMode.BICUBIC if bicubic else T.InterpolationMode.BILINEAR
    if crop == "none":
        return T.Compose([fit(size)])
    if crop == "padded":
        first: list[Any] = [fit(size), T.RandomCrop(size, padding=size // 8, padding_mode=padding_mode)]
    else:
        first = [T.RandomResizedCrop(size, (min_scale, 1.0), interpolation=mode)]
    return T.Compose([*first, T.RandomHorizontalFlip()])
