"""Image pipelines that several papers share: MoCo's augmentations, ImageNet's evaluation and linear-probe transforms.

All take a PIL image and give a normalised tensor [3, size, size]; randomness comes from the global generators
(`shared_utils.data.Keyed` seeds them for each sample).
"""

import random

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as T

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GaussianBlur:
    """Blur of radius ~ U(low, high) pixels, as in SimCLR and MoCo v2."""

    def __init__(self, low: float = 0.1, high: float = 2.0):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def _tensor(*steps: object) -> T.Compose:
    return T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])


def moco_v2(size: int = 224, min_scale: float = 0.2) -> T.Compose:
    """MoCo v2: crop, colour jitter, grey, blur, flip."""
    return _tensor(
        T.RandomResizedCrop(size, (min_scale, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([GaussianBlur()], 0.5),
        T.RandomHorizontalFlip(),
    )


def moco_v1(size: int = 224, min_scale: float = 0.2) -> T.Compose:
    """MoCo v1, that is InstDisc: crop, grey, colour jitter, flip."""
    return _tensor(
        T.RandomResizedCrop(size, (min_scale, 1.0)),
        T.RandomGrayscale(0.2),
        T.ColorJitter(0.4, 0.4, 0.4, 0.4),
        T.RandomHorizontalFlip(),
    )


def plain(size: int = 224) -> T.Compose:
    """Evaluation: shorter side to size * 256 / 224, centre crop."""
    return _tensor(T.Resize(round(size * 256 / 224)), T.CenterCrop(size))


def linear_train(size: int = 224) -> T.Compose:
    """Training of a linear probe, and fine-tuning: random resized crop (8 to 100% of the area) and flip."""
    return _tensor(T.RandomResizedCrop(size), T.RandomHorizontalFlip())


def denormalise(x: Tensor) -> Tensor:
    """[..., 3, H, W] back to 0..1, for pictures."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x.float() * std + mean).clamp(0, 1)
