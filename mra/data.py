"""The data sets of the jobs in their public layouts, few labels, long tails, batches made on the device.

folder      DIR/train/CLASS/*, DIR/val/CLASS/* (or test/), others by --tests; DIR/masks/SPLIT/CLASS/*.png if there are;
            or images of your own, DIR/CLASS/* (the autoencoder: DIR/**/*); tests by --val_dir or --holdout
cifar10/100 DIR/cifar-10-batches-py, DIR/cifar-100-python
stl10       DIR/stl10_binary
cub         DIR/CUB_200_2011/{images,images.txt,image_class_labels.txt,train_test_split.txt,bounding_boxes.txt}
aircraft    DIR/fgvc-aircraft-2013b/data/{images,images_variant_trainval.txt,images_variant_test.txt}
cars        DIR/stanford_cars/{cars_train,cars_test}/*.jpg and devkit/{cars_train_annos,cars_test_annos_withlabels}.mat
"""

import argparse
import csv
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision import datasets

from mra.transforms import STATS, fit
from shared_utils import UserError
from shared_utils.augment import MEAN, STD
from shared_utils.data import (
    EXTENSIONS,
    ArrayImages,
    EpochSampler,
    ImageList,
    flat_folder,
    image_folder,
    is_helper,
    list_file,
    load_image,
    mix_key,
    read_mat,
    read_text,
    training_folder,
)
from shared_utils.evaluation import subset
from shared_utils.flags import natural, positive

SETS = ("folder", "cifar10", "cifar100", "stl10", "cub", "aircraft", "cars")
UNTESTED = "none: give --val_dir, or --holdout 0.2"


def add_data_flags(p: argparse.ArgumentParser, size: int | None = None) -> None:
    """`size`: default of --input_size; None: that of the autoencoder, see `mra.build`."""
    a = p.add_argument
    a("--data_path", "--data_dir", type=Path, default=Path(os.environ.get("DATA_ROOT", "data")), help="see mra/data.py")
    a("--dataset", choices=SETS, default="folder", help="layout of --data_path")
    a("--input_size", "--img_size", type=positive, default=size, help="pixels"
      + "; default: the autoencoder's, else 224" * (size is None))  # fmt: skip
    a("--cache", action="store_true", help="decode all images once and keep them in memory")


def add_holdout_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--holdout", type=float, default=0.0, help="share of each class folder that is kept from training, "
      "for the test, where no test images are there: always the same images")  # fmt: skip


def add_label_flags(p: argparse.ArgumentParser) -> None:
    """What the labelled images are, for training scripts."""
    a = p.add_argument
    a("--tests", default="", help="test folders with commas (default: val, or test); the first is the one that counts")
    a(
        "--val_dir",
        type=Path,
        help="folder of test images, with the classes of training; default: val below --data_path",
    )
    add_holdout_flag(p)
    a("--per_class", type=natural, default=0, help="labelled images of each class, drawn by --label_seed; 0: all")
    a("--label_seed", type=natural, default=0, help="which images are labelled; for stl10 with folds: the fold, 0 to 9")
    a("--imbalance", type=float, default=0, help="long tail: the largest class over the smallest; 0: as it is")
    a("--train_list", type=Path, help="lists of ImageNet-LT, `train/CLASS/image.jpg LABEL` a line, below --data_path")
    a("--val_list", type=Path)
    a("--mean_std", choices=list(STATS), default="imagenet", help="what the classifier's input is normalised with")


# -------------------------------------------------------------------------------------------------------------- readers
class Sets(NamedTuple):
    train: ImageList
    tests: dict[str, ImageList]  # the first counts


def _need(file: Path, what: str) -> Path:
    if not file.exists():
        raise UserError(f"{file}: no such file; expected {what}")
    return file


def _lines(file: Path, what: str) -> list[str]:
    """Lines that are not empty. UserError: one is there twice."""
    lines = [line.strip() for line in read_text(file, what).splitlines() if line.strip()]
    if len(set(lines)) < len(lines):
        twice = Counter(lines).most_common(1)[0][0]
        raise UserError(f"{file}: {twice!r} is there twice; restore the list from the set's archive")
    return lines


