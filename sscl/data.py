"""Which images are labelled, what the method sees of each image, and the two streams of a step, labelled and not."""

import argparse
import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from shared_utils import UserError, augment, feed
from shared_utils.augment import Recipe
from shared_utils.data import (
    EpochSampler,
    ImageList,
    flat_folder,
    image_folder,
    mix_key,
    per_class,
    sample_rng,
    training_folder,
)
from shared_utils.evaluation import labelled_indices, open_splits, prepare_data
from shared_utils.run import Run
from shared_utils.strong import augmented, keyed

SPLITS = Path(__file__).resolve().parent / "splits.json"
VIEWS = ("weak", "strong", "key")
STRONG = ("moco", "randaug", "fixmatch")


# ------------------------------------------------------------------------------------------------------ labelled images
class Training(NamedTuple):
    """The images of a run.

    images: all of them, label -1 where nobody knows it; chosen: numbers of those that training has the labels of,
    rising; read: the lists that the checkpoint keeps the hashes of; where: what the preflight says of them.
    """

    images: ImageList
    chosen: list[int]
    read: Sequence[ImageList]
    where: str


def open_training(args: argparse.Namespace) -> Training:
    """The images that the flags name; sets `split_sha256`, which a resume must repeat. UserError: see below."""
    if not args.labelled:
        images = training_images(args.data, args.per_class, args.cache, args.imbalance)
        chosen = labelled_images(args, images)
        where = (
            f"{training_root(args.data)}: {len(images)} images of {len(images.classes)} classes, {len(chosen)} with "
        )
        return Training(images, chosen, [unnamed(images)], f"{where}labels (sha256 {args.split_sha256[:16] or 'none'})")
    known, rest = own_folders(args.labelled, args.unlabelled)
    samples = [*zip(known.paths(), known.labels.tolist()), *((path, -1) for path in rest.paths())]
    chosen = list(range(len(known)))
    args.split_sha256 = split_hash(chosen)
    where = (
        f"{args.labelled}: {len(known)} images of {len(known.classes)} classes, all with labels; {args.unlabelled}: "
    )
    where += f"{len(rest)} more without"
    return Training(ImageList(samples, known.classes, cache=args.cache), chosen, [known, rest], where)


def own_folders(labelled: Path, unlabelled: Path) -> tuple[ImageList, ImageList]:
    """`labelled`/CLASS/*, and what lies anywhere below `unlabelled` and is none of these (it may hold that folder).

    UserError: a folder that is missing or empty, one class alone, nothing without a label.
    """
    known, rest = image_folder(labelled), flat_folder(unlabelled)
    if len(known.classes) < 2:
        raise UserError(f"--labelled {labelled}: one class folder, {known.classes[0]}; give two classes or more")
    own = {os.path.realpath(path) for path in known.paths()}
    names = {os.path.basename(path) for path in own}
    paths = rest.paths()
    more = [i for i, p in enumerate(paths) if p.is_symlink() or p.name in names]  # few: the others are not looked up
    twice = {i for i in more if os.path.realpath(paths[i]) in own}
    if len(twice) == len(rest):
        raise UserError(f"--unlabelled {unlabelled}: holds no image that is not among the labelled ones; add some")
    return known, rest.take([i for i in range(len(rest)) if i not in twice])


def open_evaluation(args: argparse.Namespace, flags: Mapping[str, Any]) -> tuple[ImageList, ImageList]:
    """Training and test images, as `open_splits`; of a run on own folders the labelled ones and those of --val_dir."""
    if not flags.get("labelled"):
        return open_splits(args)
    return labelled_and_tests(args, args.data_dir if "data_dir" in args.given else Path(flags["labelled"]))


def labelled_and_tests(args: argparse.Namespace, labelled: Path) -> tuple[ImageList, ImageList]:
    """The images of `labelled`/CLASS/*, which becomes --data_dir, and those of --val_dir."""
    prepare_data(args)
    if not args.val_dir:
        raise UserError("--val_dir: name a folder of test images in class folders; sscl.predict needs no labels")
    args.data_dir = labelled
    train, val = per_class(image_folder(args.data_dir), args.per_class, args.cache), image_folder(args.val_dir)
    if other := sorted(set(val.classes) ^ set(train.classes)):
        raise UserError(f"{args.val_dir}: its classes are not those of {args.data_dir} (first difference: {other[0]})")
    return train, val


def training_root(root: Path) -> Path:
    """The folder that `training_folder` reads."""
    return root if root.is_dir() and not (root / "train").is_dir() else root / "train"


