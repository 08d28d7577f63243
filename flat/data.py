"""The few-shot data sets in their public layouts, their frozen class splits, and the pipelines of an image.

miniImagenet  DIR/{train,val,test}.csv of Ravi and Larochelle (filename,label) and DIR/images/*.jpg
tiered        DIR/{train,val,test}/WNID/*
cifarfs       DIR/{train,val,test}/CLASS/*; or as published, DIR/data/CLASS/* and
              DIR/splits/bertinetto/{train,val,test}.txt
fc100         DIR/{train,val,test}/CLASS/*
CUB           DIR/images/NNN.Name/* (CUB_200_2011); in the order of names: even base, 1 mod 4 val, 3 mod 4 novel
cross         base: every class of miniImagenet; val and novel: those of CUB
folder        DIR/{train,val,test}/CLASS/*, any classes; val/ and test/ may be missing, and where none of the three
              is there the base classes are DIR/CLASS/*
"""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torchvision import transforms as T

from shared_utils import UserError
from shared_utils.data import ImageList, image_folder, list_images, mix_key, need_folder, read_text

SPLITS = {"base": "train", "val": "val", "novel": "test"}  # CloserLookFewShot's names, and those on disk
FOLDERS = {
    "miniImagenet": "miniImagenet",
    "tiered": "tiered_imagenet",
    "cifarfs": "cifarfs",
    "fc100": "FC100",
    "CUB": "CUB_200_2011",
}
DATASETS = (*FOLDERS, "cross", "folder")
CROPS = ("resized", "padded", "rfs")
# sha256 (first 16 digits) of the lines "split class", splits in the order above, classes sorted; and classes a split.
FROZEN: dict[str, tuple[str, tuple[int, int, int]]] = {
    "miniImagenet": ("ece8a4b35ab6212d", (64, 16, 20)),
    "tiered": ("0d44ba76dd548990", (351, 97, 160)),
    "cifarfs": ("8bcd5918f40e7188", (64, 16, 20)),
    "fc100": ("49576609a7511cda", (60, 20, 20)),
    "CUB": ("66fd69e56b21678e", (100, 50, 50)),
}
MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # CloserLookFewShot, for everything
    "mini": ((120.40 / 255, 115.59 / 255, 104.54 / 255), (70.68 / 255, 68.28 / 255, 72.55 / 255)),  # BF3S
    "cifar": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
}

Files = dict[str, list[Path]]  # class: its images, both sorted


def split_hash(classes: Mapping[str, Iterable[str]]) -> str:
    """Of the classes of base, val and novel, order within a split aside."""
    lines = [f"{split} {name}" for split in SPLITS for name in sorted(classes[split])]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:16]


def _from_folders(root: Path, unread: Counter[str], own: bool = False) -> dict[str, Files]:
    """Args: own, a user's folder, of which only the base classes have to be there."""
    out = {}
    plain = own and root.is_dir() and not any((root / name).is_dir() for name in SPLITS.values())
    for split, name in SPLITS.items():
        folder = root if plain and split == "base" else root / name
        files: Files = defaultdict(list)
        if split == "base" or not own or (folder.is_dir() and not plain):
            images = image_folder(folder)
            unread.update(images.unread)
            for path, label in zip(images.paths(), images.labels.tolist()):
                files[images.classes[label]].append(path)
        out[split] = dict(files)
    return out


def _from_lists(root: Path) -> dict[str, Files]:
    """CIFAR-FS as published: class names in splits/bertinetto/*.txt, one a line, images in data/CLASS."""
    out = {}
    for split, name in SPLITS.items():
        file = root / "splits/bertinetto" / f"{name}.txt"
        lines = read_text(file, "a list of classes").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
        if twice := [c for c, count in Counter(classes).items() if count > 1]:
            raise UserError(f"{file}: class {twice[0]} is listed twice; restore the list")
        if lost := [c for c in classes if not (root / "data" / c).is_dir()]:
            raise UserError(f"{file}: {root / 'data' / lost[0]} does not exist; restore it, or the list")
        out[split] = {c: list_images(root / "data" / c) for c in classes}
    return out