def _numbered(file: Path, what: str) -> dict[str, str]:
    """Number -> the rest of its line. UserError: a number that is there twice."""
    pairs = [line.split(None, 1) for line in _lines(file, what)]
    if twice := [number for number, times in Counter(pair[0] for pair in pairs).items() if times > 1]:
        raise UserError(f"{file}: number {twice[0]} is there twice; restore the list from the set's archive")
    return dict(pairs)


def _cub(root: Path) -> Sets:
    what = "CUB_200_2011 as published (images.txt, image_class_labels.txt, train_test_split.txt, images/)"
    files = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    names, labels, splits, titles = (_numbered(root / file, what) for file in files)
    for file, found in zip(files[1:], (labels, splits)):
        if other := sorted(set(found) ^ set(names)):
            raise UserError(f"{root}: images.txt and {file} do not both name image {other[0]}; restore them")
    numbers = [str(y) for y in range(1, 1 + len(titles))]
    if set(titles) != set(numbers):
        raise UserError(f"{root}/classes.txt: does not number its classes from 1 to {len(titles)}; restore it")
    classes = [titles[y] for y in numbers]  # in any order there
    parts: dict[str, list[tuple[Path, int]]] = {"1": [], "0": []}
    for key, name in names.items():
        parts[splits[key]].append((_need(root / "images" / name, what), int(labels[key]) - 1))
    return Sets(ImageList(parts["1"], classes), {"test": ImageList(parts["0"], classes)})


def _aircraft(root: Path) -> Sets:
    what = "fgvc-aircraft-2013b/data as published (variants.txt, images_variant_*.txt, images/)"
    classes = _lines(root / "variants.txt", what)
    index = {name: y for y, name in enumerate(classes)}
    parts = []
    for split in ("trainval", "test"):
        pairs = _numbered(root / f"images_variant_{split}.txt", what)
        parts.append([(_need(root / "images" / f"{key}.jpg", what), index[name]) for key, name in pairs.items()])
    return Sets(ImageList(parts[0], classes), {"test": ImageList(parts[1], classes)})


