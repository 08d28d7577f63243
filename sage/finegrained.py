"""CUB-200-2011, Stanford Cars and FGVC-Aircraft in their publishers' layouts.

CUB_200_2011/{images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/CLASS/*.jpg}
stanford_cars/{devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, cars_train/*.jpg,
               cars_test/*.jpg}
fgvc-aircraft-2013b/data/{variants.txt, images_variant_trainval.txt, images_variant_test.txt, images/*.jpg}
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared_utils import UserError
from shared_utils.data import ImageList, per_class, read_mat, read_text
from shared_utils.evaluation import open_splits, prepare_data

LAYOUTS = "one of the layouts at the head of sage/finegrained.py"


def _lines(file: Path) -> list[list[str]]:
    """Words of every line that is not empty; UserError when the file is missing."""
    return [line.split() for line in read_text(file, LAYOUTS).splitlines() if line.strip()]


def _pairs(file: Path) -> dict[str, str]:
    """Number -> the rest of its line (a name may hold blanks). UserError: a number that is there twice."""
    out: dict[str, str] = {}
    for line in read_text(file, LAYOUTS).splitlines():
        if line.strip():
            number, rest = line.strip().split(None, 1)
            if number in out:
                raise UserError(f"{file}: number {number} is there twice; restore the list from the set's archive")
            out[number] = rest
    return out


def _pair(file: Path, samples: dict[bool, list[tuple[Path, int]]], classes: list[str]) -> tuple[ImageList, ImageList]:
    """Training and test images; UserError for a label out of range, an empty split, and an image that is missing."""
    for split in samples.values():
        wrong = next((y for _, y in split if not 0 <= y < len(classes)), None)
        if wrong is not None or not split:
            what = "an empty split" if wrong is None else f"a label {wrong + 1} for {len(classes)} classes"
            raise UserError(f"{file}: {what}; restore the lists from the set's archive")
        absent = next((path for path, _ in split if not path.is_file()), None)
        if absent is not None:
            raise UserError(f"{absent}: no such image, but {file} names it; restore it")
    if again := next((p for p, n in Counter(p for split in samples.values() for p, _ in split).items() if n > 1), None):
        raise UserError(f"{file}: {again} is listed twice, for training or for the test; restore the lists")
    return ImageList(samples[True], classes), ImageList(samples[False], classes)


def cub(root: Path) -> tuple[ImageList, ImageList]:
    """5,994 training and 5,794 test images of 200 birds."""
    root = root / "CUB_200_2011"
    names = _pairs(root / "classes.txt")
    numbers = [str(y) for y in range(1, 1 + len(names))]
    if set(names) != set(numbers):
        raise UserError(f"{root}/classes.txt: does not number its classes from 1 to {len(names)}; restore it")
    classes = [names[y] for y in numbers]  # in any order there
    label = {number: int(y) - 1 for number, y in _pairs(root / "image_class_labels.txt").items()}
    train = _pairs(root / "train_test_split.txt")
    images = _pairs(root / "images.txt")
    samples: dict[bool, list[tuple[Path, int]]] = {True: [], False: []}
    for number, name in images.items():
        if number not in label or number not in train:
            raise UserError(f"{root}/images.txt: image {number} has no label or no split in the files beside it")
        if train[number] not in ("0", "1"):
            raise UserError(
                f"{root}/train_test_split.txt: image {number} has {train[number]}, expected 1 (training) or 0"
            )
        samples[train[number] == "1"].append((root / "images" / name, label[number]))
    if other := sorted(set(label) ^ set(images)):
        raise UserError(f"{root}/images.txt does not name image {other[0]}, image_class_labels.txt does; restore it")
    return _pair(root / "images.txt", samples, classes)


def cars(root: Path) -> tuple[ImageList, ImageList]:
    """8,144 training and 8,041 test images of 196 cars."""
    root = root / "stanford_cars"
    files = {True: root / "devkit/cars_train_annos.mat", False: root / "cars_test_annos_withlabels.mat"}
    classes = [str(name) for name in read_mat(root / "devkit/cars_meta.mat", LAYOUTS)["class_names"]]
    samples = {}
    for train, file in files.items():
        rows = np.atleast_1d(read_mat(file, LAYOUTS)["annotations"])
        folder = root / ("cars_train" if train else "cars_test")
        samples[train] = [(folder / str(row["fname"]), int(row["class"]) - 1) for row in rows]
    return _pair(files[True], samples, classes)


def aircraft(root: Path) -> tuple[ImageList, ImageList]:
    """6,667 training and validation images and 3,333 test images of 100 variants."""
    root = root / "fgvc-aircraft-2013b/data"
    classes = [" ".join(words) for words in _lines(root / "variants.txt")]
    if len(set(classes)) < len(classes):
        raise UserError(f"{root / 'variants.txt'}: {Counter(classes).most_common(1)[0][0]} is there twice; restore it")
    samples: dict[bool, list[tuple[Path, int]]] = {}
    for train, name in ((True, "trainval"), (False, "test")):
        file = root / f"images_variant_{name}.txt"
        samples[train] = []
        for number, *words in _lines(file):
            if " ".join(words) not in classes:
                raise UserError(f"{file}: {' '.join(words)} is not among the variants of variants.txt")
            samples[train].append((root / "images" / f"{number}.jpg", classes.index(" ".join(words))))
    return _pair(root / "variants.txt", samples, classes)


READERS: dict[str, Callable[[Path], tuple[ImageList, ImageList]]] = {"cub": cub, "cars": cars, "aircraft": aircraft}


def open_images(args: argparse.Namespace, leave_one_out: bool = False) -> tuple[ImageList, ImageList]:
    """Training and test images of the flags: one of these three sets, or what `open_splits` knows; no transforms."""
    if args.dataset not in READERS:
        return open_splits(args, leave_one_out)
    prepare_data(args)
    try:
        train, val = READERS[args.dataset](Path(args.data_dir))
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"{args.data_dir}: the lists of {args.dataset} are damaged or not as published "
            f"({type(error).__name__}: {' '.join(str(error).split())[:80]}); restore them from the set's archive"
        ) from None
    return per_class(train, args.per_class, args.cache), val