def training_images(root: Path, count: int = 0, cache: bool = False, imbalance: float = 1.0) -> ImageList:
    """`root`/train, or `root` where it has no train: CLASS/*, the first `count` of each class (0: all), or images
    without labels. With `imbalance` R the c-th class of C keeps the share R^(-c / (C - 1)) of it, so that the last is
    R times smaller than the first.

    UserError for a missing or empty folder.
    """
    images = training_folder(root)
    if imbalance == 1:
        return per_class(images, count, cache)
    labels, kept = images.labels, []
    for c in range(len(images.classes)):
        members = torch.nonzero(labels == c).flatten()[: count or None].tolist()
        kept += members[: max(1, round(len(members) * imbalance ** (-c / max(1, len(images.classes) - 1))))]
    images = images.take(kept)
    return images.cached() if cache else images


def labelled_images(args: argparse.Namespace, images: ImageList) -> list[int]:
    """Numbers of the labelled images, rising; which ones is part of the flags that a resume must repeat."""
    if args.no_labels:
        return []
    if not images.classes:
        raise UserError(
            f"{training_root(args.data)}: images without class folders; give those without labels as --unlabelled and "
            "class folders of a few as --labelled, or --no_labels --lambda_u 0 --calib none"
        )
    if args.labels_per_class and args.split_file:
        raise UserError("--labels_per_class and --split_file exclude each other: both say which images are labelled")
    if args.labels_per_class:
        chosen = label_split(images.labels, args.labels_per_class, args.split)
        counts = torch.bincount(images.labels).tolist()
        check_frozen(counts, args.labels_per_class, args.split, chosen)
    else:
        chosen = labelled_indices(images, args.split_file, args.fraction, training_root(args.data), args.split)
    missing = set(range(len(images.classes))) - {images.label(i) for i in chosen}
    if missing:
        raise UserError(f"class {images.classes[min(missing)]} has no labelled image; every class needs one")
    args.split_sha256 = split_hash(chosen)
    return chosen


def label_split(labels: Tensor, count: int, split: int) -> list[int]:
    """Numbers of `count` labelled images of each class, rising: those with the least hash of (split, class, place).

    Nothing else has an influence, no version of numpy either. Splits are nested: the 4 labels of a class are among the
    25 of the same split. UserError: a class is smaller.
    """
    chosen: list[int] = []
    for c in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == c).flatten().tolist()
        if len(members) < count:
            raise UserError(f"--labels_per_class {count}: class number {c} has {len(members)} images")
        order = sorted(range(len(members)), key=lambda place: mix_key(split, c, place))  # noqa: B023
        chosen += [members[place] for place in order[:count]]
    return sorted(chosen)


def split_hash(chosen: Sequence[int]) -> str:
    """Names a set of labelled images by their numbers."""
    return hashlib.sha256(" ".join(map(str, chosen)).encode()).hexdigest()[:16]


def check_frozen(counts: Sequence[int], labels_per_class: int, split: int, chosen: Sequence[int]) -> bool:
    """Whether splits.json freezes this split; UserError where it does and the draw is another.

    Args:
        counts: images of each class; the file's key is `CLASSESxIMAGES` for classes of one size.
    """
    frozen = json.loads(SPLITS.read_text()).get(f"{len(counts)}x{counts[0]}", {}) if len(set(counts)) == 1 else {}
    known = frozen.get(str(labels_per_class), {}).get(str(split))
    if known and known != split_hash(chosen):
        raise UserError(
            f"split {split} of {labels_per_class} labels a class has the hash {split_hash(chosen)}, {SPLITS} says "
            f"{known}: the drawing or the file was changed; restore it, or give the list as --split_file"
        )
    return known is not None


# ---------------------------------------------------------------------------------------------------------------- views
def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # nearest pixel, black outside