def _cars(root: Path) -> Sets:
    what = "stanford_cars as published (cars_train/, cars_test/, devkit/*.mat)"
    meta = read_mat(root / "devkit/cars_meta.mat", what)
    classes = [str(name) for name in meta["class_names"]]
    parts = []
    for folder, annos in (("cars_train", "cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        rows = read_mat(root / "devkit" / f"{annos}.mat", what)["annotations"]
        parts.append(
            [(_need(root / folder / str(row["fname"]), what), int(row["class"]) - 1) for row in np.atleast_1d(rows)]
        )
    return Sets(ImageList(parts[0], classes), {"test": ImageList(parts[1], classes)})


FINE: dict[str, tuple[Callable[[Path], Sets], str]] = {
    "cub": (_cub, "CUB_200_2011"),
    "aircraft": (_aircraft, "fgvc-aircraft-2013b/data"),
    "cars": (_cars, "stanford_cars"),
}


def _check_labels(root: Path, sets: Sets) -> None:
    """UserError: an empty split, a label out of range, an image that is listed twice."""
    for name, images in {"train": sets.train, **sets.tests}.items():
        if not len(images):
            raise UserError(f"{root}: its lists name no {name} image; restore them from the set's archive")
        wrong = torch.nonzero((images.labels < 0) | (images.labels >= len(images.classes))).flatten().tolist()
        if wrong:
            name, y = images.path(wrong[0]).name, images.label(wrong[0])
            raise UserError(f"{root}: {name} has label {y + 1} of {len(images.classes)} classes")
    every = Counter(path for images in (sets.train, *sets.tests.values()) for path in images.paths())
    if twice := [path for path, times in every.items() if times > 1]:
        raise UserError(f"{root}: its lists name {twice[0].name} twice; restore them from the set's archive")


def _published(args: argparse.Namespace) -> Sets:
    """torchvision's files: CIFAR, STL-10 (with --per_class 100: the official fold --label_seed of 1,000 labels)."""
    kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[args.dataset]
    try:
        if args.dataset == "stl10":
            fold = getattr(args, "label_seed", 0) % 10 if getattr(args, "per_class", 0) == 100 else None
            found = [kind(str(args.data_path), split, folds=f) for split, f in (("train", fold), ("test", None))]
            arrays = [(d.data.transpose(0, 2, 3, 1), d.labels) for d in found]
        else:
            found = [kind(str(args.data_path), train=train) for train in (True, False)]
            arrays = [(d.data, d.targets) for d in found]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{args.data_path}: {args.dataset} not found or damaged ({' '.join(str(error).split())[:80]}); unpack its "
            "public files there"
        ) from None
    train, test = (ArrayImages(x, [int(label) for label in y], list(found[0].classes)) for x, y in arrays)
    return Sets(train, {"test": test})


def training_root(root: Path, tests: str = "") -> Path:
    """`root`/train, or `root` itself. UserError: test images are here, and no train/, so they would be trained on."""
    names = [name for name in tests.split(",") if name] + ["val", "test"]
    if not (root / "train").is_dir() and (held := [name for name in names if (root / name).is_dir()]):
        raise UserError(
            f"{root}: {held[0]}/ is here and no train/, so test images would be trained on; add train/, or give "
            "the folder of the training images"
        )
    return root / "train" if (root / "train").is_dir() else root


def in_classes(root: Path) -> bool:
    """Whether the images of `training_root` lie in class folders, by the rule of `training_folder`."""
    return not any(e.suffix.lower() in EXTENSIONS and not is_helper(e.name) for e in training_root(root).iterdir())


def held_out(labels: Tensor, share: float) -> tuple[list[int], list[int]]:
    """Indices, rising, of the images to train on and of `share` of each class, one at least, for the test.

    A class keeps one image for training. The draw depends on nothing else, so that what no classifier trains on, no
    autoencoder of the same folder has seen. UserError: no share between 0 and 1.
    """
    if not 0 < share < 1:
        raise UserError(f"--holdout {share}: must lie between 0 and 1, for example 0.2")
    held: list[int] = []
    for y in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels.numpy() == y)
        rng = np.random.Generator(np.random.PCG64(mix_key(y)))
        held += rng.permutation(rows)[: min(len(rows) - 1, max(1, round(share * len(rows))))].tolist()
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


def _folders(args: argparse.Namespace) -> Sets:
    root, names = Path(args.data_path), [name for name in args.tests.split(",") if name]
    if args.train_list or args.val_list:
        if not (args.train_list and args.val_list):
            raise UserError("--train_list and --val_list go together")
        train, val = list_file(args.train_list, root), list_file(args.val_list, root)
        for file, images in ((args.train_list, train), (args.val_list, val)):
            if images.classes:  # read as CLASS/image, which `train/CLASS/image` is not
                raise UserError(f"{file}: no labels; expected `train/CLASS/image.jpg LABEL` a line")
        classes = [str(y) for y in range(1 + max(int(train.labels.max()), int(val.labels.max())))]
        train.classes = val.classes = classes
        return Sets(train, {"val": val})
    labelled: Path | None = getattr(args, "labelled", None)
    root = labelled or root
    training_root(root, args.tests)
    train = training_folder(root)
    if not train.classes:
        raise UserError(f"{root}: images without labels; a classifier needs a folder for each class, {root}/CLASS/*")
    if len(train.classes) == 1:
        raise UserError(f"{root}: one class folder, {train.classes[0]}; a classifier needs two or more")
    base = root.parent if labelled and not (root / "train").is_dir() else root  # val/ lies in it
    found = {name: base / name for name in names or [name for name in ("val", "test") if (base / name).is_dir()][:1]}
    if args.val_dir:
        found = {args.val_dir.name: args.val_dir}
    tests = {name: image_folder(folder) for name, folder in found.items()}
    for name, images in tests.items():
        if images.classes != train.classes:
            other = sorted(set(images.classes) ^ set(train.classes))
            home = root / "train" if (root / "train").is_dir() else root
            raise UserError(
                f"{found[name]}: its classes are not those of {home} (first: {other[0]}); both need the same"
            )
    if args.holdout and not tests:
        rows, held = held_out(train.labels, args.holdout)
        train, test = train.take(rows), train.take(held)
        test.unread, tests = {}, {"holdout": test}  # counted once
    return Sets(train, tests)


