"""Images on disk, randomness keyed by (seed, epoch, index), and a batch sampler that resumes inside an epoch."""

import copy
import csv
import hashlib
import os
import random
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from shared_utils import UserError

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
ARCHIVES = {".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".7z", ".rar"}
# What file managers, notebooks, network drives and archivers leave between the data, in lower case; and all that is
# hidden: .ipynb_checkpoints, .DS_Store, .thumbnails, and AppleDouble's ._NAME.jpg, which is no image.
HELPERS = {"__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
HELPERS |= {"__pycache__", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
HASHED = 20_000  # files of a list whose sizes its fingerprint reads, at most


def load_image(path: str | os.PathLike, mode: str | None = "RGB", turn: bool = False) -> Image.Image:
    """Decode the whole file; `mode=None` is for label maps. UserError names a file that cannot be read.

    `turn`: as the file's EXIF orientation says, for photos that no label map belongs to; else as it is stored.

    16-bit greys become 8-bit ones by their high byte, where PIL would clip them to white. With `mode=None` the stored
    mode and the stored numbers are kept: PIL spreads 2- and 4-bit greys over 0..255, here they stay 0..3 and 0..15.
    """
    try:
        with Image.open(path) as image:
            bits = _grey_bits(image)
            image.load()
            if image.format == "PNG":
                check_png(path)
            if turn and image.info.get("exif"):
                image = ImageOps.exif_transpose(image)
            if mode is None and image.mode == "L" and bits in (2, 4):
                stored = Image.fromarray(np.asarray(image) // (255 // (2**bits - 1)))
                stored.info["bits"] = bits  # numbers for certain, where 8 bits may be brightness
                return stored
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


def check_png(path: str | os.PathLike) -> None:
    """SyntaxError or OSError where a chunk of a PNG has not the checksum behind it, which Pillow's decoder skips."""
    with Image.open(path) as image:
        image.verify()


def _grey_bits(image: Any) -> int:
    """Bits of a grey pixel in an opened file that is not decoded yet, by PIL's name of its raw mode (`L;4`)."""
    args = image.tile[0][3] if image.tile else ""
    raw = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ""
    found = re.match(r"L;(\d+)", str(raw))
    return int(found[1]) if found else 8


def is_helper(name: str) -> bool:
    """Whether a file or folder of this name is hidden or was left by another program: no data, and no fault."""
    return name.startswith(".") or name.lower() in HELPERS


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
    """`root` and every folder below it, with the names of their files; links are followed, `is_helper`s left out.

    UserError: a link that leads nowhere or to a folder that it is in, a folder with nothing in it, and a file that may
    have been one: an archive, or one without any suffix.
    """
    for name, folders, files in os.walk(root, followlinks=True):
        folder, empty = Path(name), not folders and not files
        folders[:] = [entry for entry in folders if not is_helper(entry)]  # the others are not gone into
        files = [entry for entry in files if not is_helper(entry)]
        # images are not asked one by one
        others = [entry for entry in files if os.path.splitext(entry)[1].lower() not in EXTENSIONS]
        for link in (folder / entry for entry in folders + others):
            if link.is_symlink():
                above = [os.path.realpath(part) for part in (folder, *folder.parents) if part.is_relative_to(root)]
                target = os.path.realpath(link)
                if not link.exists() or any(Path(part).is_relative_to(target) for part in above):
                    raise UserError(f"{link}: a link that leads nowhere or to a folder it is in; remove or mend it")
        odd = [entry for entry in others if Path(entry).suffix.lower() in ("", *ARCHIVES)]
        if odd or (folder != root and empty):
            what = f"{folder / odd[0]}: a file" if odd else f"{folder}: nothing"
            raise UserError(f"{what} where folders of images are; unpack it, move or remove it")
        yield folder, files


def list_images(root: str | os.PathLike, unread: Counter[str] | None = None) -> list[Path]:
    """All image files below `root`, links followed, sorted; UserError when the folder is missing or holds none.

    `unread` counts the other files by their endings.
    """
    root = need_folder(root, "give the folder that holds the images")
    found, others = [], Counter[str]()
    for folder, names in walk(root):
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in EXTENSIONS:
                found.append(folder / name)
            else:
                others[ending] += 1
    if not found:
        kinds = ", ".join(sorted(EXTENSIONS))
        there = f"{tell(others)} {'is' if others.total() == 1 else 'are'} there; convert them, " if others else ""
        raise UserError(f"{root}: no image ({kinds}) anywhere below this folder; {there}add some, or remove the folder")
    if unread is not None:
        unread.update(others)
    return sorted(found)


def tell(endings: Mapping[str, int]) -> str:
    """Counts of files by ending, the most frequent first: `20 .heic, 1 .txt`."""
    return ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items(), key=lambda e: (-e[1], e[0])))


def subfolders(root: Path, of: str = "class") -> list[str]:
    """Names of the folders in `root`, sorted, `is_helper`s aside: a folder for each class, or video.

    UserError for what is one too many or too few: no folder at all, an archive or an image between them, a file without
    any suffix, a link that leads nowhere. Texts and tables may lie there.
    """
    entries = sorted((entry for entry in root.iterdir() if not is_helper(entry.name)), key=lambda e: e.name)
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


def fingerprint(paths: Iterable[str | bytes | os.PathLike], labels: Tensor | None = None) -> tuple[int, str]:
    """How many files a list has, and a hash of it: names below their common folder, in order, labels, and sizes.

    It stays as it is when the data moves. The sizes of at most `HASHED` files, evenly spread, are looked up; of a
    folder (the frames of a video) its number of entries.
    """
    names = [os.fsencode(path) for path in paths]
    ends = [os.fsdecode(name) for name in (min(names), max(names))] if names else [""]  # what these share, all share
    start = len(os.fsencode(os.path.commonprefix(ends).rpartition("/")[0]))
    digest = hashlib.sha256(b"\0".join(name[start:] for name in names))
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    for name in names[:: max(1, -(-len(names) // HASHED))]:
        try:
            found = os.stat(name)
            size = len(os.listdir(name)) if stat.S_ISDIR(found.st_mode) else found.st_size
        except OSError:
            size = -1
        digest.update(b"%d " % size)
    return len(names), digest.hexdigest()[:32]


class ImageList(Dataset):
    """Images with integer labels (-1 where there is none); `transform` draws from the global RNGs (see `Keyed`).

    File names, labels and cached images are a few tensors, however many images there are: the loader's processes share
    them. Of Python objects each process would get copies, page by page, as it counts their references.

    Args:
        samples: path and label of each image.
        cache: decode everything now and keep it in memory.

    Attributes:
        unread: files that lie between the images and are none, counted by ending.
    """

    def __init__(
        self,
        samples: Iterable[tuple[str | os.PathLike, int]],
        classes: list[str],
        transform: Callable | None = None,
        cache: bool = False,
    ):
        names, ends, labels = bytearray(), array("q", [0]), array("q")
        for path, label in samples:
            names += os.fsencode(path)  # as it is on the disk, UTF-8 or not
            ends.append(len(names))
            labels.append(int(label))
        bounds = torch.from_numpy(np.array(ends, np.int64))
        self._names = torch.from_numpy(np.array(names, np.uint8))  # all of them, one after the other
        self._starts, self._ends = bounds[:-1], bounds[1:]  # [N] where in it each name is
        self._labels = torch.from_numpy(np.array(labels, np.int64))
        self.classes, self.transform = classes, transform
        self.unread: Mapping[str, int] = {}
        self._array: Tensor | None = None  # [N, H, W, 3]
        self._pixels: Tensor | None = None  # images of several sizes, one after the other
        self._first = self._sizes = torch.empty(0, dtype=torch.int64)  # their offsets [N] and [N, 2] (H, W)
        if cache:
            self._decode()

    def _decode(self) -> None:
        """Keep all images; UserError when they would take more than half of the machine's memory."""
        count = len(self)
        some = [self.pixels(i).nbytes for i in range(0, count, max(1, count // 16))]
        need = count * sum(some) / max(1, len(some))
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > have / 2:
            raise UserError(
                f"--cache: {count} decoded images take about {need / 2**30:.0f} GiB and this machine has "
                f"{have / 2**30:.0f}; leave --cache away"
            )
        flat, sizes = bytearray(), np.empty((count, 2), np.int64)
        for i in range(count):
            pixels = self.pixels(i)
            flat += pixels.tobytes()
            sizes[i] = pixels.shape[:2]
        memory = torch.from_numpy(np.frombuffer(flat, np.uint8) if flat else np.empty(0, np.uint8))  # not copied
        if count and (sizes == sizes[0]).all():
            self._array = memory.view(count, *sizes[0].tolist(), 3)
        else:
            self._pixels, self._sizes = memory, torch.from_numpy(sizes)
            length = 3 * self._sizes.prod(1)
            self._first = length.cumsum(0) - length

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def labels(self) -> Tensor:
        """Labels [N], int64; not a copy."""
        return self._labels

    @property
    def has_labels(self) -> bool:
        """Whether labels tell images apart: there are two of them at the least."""
        return bool((self._labels != self._labels[:1]).any())

    def told(self) -> str:
        """How many, for the preflight."""
        return f"{len(self)} images" + (
            f" of {len(self._labels.unique())} classes" if self.has_labels else ", without labels"
        )

    @property
    def array(self) -> np.ndarray | None:
        """Images in memory [N, H, W, 3], uint8; None where they are not there, or of several sizes."""
        return None if self._array is None else self._array.numpy()

    @property
    def decoded(self) -> bool:
        """Whether the images lie in memory."""
        return self._array is not None or self._pixels is not None

    def file(self, index: int) -> str:
        """The path as text. A `Path` would leave its parts in python's table of strings, of each process."""
        return os.fsdecode(self._names[self._starts[index] : self._ends[index]].numpy().tobytes())

    def path(self, index: int) -> Path:
        return Path(self.file(index))

    def _all_names(self) -> list[bytes]:
        names = self._names.numpy().tobytes()
        return [names[start:end] for start, end in zip(self._starts.tolist(), self._ends.tolist())]

    def paths(self) -> list[Path]:
        """All paths, made anew."""
        return [Path(os.fsdecode(name)) for name in self._all_names()]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def pixels(self, index: int) -> np.ndarray:
        """The decoded image [H, W, 3], uint8; where it lies in memory it is not copied: do not write into it."""
        if self._array is not None:
            return self._array[index].numpy()
        if self._pixels is not None:
            first, (height, width) = int(self._first[index]), self._sizes[index].tolist()
            return self._pixels[first : first + 3 * height * width].view(height, width, 3).numpy()
        return np.array(load_image(self.file(index), turn=True))

    def image(self, index: int) -> Image.Image:
        """The decoded image, RGB."""
        return Image.fromarray(self.pixels(index)) if self.decoded else load_image(self.file(index), turn=True)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.label(index), index

    def take(
        self, indices: Sequence[int] | np.ndarray | Tensor | slice, labels: Sequence[int] | Tensor | None = None
    ) -> "ImageList":
        """The images of these indices in this order, with the transform; decoded ones stay decoded.

        `labels` [n] replace their own. Of a slice nothing is copied.
        """
        rows = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)
        new = copy.copy(self)
        new._starts, new._ends = self._starts[rows], self._ends[rows]
        if self._array is not None:
            new._array = self._array[rows]
        if self._pixels is not None:
            new._first, new._sizes = self._first[rows], self._sizes[rows]
        new._labels = self._labels[rows] if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if len(new._labels) != len(new):
            raise ValueError(f"{len(new._labels)} labels for {len(new)} images")
        return new

    def cached(self) -> "ImageList":
        """The same images, decoded and kept in memory."""
        if self.decoded:
            return self
        new = copy.copy(self)
        new._decode()
        return new

    def fingerprint(self) -> tuple[int, str]:
        """See `fingerprint`: equal for the same images and labels in another place."""
        return fingerprint(self._all_names(), self._labels)


class ArrayImages(ImageList):
    """Images of an array [N, H, W, 3], uint8, in memory; their paths are their numbers in it."""

    def __init__(self, array: np.ndarray, labels: Iterable[int], classes: list[str]):
        super().__init__(((str(i), y) for i, y in enumerate(labels)), classes)
        if len(self) != len(array):
            raise ValueError(f"{len(self)} labels for {len(array)} images")
        self._array = torch.from_numpy(array)

    def fingerprint(self) -> tuple[int, str]:
        """Of pixels and labels, of at most `HASHED` images, evenly spread."""
        assert self._array is not None
        digest = hashlib.sha256(self._labels.numpy().tobytes())
        for image in self._array[:: max(1, -(-len(self) // HASHED))].numpy():
            digest.update(image.tobytes())
        return len(self), digest.hexdigest()[:32]


def per_class(images: ImageList, count: int, cache: bool = False) -> ImageList:
    """The first `count` images of each class, in the same order; 0: all of them."""
    if count:
        by_class, rows = images.labels.sort(stable=True)
        sizes = by_class.unique_consecutive(return_counts=True)[1]
        place = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        images = images.take(rows[place < count].sort().values)
    return images.cached() if cache else images


def image_folder(root: str | os.PathLike, transform: Callable | None = None) -> ImageList:
    """`root/CLASS/**/*.jpg`, classes in alphabetical order. UserError for no class and for a class without images."""
    root = need_folder(root, f"expected {root}/CLASS/*.jpg")
    classes, unread = subfolders(root), Counter[str]()
    found = ((path, y) for y, name in enumerate(classes) for path in list_images(root / name, unread))
    images = ImageList(found, classes, transform)
    images.unread = unread
    return images


def flat_folder(root: str | os.PathLike, transform: Callable | None = None) -> ImageList:
    """Unlabelled images anywhere below `root`; every label is -1."""
    unread = Counter[str]()
    images = ImageList(((path, -1) for path in list_images(root, unread)), [], transform)
    images.unread = unread
    return images


def training_folder(
    data_dir: str | os.PathLike, count: int = 0, cache: bool = False, transform: Callable | None = None
) -> ImageList:
    """`data_dir`/train where that is a folder, else `data_dir`: class folders, or images that lie there without labels.

    Args:
        count: the first so many images of each class; 0: all. cache: decode everything now and keep it in memory.

    UserError: neither folder is there, it holds no image, or `count` where there are no classes.
    """
    root = Path(data_dir) / "train"
    if not root.is_dir():
        if not Path(data_dir).is_dir():
            need_folder(root, f"expected {root}/CLASS/*.jpg, or images of your own in {data_dir}")
        root = Path(data_dir)
    entries = [entry for entry in root.iterdir() if not is_helper(entry.name)]
    if any(e.suffix.lower() in EXTENSIONS for e in entries) or not any(e.is_dir() for e in entries):
        images = flat_folder(root, transform)  # where there is none, it says what lies there
        if count:
            raise UserError(f"--per_class {count}: the images of {root} lie in no class folders; leave it away")
        return per_class(images, 0, cache)
    return per_class(image_folder(root, transform), count, cache)


def list_rows(file: str | os.PathLike, what: str) -> list[tuple[int, str, int | None]]:
    """Number of the line, name and label (None: the line has none) of every line of a list that is not empty.

    Blanks around a line and the ends of lines of other systems are no part of a name; blanks inside are, and quotes
    may stand around it. A label is the number that stands last. UserError: some lines have a label and others not.
    """
    rows: list[tuple[int, str, int | None]] = []
    for number, line in enumerate(read_text(file, what).splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        if line[0] == '"':
            name, *rest = next(csv.reader([line], delimiter=" ", skipinitialspace=True))
            label = " ".join(rest).strip()
        else:
            found = re.fullmatch(r"(.*[^\s,])[\s,]+(\d+)", line)
            name, label = (found[1], found[2]) if found else (line, "")
        if label and not label.isdecimal():
            raise UserError(f"{file}, line {number}: expected {what}, found {line!r}")
        rows.append((number, name, int(label) if label else None))
        if (rows[0][2] is None) != (not label):
            has = "a label" if label else "no label"
            raise UserError(f"{file}, line {number}: {has}, other than line {rows[0][0]}; expected {what}")
    return rows


def find_listed(root: Path, name: str) -> Path | None:
    """The file that a list names, below `root` where it can be; None where it is not there.

    The name may be absolute, begin with `./`, have the separators of Windows, or begin with the last folders of `root`.
    """
    for spelt in (name, name.replace("\\", "/")) if "\\" in name else (name,):
        wanted = Path(os.path.normpath(spelt))
        if wanted.is_absolute():
            for whole, top in ((wanted, Path(os.path.abspath(root))), (wanted.resolve(), root.resolve())):
                if whole.is_relative_to(top) and (root / whole.relative_to(top)).is_file():
                    return root / whole.relative_to(top)
            if wanted.is_file():
                return wanted
            continue
        if (root / wanted).is_file():
            return root / wanted
        above = Path(os.path.abspath(root)).parts
        for n in range(1, min(len(wanted.parts), len(above))):
            if wanted.parts[:n] == above[-n:] and root.joinpath(*wanted.parts[n:]).is_file():
                return root.joinpath(*wanted.parts[n:])
    return None


def list_file(
    file: str | os.PathLike, root: str | os.PathLike, transform: Callable | None = None, repeats: bool = False
) -> ImageList:
    """Subset lists (1% / 10% of ImageNet): a line is `CLASS/image.jpg` or `image.jpg LABEL`, relative to `root`.

    In the first form classes are numbered as `image_folder(root)` does. UserError for a missing list or image, and for
    an image that is there twice, unless the list may have `repeats`.
    """
    file, root = Path(file), Path(root)
    what = "`CLASS/image.jpg` or `image.jpg LABEL` a line"
    rows = list_rows(file, f"a list of images, {what}")
    classes: list[str] = []
    if rows[0][2] is None:
        classes = subfolders(need_folder(root, f"expected {root}/CLASS/*.jpg"))
    numbers, samples = {name: y for y, name in enumerate(classes)}, []
    seen: dict[Path, int] = {}
    for number, name, label in rows:
        path = find_listed(root, name)
        if path is None:
            if find_listed(root, name.split()[0]):
                raise UserError(f"{file}, line {number}: expected {what}, found {name!r}")
            raise UserError(
                f"{file}, line {number}: {root / name} does not exist; expected {what}, below {root}; check the root "
                "that the list refers to"
            )
        if label is None:
            parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
            if len(parts) < 2 or parts[0] not in numbers:
                raise UserError(f"{file}, line {number}: {path} is in no class folder of {root}; expected {what}")
            label = numbers[parts[0]]
        if (first := seen.setdefault(path, number)) != number and not repeats:
            raise UserError(f"{file}, line {number}: {name} stands in line {first} already; remove one of them")
        samples.append((path, label))
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
    """Batches of (epoch, index) for one process.

    The permutation of an epoch depends on (seed, epoch); global batch g is cut into `world` contiguous shares, so N
    processes see together what one process sees. `at(epoch, step)` starts the next iteration inside an epoch.

    Args:
        least: the last, incomplete global batch is kept where each process gets so many of its samples (batch norms of
            a single image cannot train); 0: always. None: it is dropped. Its shares differ by one sample at most: a
            process's mean loss times `weight(step)`, averaged over processes, is the mean over the global batch.

    Raises:
        UserError: not one batch.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True,
        least: int | None = None,
    ):  # fmt: skip
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.shuffle, self.epoch, self.start = shuffle, 0, 0
        rest = size % (batch_size * world)
        self.rest = rest if least is not None and rest // world >= least else 0
        if not self.steps_per_epoch:
            raise UserError(f"a global batch of {batch_size * world} needs as many samples, the data has {size}")

    def __len__(self) -> int:
        return self.steps_per_epoch - self.start

    @property
    def steps_per_epoch(self) -> int:
        return self.size // (self.batch_size * self.world) + (self.rest > 0)

    def share(self, step: int) -> tuple[int, int, int]:
        """This process's samples of the global batch of a step, from first to last - 1, and how many the batch has."""
        if (step + 1) * self.batch_size * self.world <= self.size:
            return self.rank * self.batch_size, (self.rank + 1) * self.batch_size, self.batch_size * self.world
        each, more = divmod(self.rest, self.world)
        first = self.rank * each + min(self.rank, more)
        return first, first + each + (self.rank < more), self.rest

    def weight(self, step: int) -> float:
        """This process's part of the global batch of a step over that of equal shares: 1 but for the last batch."""
        first, last, total = self.share(step)
        return (last - first) * self.world / total

    def at(self, epoch: int, step: int = 0) -> "EpochSampler":
        self.epoch, self.start = epoch, step
        return self

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: np.ndarray = np.arange(self.size)
        if self.shuffle:
            order = np.random.Generator(np.random.PCG64(mix_key(self.seed, self.epoch))).permutation(self.size)
        for step in range(self.start, self.steps_per_epoch):
            batch = order[step * self.world * self.batch_size :]
            first, last, _ = self.share(step)
            if first == last:  # a process without a sample takes one that weighs nothing
                first, last = 0, 1
            yield [(self.epoch, int(i)) for i in batch[first:last]]