# Image, level in 0..1, sign -> image; the pool of the FixMatch release, whose `m` of 10 is the level.
POOL: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda x, level, sign: x,
    "autocontrast": lambda x, level, sign: ImageOps.autocontrast(x),
    "equalize": lambda x, level, sign: ImageOps.equalize(x),
    "brightness": lambda x, level, sign: ImageEnhance.Brightness(x).enhance(0.05 + 0.9 * level),
    "color": lambda x, level, sign: ImageEnhance.Color(x).enhance(0.05 + 0.9 * level),
    "contrast": lambda x, level, sign: ImageEnhance.Contrast(x).enhance(0.05 + 0.9 * level),
    "sharpness": lambda x, level, sign: ImageEnhance.Sharpness(x).enhance(0.05 + 0.9 * level),
    "posterize": lambda x, level, sign: ImageOps.posterize(x, 4 + int(4 * level)),
    "solarize": lambda x, level, sign: ImageOps.solarize(x, 256 - int(256 * level)),
    "rotate": lambda x, level, sign: x.rotate(sign * int(30 * level)),
    "shear_x": lambda x, level, sign: _affine(x, 1, sign * 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda x, level, sign: _affine(x, 1, 0, 0, sign * 0.3 * level, 1, 0),
    "translate_x": lambda x, level, sign: _affine(x, 1, 0, int(sign * 0.3 * level * x.width), 0, 1, 0),
    "translate_y": lambda x, level, sign: _affine(x, 1, 0, 0, 0, 1, int(sign * 0.3 * level * x.height)),
}


@dataclass(frozen=True)
class FixMatchAugment:
    """RandAugment as FixMatch has it, and Cutout: `n` operations of POOL with repetition, each with probability 1/2 and
    at a magnitude drawn from 1..m-1 of 10; then always a grey box of half the side (release of FixMatch, `RA`)."""

    n: int = 2
    m: int = 10

    def __call__(self, image: Image.Image) -> Image.Image:
        for name in random.choices(list(POOL), k=self.n):
            level, sign = random.randrange(1, self.m) / 10, random.choice((-1, 1))
            if random.random() < 0.5:
                image = POOL[name](image, level, sign)
        return self.cutout(image)

    @staticmethod
    def cutout(image: Image.Image) -> Image.Image:
        """A box around a pixel drawn anywhere; what lies left of or above the image is not cut off, but moved in."""
        side = image.width // 2
        low = [int(max(0.0, random.uniform(0, extent) - side / 2)) for extent in image.size]
        high = [min(extent - 1, at + side - 1) for at, extent in zip(low, image.size)]
        image = image.copy()
        ImageDraw.Draw(image).rectangle((*low, *high), (127, 127, 127))
        return image