def open_sets(args: argparse.Namespace) -> Sets:
    """Training and test images without transforms; few labels and long tails taken from the training images.

    Of folders there may be no test images: then `tests` is empty.
    """
    if args.per_class < 0 or (args.imbalance and args.imbalance < 1):
        raise UserError(f"--per_class {args.per_class} --imbalance {args.imbalance}: 0 or more; 0, or 1 or more")
    root = Path(args.data_path)
    if args.dataset == "folder":
        sets = _folders(args)
    elif args.dataset in ("cifar10", "cifar100", "stl10"):
        sets = _published(args)
    else:
        read, folder = FINE[args.dataset]
        try:
            sets = read(root / folder)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{root / folder}: its lists of images and labels are damaged or not as published "
                f"({type(error).__name__}: {' '.join(str(error).split())[:80]})"
            ) from None
        _check_labels(root / folder, sets)
    train = sets.train
    if args.imbalance:
        train = subset(train, long_tail(train.labels, len(train.classes), args.imbalance, args.label_seed))
    if args.per_class:
        train = subset(train, few_labels(train.labels, train.classes, args.per_class, args.label_seed))
    return Sets(cached(train, args.cache), sets.tests)


def open_unlabelled(args: argparse.Namespace) -> ImageList:
    """Training images for the autoencoder and for FixMatch; nobody looks at their labels, test images are not in it."""
    root = Path(args.data_path)
    if getattr(args, "unlabelled", None):
        return cached(flat_folder(args.unlabelled), args.cache)
    if args.dataset == "stl10":
        try:
            found: Any = datasets.STL10(str(root), "train+unlabeled")
        except (RuntimeError, OSError) as error:
            raise UserError(f"{root}: stl10 not found ({' '.join(str(error).split())[:80]})") from None
        return ArrayImages(found.data.transpose(0, 2, 3, 1), [-1] * len(found.data), [])
    if args.dataset != "folder":
        values = {**vars(args), "per_class": 0, "imbalance": 0, "label_seed": 0, "tests": ""}
        return open_sets(argparse.Namespace(**values)).train
    folder = training_root(root, getattr(args, "tests", None) or "")
    if args.holdout and folder == root:
        images = training_folder(root)
        if not images.classes:
            raise UserError(f"--holdout {args.holdout}: the images of {root} lie in no class folders; leave it away")
        images = images.take(held_out(images.labels, args.holdout)[0])
        return cached(images.take(slice(None), torch.full((len(images),), -1)), args.cache)
    return cached(flat_folder(folder), args.cache)


def shared_files(a: ImageList, b: ImageList) -> int:
    """How many files both lists name."""
    return len({path.resolve() for path in a.paths()} & {path.resolve() for path in b.paths()})


def needs(images: ImageList, batch: int, flags: str) -> None:
    """UserError: there are fewer images than a step takes; `flags` are what the batch comes from."""
    if len(images) < batch:
        raise UserError(f"{flags}: a step takes {batch} images, the data has {len(images)}; give a smaller number")


def cached(images: ImageList, cache: bool) -> ImageList:
    """With `cache` a copy that holds its decoded images; arrays are in memory anyway."""
    return images.cached() if cache else images


def few_labels(labels: Tensor, classes: Sequence[str], count: int, seed: int) -> list[int]:
    """Indices, rising, of `count` images of each class, drawn by `seed`. UserError: a class that has fewer."""
    chosen: list[int] = []
    for y, name in enumerate(classes):
        rows = np.flatnonzero(labels.numpy() == y)
        if len(rows) < count:
            raise UserError(f"--per_class {count}: class {name} has {len(rows)} images")
        rng = np.random.Generator(np.random.PCG64(mix_key(seed, y)))
        chosen += rng.permutation(rows)[:count].tolist()
    return sorted(chosen)