def _from_csv(root: Path) -> dict[str, Files]:
    """mini-ImageNet: every image that a csv names must be in images/, and no list may name it again."""
    out = {}
    seen: dict[str, str] = {}
    for split, name in SPLITS.items():
        file = root / f"{name}.csv"
        files: Files = defaultdict(list)
        text = read_text(file, f"the lists of Ravi and Larochelle beside {root}/images/")
        rows = csv.reader(text.splitlines(), skipinitialspace=True)
        head = [word.strip() for word in next(rows, [])]
        if not {"filename", "label"} <= set(head):
            raise UserError(f"{file}: its first line must be filename,label")
        there = {entry.name for entry in need_folder(root / "images", f"expected the images of {file}").iterdir()}
        for number, row in enumerate(rows, 2):
            cells = dict(zip(head, (cell.strip() for cell in row)))
            if not any(cells.values()):
                continue
            if len(row) != len(head):
                raise UserError(f"{file}, line {number}: {len(row)} cells, expected {','.join(head)}; restore the list")
            image, label = cells.get("filename", "").replace("\\", "/").removeprefix("./"), cells.get("label", "")
            if image not in there or not label:
                raise UserError(
                    f"{file}, line {number}: {root / 'images' / image} does not exist or has no label; restore it, or "
                    "the list"
                )
            if image in seen:  # as support and as query it would tell its own class
                raise UserError(f"{file}, line {number}: {image} is listed in {seen[image]} already; restore the lists")
            seen[image] = f"{file.name}, line {number}"
            files[label].append(root / "images" / image)
        out[split] = {c: sorted(paths) for c, paths in sorted(files.items())}
    return out


def _from_cub(root: Path) -> dict[str, Files]:
    images = image_folder(need_folder(root / "images", "expected CUB_200_2011 with images/001.Name/*.jpg"))
    files: list[list[Path]] = [[] for _ in images.classes]
    for path, label in zip(images.paths(), images.labels.tolist()):
        files[label].append(path)
    part = {0: "base", 1: "val", 2: "base", 3: "novel"}
    out: dict[str, Files] = {split: {} for split in SPLITS}
    for i, name in enumerate(images.classes):
        out[part[i % 4]][name] = files[i]
    return out


def read_dataset(dataset: str, root: Path, unread: Counter[str] | None = None) -> dict[str, Files]:
    """Images of base, val and novel by class, the splits checked.

    Args:
        root: folder of the data sets (each in the folder of `FOLDERS`), or the one itself.
        unread: counts the files between the images of class folders that are none, by ending.

    Raises:
        UserError: unknown name, missing files, overlapping splits, classes other than the published ones.
    """
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: unknown; choose from {', '.join(DATASETS)}")
    if dataset == "cross":
        mini, cub = read_dataset("miniImagenet", root), read_dataset("CUB", root)
        every = {c: files for split in SPLITS for c, files in mini[split].items()}
        return {"base": dict(sorted(every.items())), "val": cub["val"], "novel": cub["novel"]}
    inner = root / FOLDERS.get(dataset, "")
    folder = inner if inner.is_dir() else root
    if dataset == "miniImagenet":
        found = _from_csv(folder)
    elif dataset == "CUB":
        found = _from_cub(folder)
    elif dataset == "cifarfs" and (folder / "splits/bertinetto").is_dir():
        found = _from_lists(folder)
    else:
        found = _from_folders(folder, Counter() if unread is None else unread, dataset == "folder")
    check_splits(found, folder)
    if dataset in FROZEN:
        digest, sizes = FROZEN[dataset]
        if split_hash(found) != digest:
            have = "/".join(str(len(found[split])) for split in SPLITS)
            raise UserError(
                f"{folder}: not the published class split of {dataset} ({'/'.join(map(str, sizes))} classes, hash "
                f"{digest}): found {have}, {split_hash(found)}; --dataset folder takes any split"
            )
    return found