@dataclass(frozen=True)
class Strengthened:
    """The weak view, then `FixMatchAugment`: of one PIL image, or of the bytes of a batch of weak views."""

    weak: Recipe

    @property
    def bytes(self) -> Recipe:
        """What `batch` begins with."""
        return replace(self.weak, levels=True)

    @cached_property
    def pil(self) -> T.Compose:
        *geometry, tensor, norm = self.weak.transforms
        return T.Compose([*geometry, FixMatchAugment(), tensor, norm])

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pil(image)

    def batch(self, x: Tensor, u: np.ndarray) -> Tensor:
        """Weak views uint8 [B, 3, S, S] and numbers in 0..1 [B, 10] -> normalised views: 4 numbers for each of the two
        operations, 2 for the place of the box."""
        x = augmented(x, keyed(u[:, :8]))
        size = x.shape[-1]
        low = torch.from_numpy((u[:, 8:] * size - size // 2 / 2).clip(0).astype(np.int64)).to(x.device)  # [B, 2]
        at = torch.arange(size, device=x.device) - low[:, :, None]  # [B, 2, S]
        inside = (at >= 0) & (at < size // 2)
        box = inside[:, 0, :, None] & inside[:, 1, None, :]  # [B, S, S]
        x = torch.where(box[:, None], 127, x)
        return augment.normalise(x.permute(0, 2, 3, 1).contiguous(), self.weak)


def augmentations(size: int, weak: str, strong: str, flip: bool = True, min_scale: float = 0.2) -> dict[str, Any]:
    """{"weak", "strong"} of a PIL image; all but `randaug` also of batches.

    weak: `rrc` random resized crop and flip, `shift` translation by up to an eighth and flip (small images).
    strong: `moco` MoCo v2's, `randaug` the weak one with torchvision's RandAugment(2, 10), always and at that
    magnitude, `fixmatch` the weak one with `FixMatchAugment`.
    """
    crops = {
        "rrc": Recipe(size, (min_scale, 1.0), flip_p=0.5 * flip),
        "shift": Recipe(size, resize=size, pad=max(1, size // 8), flip_p=0.5 * flip),
    }
    *geometry, tensor, norm = crops[weak].transforms
    views = {
        "moco": lambda: replace(augment.moco_v2(size, min_scale), flip_p=0.5 * flip),
        "randaug": lambda: T.Compose([*geometry, T.RandAugment(2, 10), tensor, norm]),
        "fixmatch": lambda: Strengthened(crops[weak]),
    }
    return {"weak": crops[weak], "strong": views[strong]()}


def unnamed(images: ImageList) -> ImageList:
    """The same images, without their labels and transform."""
    images = images.take(slice(None), torch.full((len(images),), -1))
    images.classes, images.transform = [], None
    return images


class HiddenLabels(RuntimeError):
    """Somebody asked for the labels of unlabelled images."""


class Unlabelled(Dataset):
    """Item i: the views of image i that are asked for, and its number. It holds no label, and asking for one raises.

    Args:
        views: of weak, strong, key; the key view is a second strong one, or with `key_view` `weak` the weak one,
            which is then not handed out a second time.
    """

    def __init__(self, images: ImageList, recipes: Mapping[str, Any], views: Sequence[str], key_view: str = "strong"):
        self.images = unnamed(images)
        self.recipes, self.views, self.key_view = recipes, views, key_view

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> Tensor:
        raise HiddenLabels("the labels of unlabelled images are hidden from training")

    labels = targets

    def made(self) -> dict[str, str]:
        """{view: whose recipe}, of the views that are made: a key view that is the weak one is not made twice."""
        own = {name: self.key_view if name == "key" else name for name in self.views}
        if own.get("key") == "weak" and "weak" in own:
            del own["key"]
        return own

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.views:
            return {"index": index}
        image = self.images.image(index)
        made = sorted(self.made().items(), key=lambda pair: pair[0] == "key")  # the key view is drawn last
        return {**{name: self.recipes[recipe](image) for name, recipe in made}, "index": index}

    def batch(self, batch: feed.Batch) -> dict[str, Tensor]:
        """The same of a whole batch, [B, 3, H, W] each, draws keyed (see `shared_utils.feed`)."""
        out: dict[str, Tensor] = {"index": torch.from_numpy(batch.indices.copy())}
        recipes = {name: self.recipes[recipe] for name, recipe in self.made().items()}
        asks = [
            feed.Ask(batch.indices, getattr(how, "bytes", how), (VIEWS.index(name),)) for name, how in recipes.items()
        ]
        for (name, how), views in zip(recipes.items(), batch.render(*asks)):
            numbers = batch.uniform(1 + VIEWS.index(name), 10)
            out[name] = how.batch(views[0], numbers) if isinstance(how, Strengthened) else views[0]
        return out


class Labelled(Dataset):
    """Item j: the weak view of the j-th labelled image, its label, and its number among all images."""

    def __init__(self, images: ImageList, chosen: Sequence[int], transform: Callable):
        self.images, self.chosen, self.transform = images, torch.tensor(chosen), transform
        self.labels = torch.tensor([images.label(i) for i in chosen])

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, j: int) -> tuple[Tensor, int, int]:
        index = int(self.chosen[j])
        return self.transform(self.images.image(index)), int(self.labels[j]), index

    def batch(self, batch: feed.Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a whole batch: [B, 3, H, W], [B] and [B]."""
        rows = self.chosen[torch.from_numpy(batch.indices)]
        (views,) = batch.render(feed.Ask(rows.numpy(), self.transform, (0,)))
        return views[0], self.labels[batch.indices], rows


class Mixed(ImageList):
    """Item j: lam_j x + (1 - lam_j) u, a labelled and an unlabelled image, with -1 and j as `features` expects.

    lam ~ Beta(alpha, alpha) and the partner, of the class that the unlabelled image is near to, come from `key`.
    """

    def __init__(
        self, images: ImageList, transform: Callable, chosen: Tensor, labelled: Tensor, labels: Tensor, *key: int,
        alpha: float = 1.0,
    ):  # fmt: skip
        """Args: chosen, numbers [C, n]; labelled, numbers [L] of the images with classes `labels` [L]."""
        super().__init__([], images.classes, transform)
        self.images, self.mix, self.key = images, transform, key
        rng = np.random.Generator(np.random.PCG64(mix_key(*key)))
        by_class = [labelled[labels == c].numpy() for c in range(len(chosen))]
        there = [c for c, members in enumerate(by_class) if len(members)]
        self.classes_of = torch.tensor(there).repeat_interleave(chosen.shape[1])  # [J], the class of each mixture
        self.unlabelled = chosen[there].flatten()  # [J]
        partners = [rng.choice(by_class[c], chosen.shape[1]) for c in there]
        self.labelled = torch.from_numpy(np.concatenate(partners))
        self.lam = rng.beta(alpha, alpha, len(self.labelled))

    def __len__(self) -> int:
        return len(self.unlabelled)

    def __getitem__(self, j: int) -> tuple[Tensor, int, int]:
        with sample_rng(*self.key, j):
            x = self.mix(self.images.image(int(self.labelled[j])))
            u = self.mix(self.images.image(int(self.unlabelled[j])))
        lam = float(self.lam[j])
        return lam * x + (1 - lam) * u, -1, j


# ------------------------------------------------------------------------------------------------------------- samplers
class LabelledStream(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, j), as many as the unlabelled epochs ask for: one place after another of an infinite sequence.

    Balanced: every C places hold each class once, in an order drawn for that round, and a class goes through its images
    in a new order at each pass. Otherwise every L places are a permutation of the labelled images. A place depends on
    (seed, n) alone, so a resume needs no state; the pass makes the key of the view's randomness unique.
    """

    def __init__(
        self, labels: Tensor, batch_size: int, steps_per_epoch: int, seed: int, rank: int = 0, world: int = 1,
        balanced: bool = True,
    ):  # fmt: skip
        self.members = [torch.nonzero(labels == c).flatten().numpy() for c in labels.unique().tolist()]
        self.everything = np.arange(len(labels))
        self.batch_size, self.steps_per_epoch, self.seed = batch_size, steps_per_epoch, seed
        self.rank, self.world, self.balanced = rank, world, balanced
        self.epoch, self.start = 0, 0
        self._permutation = functools.lru_cache(4096)(self._drawn)  # a permutation serves many places

    def __len__(self) -> int:
        return self.steps_per_epoch - self.start

    def at(self, epoch: int, step: int = 0) -> "LabelledStream":
        self.epoch, self.start = epoch, step
        return self

    def _drawn(self, size: int, *key: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(mix_key(self.seed, *key))).permutation(size)

    def place(self, n: int) -> tuple[int, int]:
        """(pass, j) at place n of the sequence."""
        if self.balanced:
            turn, slot = divmod(n, len(self.members))
            c = int(self._permutation(len(self.members), 0, turn)[slot])
            members = self.members[c]
        else:
            turn, c, members = n, -1, self.everything
        lap, at = divmod(turn, len(members))
        return lap, int(members[self._permutation(len(members), 1, c, lap)[at]])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps_per_epoch):
            batch = (self.epoch * self.steps_per_epoch + step) * self.world + self.rank
            yield [self.place(batch * self.batch_size + i) for i in range(self.batch_size)]


class Pairs:
    """Loader and sampler of both streams: batches (unlabelled, labelled), the latter None where there are no labels.

    As `EpochSampler` it starts inside an epoch with `at`; an epoch is one of the unlabelled images.
    """

    def __init__(self, unlabelled: DataLoader, epochs: EpochSampler, labelled: DataLoader | None, stream: Any):
        self.unlabelled, self.epochs, self.labelled, self.stream = unlabelled, epochs, labelled, stream
        self.steps_per_epoch = epochs.steps_per_epoch

    def at(self, epoch: int, step: int = 0) -> "Pairs":
        self.epochs.at(epoch, step)
        if self.stream is not None:
            self.stream.at(epoch, step)
        return self

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if self.labelled is None:
            return ((batch, None) for batch in self.unlabelled)
        return zip(self.unlabelled, self.labelled, strict=True)


def open_streams(
    run: Run, images: ImageList, chosen: Sequence[int], views: Sequence[str]
) -> tuple[Unlabelled, Labelled | None, Any]:
    """All images without labels, those of the numbers `chosen` with theirs, and the `Pairs` of both streams."""
    args, local = run.args, run.args.batch_labelled // run.world
    recipes = augmentations(args.img_size, args.weak, args.strong, not args.no_flip, args.min_scale)
    unlabelled = Unlabelled(images, recipes, views, args.key_view)
    unlabelled.images.transform = augment.plain(args.img_size, args.aug_backend)  # for the prototypes
    epochs = EpochSampler(len(unlabelled), args.mu * local, args.seed, run.rank, run.world)
    loader = run.loader(feed.keyed(unlabelled, args.seed, args.aug_backend, run.device), epochs)
    if not chosen:
        return unlabelled, None, Pairs(loader, epochs, None, None)
    labelled = Labelled(images, chosen, recipes["weak"])
    balanced = args.balanced == "on"
    stream: Any = LabelledStream(
        labelled.labels, local, epochs.steps_per_epoch, args.seed, run.rank, run.world, balanced
    )
    own = run.loader(feed.keyed(labelled, mix_key(args.seed, 1), args.aug_backend, run.device), stream)
    return unlabelled, labelled, Pairs(loader, epochs, own, stream)