def long_tail(labels: Tensor, classes: int, imbalance: float, seed: int) -> list[int]:
    """Indices, rising: n_j = n_max * imbalance^(-j / (C - 1)) images of class j, at least one, drawn by `seed`."""
    most = int(torch.bincount(labels, minlength=classes).max())
    chosen: list[int] = []
    for y in range(classes):
        count = max(1, int(most * imbalance ** (-y / max(1, classes - 1))))
        rows = np.flatnonzero(labels.numpy() == y)
        rng = np.random.Generator(np.random.PCG64(mix_key(seed, y)))
        chosen += rng.permutation(rows)[:count].tolist()
    return sorted(chosen)


def deal_classes(images: ImageList, way: int, seed: int) -> dict[str, ImageList]:
    """Classes that nobody has split, drawn by `seed`: of 100 of them 20 are test (`way` at least), 16 val, 64 train.

    Where that leaves fewer than `way` classes for val, there is none. UserError: too few classes for `way` novel ones.
    """
    count = len(images.classes)
    novel, val = max(way, round(0.2 * count)), round(0.16 * count)
    val = val if val >= way else 0
    if count < novel + val + 2:
        raise UserError(
            f"--n_way {way}: {count} classes are too few for {way} novel ones and two to train on; lower it"
        )
    order = np.random.Generator(np.random.PCG64(mix_key(seed))).permutation(count)
    parts = {"train": order[novel + val :], "val": order[novel : novel + val], "test": order[:novel]}
    out: dict[str, ImageList] = {}
    for split, drawn in parts.items():
        if len(drawn):
            chosen = sorted(drawn.tolist())  # classes stay in alphabetical order
            number = torch.full((count,), -1)
            number[chosen] = torch.arange(len(chosen))
            labels = number[images.labels]
            rows = torch.nonzero(labels >= 0).flatten()
            out[split] = images.take(rows, labels[rows])
            out[split].classes = [images.classes[y] for y in chosen]
            out[split].unread = images.unread if split == "train" else {}  # counted once
    return out


def read_fewshot(root: Path, way: int = 5, seed: int = 0) -> dict[str, ImageList]:
    """Disjoint classes of train, test and, where there is one, val.

    DIR/SPLIT/CLASS/*, or DIR/SPLIT.csv (filename,label) with DIR/images, or DIR/CLASS/* (see `deal_classes`).
    """
    out: dict[str, ImageList] = {}
    owner: dict[str, str] = {}
    of: dict[str, str] = {}  # the list that names an image
    given = [
        split for split in ("train", "val", "test") if (root / f"{split}.csv").is_file() or (root / split).is_dir()
    ]
    if root.is_dir() and not given:
        return deal_classes(image_folder(root), way, seed)
    for split in ("train", "val", "test"):
        if split == "val" and split not in given:
            continue
        if (file := root / f"{split}.csv").is_file():
            files: dict[str, list[Path]] = defaultdict(list)
            for row in csv.DictReader(read_text(file, "filename,label a line").splitlines()):
                image, label = ((row.get(key) or "").strip() for key in ("filename", "label"))
                if not image or not label or None in row or None in row.values():
                    raise UserError(f"{file}: expected the columns filename,label, found {','.join(map(str, row))}")
                if image in of:  # as support and as query it would tell its own class
                    raise UserError(f"{file}: {image} is listed in {of[image]} already; restore the lists")
                of[image] = file.name
                files[label].append(_need(root / "images" / image, f"the images of {file}"))
            if not files:
                raise UserError(f"{file}: names no image; expected filename,label a line")
            names = sorted(files)
            out[split] = ImageList([(path, y) for y, name in enumerate(names) for path in sorted(files[name])], names)
        else:
            out[split] = image_folder(root / split)
        for name in out[split].classes:
            if name in owner:
                raise UserError(f"{root}: class {name} is in {owner[name]} and in {split}; novel classes must be new")
            owner[name] = split
    return out


