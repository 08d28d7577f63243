"""What SaGe sees of an image: two unequal views as bytes, scaled to -1..1 on the device; transforms of evaluation."""

import csv
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from shared_utils import UserError, augment, feed
from shared_utils.data import ImageList, Keyed, list_file, per_class, read_text, training_folder
from shared_utils.flags import AUG_BACKEND

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of pretraining: the range of the decoder's tanh


def normalise(x: Tensor) -> Tensor:
    """Bytes [..., 3, H, W] -> -1..1, float32."""
    return (x.float() - 127.5) / 127.5


def denormalise(x: Tensor) -> Tensor:
    """-1..1 -> 0..1, for pictures."""
    return (x.float() / 2 + 0.5).clamp(0, 1)


def as_input(x: Tensor, norm: str) -> Tensor:
    """Images in -1..1 -> what a network of this normalisation takes (`sage.weights.NORMS`)."""
    if norm == "half":
        return x
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (augment.MEAN, augment.STD))
    return ((x + 1) / 2 - mean) / std


class Solarize:
    """Values of 128 and more are inverted."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, 128)


def pipeline(size: int, blur: float, solarize: float, blur_max: float = 2.0) -> Any:
    """One view as bytes [3, size, size] by PIL: the release's `pipeline1` (blur 1, solarize 0), `pipeline2` (.1, .2).

    Args:
        blur, solarize: probabilities. blur_max: largest standard deviation of the blur in pixels.
    """
    from torchvision import transforms as T  # its import costs seconds, and the batched loader needs none of it

    return T.Compose(
        [
            T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([augment.GaussianBlur(0.1, blur_max)], blur),
            T.RandomApply([Solarize()], solarize),
            T.PILToTensor(),
        ]
    )


def recipes(size: int, blur_max: float = 2.0) -> dict[str, augment.Recipe]:
    """The same two views, and the image without augmentation, of the batched loader; bytes."""
    views = {f"x{i + 1}": replace(augment.byol(size, i), sigma=(0.1, blur_max), levels=True) for i in range(2)}
    return views | {"clean": augment.Recipe(size, resize=size, levels=True)}


def _normalised(recipe: augment.Recipe, norm: str) -> augment.Recipe:
    """With ImageNet's mean and standard deviation, or 0.5 and 0.5."""
    return recipe if norm == "imagenet" else replace(recipe, mean=HALF, std=HALF)


def plain(size: int = 224, norm: str = "half", backend: str = AUG_BACKEND) -> augment.Recipe:
    """Evaluation: shorter side to size * 256 / 224, centre crop; -1..1, or as the backbone saw (`norm`)."""
    return _normalised(augment.plain(size, backend), norm)


def linear_train(size: int = 224, norm: str = "half", backend: str = AUG_BACKEND) -> augment.Recipe:
    """Training of a probe and fine-tuning: random resized crop (8 to 100 % of the area), flip, `norm` as in `plain`."""
    return _normalised(augment.linear_train(size, backend), norm)


class Views(Dataset):
    """Item i: {"x1", "x2"} of image i, and {"clean"}, the image without augmentation, where it is asked for; bytes."""

    def __init__(self, images: ImageList, size: int, clean: bool = False, blur_max: float = 2.0):
        self.images, self.size, self.blur_max = images, size, blur_max
        self.recipes = recipes(size, blur_max)  # in the order of their views' numbers
        if not clean:
            del self.recipes["clean"]

    @cached_property
    def pipelines(self) -> dict[str, Any]:
        """The same by PIL."""
        both = {f"x{i + 1}": pipeline(self.size, *p, self.blur_max) for i, p in enumerate(((1.0, 0.0), (0.1, 0.2)))}
        return both | {name: recipe.pil for name, recipe in self.recipes.items() if name not in both}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images.image(index)
        return {name: transform(image) for name, transform in self.pipelines.items()}

    def batch(self, batch: feed.Batch) -> dict[str, Tensor]:
        """The same of a whole batch, [B, 3, S, S] each, draws keyed (see `shared_utils.feed`)."""
        asks = [feed.Ask(batch.indices, recipe, (view,)) for view, recipe in enumerate(self.recipes.values())]
        return {name: views[0] for name, views in zip(self.recipes, batch.render(*asks))}


def drawn(views: Views, indices: Iterable[int], seed: int, backend: str) -> dict[str, Tensor]:
    """What epoch 0 has of these images, bytes [N, 3, S, S] each."""
    keys = [(0, int(i)) for i in indices]
    if backend == "batch":
        return views.batch(feed.Batch(seed, keys, feed.Source(views.images)))
    keyed = Keyed(views, seed)
    return default_collate([keyed[key] for key in keys])


def training_images(data_dir: Path, file: Path | None = None, count: int = 0, cache: bool = False) -> ImageList:
    """The images of `shared_utils.data.training_folder`, the first `count` of each class (0: all), or those that a list
    names (`CLASS/image.jpg` a line, below `data_dir`/train, or below `data_dir` where that is not there).

    UserError for a missing or empty folder, a listed image that is not there, and `count` where there are no classes.
    """
    if not file:
        return training_folder(data_dir, count, cache)
    root = data_dir / "train" if (data_dir / "train").is_dir() or not data_dir.is_dir() else data_dir
    return per_class(list_file(file, root), count, cache)


def attribute_labels(root: Path, images: ImageList) -> dict[str, tuple[Tensor, list[str]]]:
    """Attribute -> labels [N] of `images`, and the values they number, from `root`/attributes.csv.

    Its columns are `path`, relative to root, and the attributes.

    UserError: no such file, no attribute in it, a value that is missing or contradicts another line, or an image that
    it does not name.
    """
    file = root / "attributes.csv"
    text = read_text(file, "a folder with attributes.csv (path and attributes)")
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    head = [word.strip() for word in next(rows, [])]
    names = [name for name in head if name != "path"]
    if not names or "path" not in head:
        raise UserError(f"{file}: must have a column path and at least one attribute")
    by_path: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(rows, 2):
        row = dict(zip(head, (cell.strip() for cell in cells)))
        if not any(row.values()):
            continue
        if len(cells) != len(head) or not all(row.values()):
            raise UserError(f"{file}, line {number}: needs a value for each of {', '.join(head)}")
        path = PurePosixPath(row.pop("path").replace("\\", "/")).as_posix()  # as Windows writes it; ./ is dropped
        if by_path.setdefault(path, row) != row:
            raise UserError(f"{file}, line {number}: {path} has other values than in a line above; keep one")
    try:
        found = [by_path[path.relative_to(root).as_posix()] for path in images.paths()]
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: does not name {error}; it must have a row for every image") from None
    out = {}
    for name in names:
        values = sorted({row[name] for row in by_path.values()})
        out[name] = (torch.tensor([values.index(row[name]) for row in found]), values)
    return out
