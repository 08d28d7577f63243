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
ARCHIVES = {".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".7z", ".rar"}


def load_image(path: str | os.PathLike, mode: str | None = "RGB") -> Image.Image:
    """Decode the whole file; `mode=None` keeps the stored mode. UserError names a file that cannot be read.

    16-bit greys become 8-bit ones by their high byte, where PIL would clip them to white.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if mode is None or image.mode == mode:
                return image
            if image.mode[0] in "IF":
                pixels = np.asarray(image)
                if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
                    raise ValueError(f"pixels of mode {image.mode}, whose range is unknown: convert them to 8 bits")
                return Image.fromarray((pixels >> 8).astype(np.uint8)).convert(mode)
            return image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the data root and the list that names it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove the file") from None


def need_folder(root: str | os.PathLike, expected: str) -> Path:
    """`root`, if it is a folder; UserError says what is expected, and where an archive waits to be unpacked."""
    root = Path(root)
    if root.is_dir():
        return root
    first = root  # of the path's parts the first that is not there
    while not first.exists() and not first.parent.is_dir():
        first = first.parent
    hint = ""
    if first.exists():
        hint = f"{first} is a file, unpack it if it is an archive; "
    elif first.is_symlink():
        hint = f"{first} is a link that leads nowhere; "
    elif packed := [
        path for path in first.parent.glob("*") if path.name.startswith(f"{first.name}.") and is_archive(path)
    ]:
        hint = f"unpack {packed[0]}; "
    raise UserError(f"{root}: no such folder; {hint}{expected}")


def is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVES


def read_text(file: str | os.PathLike, expected: str = "a list") -> str:
    """The text of a list or table, UTF-8. UserError: missing, a folder, not text, or nothing in it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected {expected}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); expected {expected}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); expected {expected}") from None
    if not text.strip():
        raise UserError(f"{file}: the list is empty; expected {expected}")
    return text


def read_mat(file: Path, expected: str) -> dict[str, Any]:
    """The variables of a MATLAB file, its empty dimensions squeezed. UserError: missing or damaged."""
    from scipy.io import loadmat

    if not file.is_file():
        raise UserError(f"{file}: no such file; expected {expected}")
    try:
        return loadmat(file, squeeze_me=True)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{file}: not a readable .mat file ({reason}); expected {expected}") from None


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """`root` and every folder below it, with the names of their files; links are followed.

    UserError: a link that leads nowhere or to a folder that it is in, a folder with nothing in it, and a file that may
    have been one: an archive, or one without any suffix.
    """
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        # images are not asked one by one
        others = [entry for entry in files if os.path.splitext(entry)[1].lower() not in EXTENSIONS]
        for link in (folder / entry for entry in folders + others if entry[0] != "."):
            if link.is_symlink():
                above = [os.path.realpath(part) for part in (folder, *folder.parents) if part.is_relative_to(root)]
                target = os.path.realpath(link)
                if not link.exists() or any(Path(part).is_relative_to(target) for part in above):
                    raise UserError(f"{link}: a link that leads nowhere or to a folder it is in; remove or mend it")
        odd = [entry for entry in others if entry[0] != "." and Path(entry).suffix.lower() in ("", *ARCHIVES)]
        if odd or (folder != root and not folders and not files):
            what = f"{folder / odd[0]}: a file" if odd else f"{folder}: nothing"
            raise UserError(f"{what} where folders of images are; unpack it, move or remove it")
        yield folder, files


def list_images(root: str | os.PathLike) -> list[Path]:
    """All image files below `root`, links followed, sorted; UserError when the folder is missing or holds none."""
    root = need_folder(root, "give the folder that holds the images")
    found = sorted(
        folder / name
        for folder, names in walk(root)
        for name in names
        if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
    )
    if not found:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{root}: no image ({kinds}) anywhere below this folder; add some, or remove the folder")
    return found


def subfolders(root: Path, of: str = "class") -> list[str]:
    """Names of the folders in `root`, sorted, hidden ones aside: a folder for each class, or video.

    UserError for what is one too many or too few: no folder at all, an archive or an image between them, a file without
    any suffix, a link that leads nowhere. Texts and tables may lie there.
    """
    entries = sorted((entry for entry in root.iterdir() if not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        if not entry.is_dir():
            wrong = is_archive(entry) or entry.suffix.lower() in EXTENSIONS or not entry.suffix or not entry.exists()
            if wrong:
                what = "a file" if entry.exists() else "a link that leads nowhere"
                raise UserError(f"{entry}: {what} where {of} folders are; unpack it, move or remove it")
    names = [entry.name for entry in entries if entry.is_dir()]
    if not names:
        raise UserError(f"{root}: no {of} folder; expected {root}/{of.upper()}/*")
    return names


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

    def pixels(self, index: int) -> np.ndarray:
        """The decoded image, uint8 [H, W, 3]."""
        return np.asarray(self.image(index))

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
    root = need_folder(root, f"expected {root}/CLASS/*.jpg")
    classes = subfolders(root)
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
    what = "a list of images, `CLASS/image.jpg` or `image.jpg LABEL` a line"
    lines = read_text(file, what).splitlines()
    rows = [row for row in csv.reader(lines, delimiter=" ", skipinitialspace=True) if row and row[0]]
    if all(len(row) == 1 for row in rows):
        classes = subfolders(need_folder(root, f"expected {root}/CLASS/*.jpg"))
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