# ----------------------------------------------------------------------------------------------------------- foreground
def foreground(images: ImageList, size: int) -> Tensor | None:
    """Masks [N, size, size] (bool) of the objects, in the geometry of the test transform; None where there are none.

    From masks/SPLIT/CLASS/NAME.png beside the split's folder, or from the boxes of CUB.
    """
    if isinstance(images, ArrayImages) or not len(images):
        return None
    first = images.path(0)
    root = first.parents[2]
    if (root / "masks" / first.relative_to(root)).with_suffix(".png").is_file():
        files = ((root / "masks" / path.relative_to(root)).with_suffix(".png") for path in images.paths())
        drawn: Iterator[Image.Image] = (load_image(file, "L") for file in files)
    elif (first.parents[2] / "bounding_boxes.txt").is_file():  # CUB_200_2011/images/CLASS/NAME
        drawn = _boxes(first.parents[2], images)
    else:
        return None
    shape = fit(size)
    return torch.stack([torch.from_numpy(np.array(shape(mask))) > 127 for mask in drawn])


def _boxes(root: Path, images: ImageList) -> Iterator[Image.Image]:
    what = "CUB_200_2011 as published"
    numbers = {name: key for key, name in _numbered(root / "images.txt", what).items()}
    boxes = {key: [float(v) for v in box.split()] for key, box in _numbered(root / "bounding_boxes.txt", what).items()}
    for path in images.paths():
        x, y, w, h = boxes[numbers[path.relative_to(root / "images").as_posix()]]
        mask = Image.new("L", load_image(path).size)
        ImageDraw.Draw(mask).rectangle((x, y, x + w - 1, y + h - 1), fill=255)
        yield mask


# ------------------------------------------------------------------------------------------------ batches on the device
class Resident:
    """A loader whose images lie in the device's memory and are cropped and flipped a batch at a time.

    For images that are small: random resized crops (bicubic, without antialiasing) and flips as one resampling. Not
    the PIL pipeline of the paper. The draws depend on (seed, epoch, step) and not on the number of processes.
    """

    def __init__(self, images: ImageList, size: int, sampler: EpochSampler, seed: int, device: torch.device,
                 min_scale: float = 0.2):  # fmt: skip
        need = len(images) * 3 * size * size
        if need > 4 << 30:
            raise UserError(
                f"--resident: {len(images)} images of {size} pixels take {need / 2**30:.1f} GiB, more than 4"
            )
        shape = fit(size)
        arrays = [np.asarray(shape(images.image(i))) for i in range(len(images))]
        self.pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)  # [N, 3, s, s]
        self.sampler, self.seed, self.min_scale = sampler, seed, min_scale
        self.mean, self.std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        s = self.sampler
        for step, keys in enumerate(s, s.start):
            rows = torch.tensor([index for _, index in keys], device=self.pixels.device)
            generator = torch.Generator().manual_seed(mix_key(self.seed, s.epoch, step) >> 1)
            theta = crop_matrices(len(keys) * s.world, self.min_scale, generator)
            mine = theta[s.rank * len(keys) : (s.rank + 1) * len(keys)].to(rows.device)
            x = self.pixels[rows].float()
            grid = F.affine_grid(mine, list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False).clamp(0, 255)
            yield (((x - self.mean) / self.std),)


def crop_matrices(count: int, min_scale: float, generator: torch.Generator) -> Tensor:
    """Affine maps [count, 2, 3] of random resized crops (area min_scale..1, sides 3/4..4/3) and flips."""
    u = torch.rand(count, 5, generator=generator)
    area = min_scale + (1 - min_scale) * u[:, 0]
    ratio = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    cx, cy = (1 - w) * (2 * u[:, 2] - 1), (1 - h) * (2 * u[:, 3] - 1)
    flip = torch.where(u[:, 4] < 0.5, 1.0, -1.0)
    zero = torch.zeros(count)
    return torch.stack([w * flip, zero, cx, zero, h, cy], 1).view(count, 2, 3)