def check_splits(found: Mapping[str, Mapping[str, object]], where: Path) -> None:
    """UserError if a class is in two splits: novel classes must be new."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        for name in found[split]:
            if name in seen:
                raise UserError(f"{where}: class {name} is in {SPLITS[seen[name]]} and in {SPLITS[split]}; splits of "
                                "classes must not overlap")  # fmt: skip
            seen[name] = split


def pick_classes(names: list[str], count: int, draw: int) -> list[str]:
    """`count` of the classes, in order, drawn by `draw`; 0: all."""
    if count > len(names):
        raise UserError(f"--base_classes {count}: the data has {len(names)} base classes")
    if not count:
        return names
    rng = np.random.Generator(np.random.PCG64(mix_key(draw, count)))
    return [names[i] for i in sorted(rng.permutation(len(names))[:count])]


def as_list(files: Files, first: int = 0, last: int | None = None, cache: bool = False) -> ImageList:
    """Images first..last of each class, labels in the order of the classes. UserError: a class without any."""
    samples = [(path, label) for label, paths in enumerate(files.values()) for path in paths[first:last]]
    counts = {name: len(paths[first:last]) for name, paths in files.items()}
    if empty := [name for name, count in counts.items() if not count]:
        raise UserError(f"class {empty[0]} has no image left of {len(files[empty[0]])} (--holdout, --per_class)")
    return ImageList(samples, list(files), cache=cache)


# ------------------------------------------------------------------------------------------------------------ pipelines
class ImageJitter:
    """Brightness, contrast and colour, each by a factor 1 +- strength (CloserLookFewShot)."""

    def __init__(self, strength: float = 0.4):
        self.strength = strength

    def __call__(self, image: Image.Image) -> Image.Image:
        for kind, r in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), torch.rand(3)):
            image = kind(image).enhance(float(self.strength * (2 * r - 1) + 1))
        return image


def pixels(image: Image.Image) -> Tensor:
    """[3, h, w] uint8: bytes, because the transformation fills with grey before any normalisation."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def training_pipeline(size: int, augment: bool, crop: str) -> Callable[[Image.Image], Tensor]:
    """--train_aug: a random crop of `CROPS`, jitter, flip; else the test's pipeline.

    `padded` by size / 8, with CloserLookFewShot's jitter; `rfs` by 8 pixels, for CIFAR 4, with torchvision's.
    """
    if not augment:
        return evaluation_pipeline(size)
    jitter: Callable = ImageJitter()
    first: list[Callable] = [T.RandomResizedCrop(size)]
    if crop == "padded":
        first = [T.Resize((size, size)), T.RandomCrop(size, padding=size // 8)]
    elif crop == "rfs":
        first = [T.Resize((size, size)), T.RandomCrop(size, padding=4 if size <= 40 else 8)]
        jitter = T.ColorJitter(0.4, 0.4, 0.4)
    return T.Compose([*first, jitter, T.RandomHorizontalFlip(), pixels])


def evaluation_pipeline(size: int) -> Callable[[Image.Image], Tensor]:
    """Resize to int(1.15 size), both sides, centre crop; images of that very size are taken as they are."""

    def run(image: Image.Image) -> Tensor:
        return pixels(image if image.size == (size, size) else shrink(image))

    big = int(size * 1.15)
    shrink = T.Compose([T.Resize((big, big)), T.CenterCrop(size)])
    return run


def normalise(x: Tensor, which: str) -> Tensor:
    """[B, 3, s, s] pixel units -> float32 with the mean and std of `MEAN_STD`."""
    mean, std = (255 * torch.tensor(v, device=x.device).view(3, 1, 1) for v in MEAN_STD[which])
    return (x.float() - mean) / std
