"""Images on disk, randomness keyed by (seed, epoch, index), and a batch sampler that resumes inside an epoch."""

import csv
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from shared_utils import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def load_image(path: str | os.PathLike, mode: str | None = "RGB") -> Image.Image:
    """Decode the whole file; `mode=None` keeps the stored mode. UserError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return image if mode is None or image.mode == mode else image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the data root and the list that names it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove the file") from None


def list_images(root: str | os.PathLike) -> list[Path]:
    """All image files below `root`, sorted; UserError when the folder is missing or holds none."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds the images")
    found = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(root)
        for name in names
        if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
    )
    if not found:
        raise UserError(f"{root}: no image ({', '.join(sorted(EXTENSIONS))}) anywhere below this folder")
    return found


class ImageList(Dataset):
    """Images with integer labels (-1 where there is none); `transform` draws from the global RNGs (see `Keyed`).

    `cache` decodes everything now and keeps it in memory, which the loader's processes then share.
    """

    def __init__(
        self,
        samples: list[tuple[Path, int]],
        classes: list[str],
        transform: Callable | None = None,
        cache: bool = False,
    ):
        self.samples, self.classes, self.transform = samples, classes, transform
        self._decoded = self._decode() if cache else None

    def _decode(self) -> list[Image.Image]:
        """All images; UserError when they would take more than half of the machine's memory."""
        some = [load_image(path) for path, _ in self.samples[:: max(1, len(self.samples) // 16)]]
        need = len(self.samples) * sum(3 * image.width * image.height for image in some) / len(some)
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > have / 2:
            raise UserError(
                f"--cache: {len(self.samples)} decoded images take about {need / 2**30:.0f} GiB and this machine has "
                f"{have / 2**30:.0f}; leave --cache away"
            )
        return [load_image(path) for path, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> Tensor:
        """Labels [N], int64."""
        return torch.tensor([label for _, label in self.samples])

    def image(self, index: int) -> Image.Image:
        """The decoded image, RGB."""
        return load_image(self.samples[index][0]) if self._decoded is None else self._decoded[index]

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.samples[index][1], index


def per_class(images: ImageList, count: int, cache: bool = False) -> ImageList:
    """The first `count` images of each class, in the same order; 0: all of them."""
    seen: Counter[int] = Counter()
    kept = []
    for path, label in images.samples:
        seen[label] += 1
        if not count or seen[label] <= count:
            kept.append((path, label))
    return ImageList(kept, images.classes, images.transform, cache)


def image_folder(root: str | os.PathLike, transform: Callable | None = None) -> ImageList:
    """`root/CLASS/**/*.jpg`, classes in alphabetical order. UserError for no class and for a class without images."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected {root}/CLASS/*.jpg")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{root}: no class folder; expected {root}/CLASS/*.jpg")
    return ImageList(
        [(path, y) for y, name in enumerate(classes) for path in list_images(root / name)], classes, transform
    )


def flat_folder(root: str | os.PathLike, transform: Callable | None = None) -> ImageList:
    """Unlabelled images anywhere below `root`; every label is -1."""
    return ImageList([(path, -1) for path in list_images(root)], [], transform)


def list_file(file: str | os.PathLike, root: str | os.PathLike, transform: Callable | None = None) -> ImageList:
    """Subset lists (1% / 10% of ImageNet): a line is `CLASS/image.jpg` or `image.jpg LABEL`, relative to `root`.

    In the first form classes are numbered as `image_folder(root)` does. UserError for a missing list or image.
    """
    file, root = Path(file), Path(root)
    if not file.is_file():
        raise UserError(f"{file}: no such list file")
    with open(file, newline="", encoding="utf-8") as handle:
        rows = [row for row in csv.reader(handle, delimiter=" ", skipinitialspace=True) if row and row[0]]
    if not rows:
        raise UserError(f"{file}: the list is empty")
    if all(len(row) == 1 for row in rows):
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        index = {name: y for y, name in enumerate(classes)}
    else:
        classes, index = [], {}
    samples = []
    for number, row in enumerate(rows, 1):
        path = root / row[0]
        if not path.is_file():
            raise UserError(f"{file}, line {number}: {path} does not exist; check the root that the list refers to")
        if index:
            samples.append((path, index[Path(row[0]).parts[0]]))
        elif len(row) == 2 and row[1].isdecimal():
            samples.append((path, int(row[1])))
        else:
            raise UserError(f"{file}, line {number}: expected `CLASS/image` or `image LABEL`, found {' '.join(row)!r}")
    return ImageList(samples, classes, transform)


def mix_key(*keys: int) -> int:
    """One 64-bit seed from several integers (SplitMix64 finaliser), equal on every platform and version."""
    state = 0
    for key in keys:
        state = (state + int(key) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


@contextmanager
def sample_rng(*keys: int) -> Iterator[None]:
    """Seed the global python, numpy and torch CPU generators from `keys` for the block; restore them after it."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = mix_key(*keys)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


class Keyed(Dataset):
    """A dataset indexed by (epoch, index), whose randomness depends on (seed, epoch, index) alone.

    So neither the number of workers, nor the order, nor a resume changes what a sample looks like.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with sample_rng(self.seed, epoch, index):
            return self.dataset[index]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process; the last incomplete global batch is dropped.

    The permutation of an epoch depends on (seed, epoch); global batch g is cut into `world` contiguous shares, so N
    processes see together what one process sees. `at(epoch, step)` starts the next iteration inside an epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True):
        if batch_size * world > size:
            raise UserError(f"a global batch of {batch_size * world} needs as many samples, the data has {size}")
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.shuffle, self.epoch, self.start = shuffle, 0, 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world) - self.start

    @property
    def steps_per_epoch(self) -> int:
        return self.size // (self.batch_size * self.world)

    def at(self, epoch: int, step: int = 0) -> "EpochSampler":
        self.epoch, self.start = epoch, step
        return self

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: np.ndarray = np.arange(self.size)
        if self.shuffle:
            order = np.random.Generator(np.random.PCG64(mix_key(self.seed, self.epoch))).permutation(self.size)
        for step in range(self.start, self.steps_per_epoch):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[first : first + self.batch_size]]
