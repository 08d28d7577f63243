"""Segmentation sets in their official trees, and their union label space (paper 2106.04121, section 3).

Local ids are uint8 with 255 = ignore: the largest set has 171 classes. Union ids are int64 with -1 = ignore, because
with VOC + ADE20K + COCO-Stuff (342 classes) union id 255 is a class; ignore is turned into -1 *before* the offset.

A photo and its label map are both read as stored: no orientation tag turns one of them, also inside mmsegmentation,
whose runs read through this module. Label conventions follow mmsegmentation 1.x.

LabelMeFacade: `mdp/splits/labelmefacade_holdout.txt` holds the 200 of the 845 official test images whose stems have the
smallest sha256; `labelmefacade_pretrain.txt` holds the 100 official train images (by name), then the other 645 test
images (by sha256). Class names and palettes: `mdp/classes/*.txt`, one `R G B name` a line in the order of the ids.
"""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from shared_utils import UserError
from shared_utils.data import ImageList, check_png, fingerprint, is_helper, load_image, read_text, walk

HERE = Path(__file__).resolve().parent
IGNORE = 255  # in local maps; -1 in the union space
_INVALID = 254  # in lookup tables: a raw id the set does not define
CHECKED = 8  # files of a split that are decoded and checked before a run starts
PNG = b"\x89PNG\r\n\x1a\n"
COCO_HOLES = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})  # raw ids 0..181 that no COCO-Stuff class has

Pair = tuple[Path, Path]


def lookup(raw_ids: Iterable[int], ignore: Iterable[int] = ()) -> np.ndarray:
    """uint8 [256]: raw id -> local id 0.. in the order of `raw_ids`; 255 and `ignore` -> 255; others are invalid."""
    table = np.full(256, _INVALID, np.uint8)
    table[[IGNORE, *ignore]] = IGNORE
    raw = list(raw_ids)
    table[raw] = np.arange(len(raw), dtype=np.uint8)
    return table


RAW_COCO = lookup(i for i in range(182) if i not in COCO_HOLES)


# Pairs: which files belong together --------------------------------------------------------------------------------


def _found(folder: Path, pattern: str, endings: Sequence[str], unread: Counter[str] | None = None) -> dict[str, Path]:
    """{path below `folder` without its ending: path}, sorted; one directory listing instead of a stat per file.

    An empty pattern is for files at any depth, through links (`walk` and its UserErrors).
    Endings in any case; `is_helper`s are none of the set's. `unread` counts other files by the suffix of their names.
    UserError: two files that differ in their ending alone.
    """
    found: dict[str, Path] = {}
    files = folder.glob(pattern) if pattern else (where / name for where, names in walk(folder) for name in names)
    for path in sorted(files):
        key = path.relative_to(folder).as_posix()
        if any(map(is_helper, key.split("/"))):
            continue
        for ending in endings:
            if key.lower().endswith(ending.lower()):
                stem = key[: -len(ending)]
                if stem in found:
                    raise UserError(f"{path}: {found[stem].name} beside it has the same name; keep one of the two")
                found[stem] = path
                break
        else:
            if unread is not None and path.is_file():
                unread[path.suffix.lower() or "without suffix"] += 1
    return found


def _matched(
    name: str, images: dict[str, Path], labels: dict[str, Path], label_at: Callable[[str], Path]
) -> list[Pair]:
    """Pairs by equal keys; UserError names the first image without label, or label without image."""
    for key, path in images.items():
        if key not in labels:
            raise UserError(
                f"{name}: image {path} has no label; expected {label_at(key)} (add it, or remove the image)"
                + _lossy(label_at(key))
            )
    for key, path in labels.items():
        if key not in images:
            raise UserError(f"{name}: label {path} has no image beside it; add the image or remove the label")
    return [(images[key], labels[key]) for key in images]


def _lossy(expected: Path) -> str:
    """A hint where the label map that is missing lies there as a JPEG."""
    for ending in (".jpg", ".jpeg", ".JPG", ".JPEG"):
        if (file := expected.with_suffix(ending)).is_file():
            return f"; {file.name} is no label map: JPEG changes the numbers, export it as PNG"
    return ""


def folders(
    tree: Path,
    split: str,
    unread: Counter[str],
    *,
    name: str,
    images: str,
    labels: Sequence[str],
    endings: tuple[str, ...] = (".jpg",),
    label_endings: tuple[str, ...] = (".png",),
    depth: int = 1,
) -> list[Pair]:
    """Sets whose split is a folder, `{}`; of `labels` x `label_endings` the first that has files wins; depth 0: any."""
    image_dir = tree / images.format(split)
    pattern = "/".join("*" * depth)
    found = _found(image_dir, pattern, endings, unread)
    if not found:
        return []
    options = [(tree / labels_dir.format(split), ending) for ending in label_endings for labels_dir in labels]
    for label_dir, ending in options:
        found_labels = _found(label_dir, pattern, (ending,))
        if found_labels:
            return _matched(name, found, found_labels, lambda key, at=label_dir, end=ending: at / f"{key}{end}")  # type: ignore[misc]
    at, end = options[0]
    return _matched(name, found, {}, lambda key: at / f"{key}{end}")


def _stems(file: Path, name: str) -> list[str]:
    """The images of a list, in its order: stems, file names, or paths, also DeepLab's `PHOTO LABEL` a line.

    UserError: the list is missing, an image stands in it twice, or a second column that is no label map (the lists of
    VOC's single classes hold 1 or -1 there, and every image of the set).
    """
    if not file.is_file():
        raise UserError(f"{name}: split list {file} is missing; restore it from the set's archive")
    stems = []
    for number, line in enumerate(read_text(file, f"the set's own list of {name}").splitlines(), 1):
        if not (words := line.split()):
            continue
        stem, *more = (re.sub(r"\.(jpe?g|png)$", "", os.path.basename(word), flags=re.IGNORECASE) for word in words)
        if more and more != [stem]:
            raise UserError(
                f"{name}: {file}, line {number}: expected an image, or an image and its label map, found"
                f" {line.strip()!r}; take the set's list of a whole split"
            )
        stems.append(stem)
    stem, times = Counter(stems).most_common(1)[0]
    if times > 1:
        raise UserError(f"{name}: {file} names {stem} {times} times; each image once")
    return stems


def _lists(tree: Path, split: str, unread: Counter[str], *, name: str, lists: str, labels: Sequence[str]) -> list[Pair]:
    """Sets whose split is a list of stems; the first folder of `labels` that has a stem's map wins."""
    file = tree / lists.format(split)
    images = _found(tree / "JPEGImages", "*", (".jpg",), unread)
    maps = [_found(tree / folder, "*", (".png",)) for folder in labels]
    pairs = []
    for stem in _stems(file, name):
        if stem not in images:
            raise UserError(
                f"{name}: {file} names {stem}, but {tree / 'JPEGImages' / stem}.jpg does not exist; restore it"
            )
        label = next((found[stem] for found in maps if stem in found), None)
        if label is None:
            expected = [tree / folder / f"{stem}.png" for folder in labels]
            hint = next(filter(None, map(_lossy, expected)), "")
            where = " or ".join(map(str, expected))
            raise UserError(f"{name}: image {images[stem]} has no label; expected {where}{hint}")
        pairs.append((images[stem], label))
    return pairs


def _labelmefacade(tree: Path, split: str, unread: Counter[str]) -> list[Pair]:
    """Official train/test folders, or the frozen lists `pretrain` and `holdout` over both."""
    read = partial(folders, tree, name="labelmefacade", images="images/{}", labels=["labels/{}"])
    if split in ("train", "test"):
        return read(split, unread)
    file = HERE / "splits" / f"labelmefacade_{split}.txt"
    pairs = {pair[0].stem: pair for folder in ("train", "test") for pair in read(folder, unread)}
    stems = _stems(file, "labelmefacade")
    for stem in stems:
        if stem not in pairs:
            raise UserError(
                f"labelmefacade: {file} names {stem}.jpg, but {tree}/images has it in neither train nor test"
            )
    return [pairs[stem] for stem in stems]


# The nine sets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """How one set lies on disk: its tree below the data root, its splits, its label convention."""

    tree: str
    layout: str  # of the tree, for error messages
    splits: dict[str, str]  # our split name -> the set's own
    pairs: Callable[[Path, str, Counter[str]], list[Pair]]  # counts what else lies between the photos
    classes: str  # file in mdp/classes
    raw: range  # raw ids of the classes, in order
    ignore: tuple[int, ...] = ()  # besides 255
    palette: bool = False  # maps may be palette PNG
    reduced: bool = False  # other tools store the maps shifted by one, 0 as 255, which the set's own maps never hold


TRAIN_VAL = {"train": "train", "val": "val"}
CONTEXT = Reader(
    tree="VOCdevkit/VOC2010",
    layout="{JPEGImages,SegmentationClassContext,ImageSets/SegmentationContext/{train,val}.txt}",
    splits=TRAIN_VAL,
    pairs=partial(
        _lists, name="context", lists="ImageSets/SegmentationContext/{}.txt", labels=["SegmentationClassContext"]
    ),
    classes="context",
    raw=range(60),
    palette=True,
)
READERS: dict[str, Reader] = {
    "voc": Reader(
        tree="VOCdevkit/VOC2012",
        layout="{JPEGImages,SegmentationClass,SegmentationClassAug,ImageSets/Segmentation/{trainaug,val}.txt}",
        splits={"train": "trainaug", "trainaug": "trainaug", "val": "val"},  # SBD's own val holds images of VOC's val
        # VOC's own map wins over SBD's, as in mmsegmentation's voc12aug: only it has the 255 border.
        pairs=partial(
            _lists,
            name="voc",
            lists="ImageSets/Segmentation/{}.txt",
            labels=["SegmentationClass", "SegmentationClassAug"],
        ),
        classes="voc",
        raw=range(21),
        palette=True,
    ),
    "ade": Reader(
        tree="ade/ADEChallengeData2016",
        layout="{images,annotations}/{training,validation}",
        splits={"train": "training", "val": "validation"},
        pairs=partial(folders, name="ade", images="images/{}", labels=["annotations/{}"]),
        classes="ade",
        raw=range(1, 151),
        ignore=(0,),  # 0 is "other"; the classes are 1..150
        reduced=True,
    ),
    "coco": Reader(
        tree="coco_stuff164k",
        layout="{images,annotations}/{train2017,val2017}, labels *_labelTrainIds.png (or the raw stuffthingmaps *.png)",
        splits={"train": "train2017", "val": "val2017"},
        pairs=partial(
            folders,
            name="coco",
            images="images/{}",
            labels=["annotations/{}", "stuffthingmaps/{}"],
            label_endings=("_labelTrainIds.png", ".png"),
        ),
        classes="coco",
        raw=range(171),
    ),
    "cityscapes": Reader(
        tree="cityscapes",
        layout="leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png",
        splits=TRAIN_VAL,
        pairs=partial(
            folders,
            name="cityscapes",
            images="leftImg8bit/{}",
            labels=["gtFine/{}"],
            endings=("_leftImg8bit.png",),
            label_endings=("_gtFine_labelTrainIds.png",),
            depth=2,
        ),
        classes="cityscapes",
        raw=range(19),
    ),
    "context": CONTEXT,
    "context59": Reader(
        tree=CONTEXT.tree,
        layout=CONTEXT.layout,
        splits=TRAIN_VAL,
        pairs=CONTEXT.pairs,
        classes="context",
        raw=range(1, 60),
        ignore=(0,),  # the background is no class
        palette=True,
        reduced=True,
    ),
    "camvid": Reader(
        tree="camvid11",
        layout="{images,labels}/{train,val,test}",
        splits={"train": "train", "val": "val", "test": "test"},
        pairs=partial(
            folders, name="camvid", images="images/{}", labels=["labels/{}"], endings=(".jpg", ".jpeg", ".png")
        ),
        classes="camvid",
        raw=range(11),
        ignore=(11,),  # unlabelled
    ),
    "labelmefacade": Reader(
        tree="labelmefacade8",
        layout="{images,labels}/{train,test}",
        splits={"train": "train", "pretrain": "pretrain", "holdout": "holdout", "test": "test"},
        pairs=_labelmefacade,
        classes="labelmefacade",
        raw=range(8),
    ),
    "ccp": Reader(
        tree="ccp59",
        layout="{images,labels}",
        splits={"train": "train"},  # no official split: all 1004 images
        pairs=partial(folders, name="ccp", images="images", labels=["labels"]),
        classes="ccp",
        raw=range(59),  # 0, "null", is the background; like VOC's it counts as a class
    ),
}
NAMES = tuple(READERS)


def class_table(name: str) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Class names and RGB palette of a set, in the order of its local ids."""
    reader = READERS[name]
    rows = [line.split(maxsplit=3) for line in (HERE / "classes" / f"{reader.classes}.txt").read_text().splitlines()]
    rows = rows[len(rows) - len(reader.raw) :]  # context59 drops the background, the first row
    return tuple(row[3] for row in rows), tuple((int(r), int(g), int(b)) for r, g, b, _ in rows)


@cache
def _voc_colours() -> dict[tuple[int, int, int], int]:
    """{RGB: id} of the palette in VOC's maps: bit 3 j + k of an id is bit 7 - j of colour k."""
    ids, place = np.arange(256)[:, None], np.arange(8)
    channels = [(((ids >> (3 * place + k)) & 1) << (7 - place)).sum(1).tolist() for k in range(3)]
    return {colour: i for i, colour in enumerate(zip(*channels))}


def stored_ids(path: str | Path, by_index: bool = False) -> tuple[np.ndarray, str]:
    """The numbers that a PNG stores, [H, W] uint8 or uint16, and its PIL mode: 1, 2, 4, 8 or 16 bits of grey, or the
    index of a palette, which is mode L where the palette is that of the greys.

    Decoders stretch 2 and 4 bits to 0..255. A palette that holds VOC's colours at other places than VOC's was
    re-ordered by an optimiser, and counts by its colours, unless `by_index`. Other modes are returned as they are.
    UserError: unreadable, or another format, JPEG above all.
    """
    try:
        with Image.open(path) as image:
            image.load()
        if image.format == "PNG":
            check_png(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the data root and the list that names it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove the file") from None
    if image.format != "PNG":
        why = ", which changes the numbers" if image.format in ("JPEG", "MPO", "JPEG2000") else ""
        raise UserError(f"{path}: a label map must be a PNG, this is {image.format}{why}; export it as PNG")
    stored = np.asarray(image)
    if image.mode in ("1", "I;16", "I"):
        return stored.astype(np.uint16 if image.mode[0] == "I" else np.uint8), image.mode
    if image.mode == "L":
        with open(path, "rb") as handle:
            depth = handle.read(25)[24]  # bits of a pixel, of the header
        return (stored // {2: 85, 4: 17}[depth] if depth in (2, 4) else stored), image.mode
    if image.mode != "P":
        return stored, image.mode
    table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = np.unique(stored)
    if used[-1] >= len(table):
        raise UserError(f"{path}: index {used[-1]} is outside its palette of {len(table)} colours; export it anew")
    shown = [tuple(colour) for colour in table[used].tolist()]
    if all(colour == (i, i, i) for i, colour in zip(used.tolist(), shown)):
        return stored, "L"
    ids = _voc_colours()
    if not by_index and all(colour in ids for colour in shown):
        order = np.zeros(256, np.uint8)
        order[used] = [ids[colour] for colour in shown]
        return order[stored], image.mode
    return stored, image.mode


def _turned(path: str) -> bool:
    """Whether an orientation tag of the photo turns it by 90 degrees."""
    with Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


class Pairs(Sequence[Pair]):
    """Photos and their label maps by number: two packed lists of names, no Python object a pair (see `ImageList`)."""

    def __init__(self, pairs: Sequence[Pair] = ()):
        self.photos, self.maps = (ImageList(((pair[part], -1) for pair in pairs), []) for part in (0, 1))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: Any) -> Any:
        """One pair, made anew; or those of a slice, as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.photos.path(index), self.maps.path(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True, eq=False)
class SegSet:
    """One split of one set. Local ids 0..len(classes)-1, 255 = ignore.

    Attributes:
        unread: files between the photos that are none of the set's, counted by suffix.
        palette_maps: maps may be palette PNG. by_index: their numbers count, whatever the colours.
        reduced: see `Reader`.
        notes: what the preflight says of the set besides its numbers.
        listed: a file of class names outside mdp/classes, part of the fingerprint.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    pairs: Pairs
    table: np.ndarray = field(repr=False)  # uint8 [256]: raw id -> local id
    unread: Mapping[str, int] = field(default_factory=dict)
    palette_maps: bool = False
    by_index: bool = False
    reduced: bool = False
    notes: tuple[str, ...] = ()
    listed: Path | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def fingerprint(self) -> tuple[int, str]:
        """See `shared_utils.data.fingerprint`: of all files, each photo before its map."""
        more = [self.listed] if self.listed else []
        return fingerprint([*(path for pair in self.pairs for path in pair), *more])

    @property
    def raw_ids(self) -> list[int]:
        """The number that the set's own maps hold for each class."""
        return np.flatnonzero(self.table < len(self.classes)).tolist()

    def label(self, i: int) -> np.ndarray:
        """uint8 [H, W] local ids. UserError names an unreadable map, a wrong PNG mode, an unknown id."""
        return self.read_map(self.pairs.maps.file(i))

    def read_map(self, path: str | Path) -> np.ndarray:
        """As `label`, of any map of the set."""
        raw, mode = stored_ids(path, self.by_index)
        if mode not in ("1", "L", "I;16", "I", *(["P"] if self.palette_maps else [])):
            expected = "grey ids" + (" or a palette" if self.palette_maps else "")
            raise UserError(f"{path}: PNG mode {mode!r}, but {self.name} maps hold {expected}; convert the label map")
        local = self.table[raw.astype(np.uint8, copy=False)]
        if raw.dtype != np.uint8:
            local[raw > 255] = _INVALID
        if (local == _INVALID).any():
            unknown = np.unique(raw[local == _INVALID]).tolist()
            hint = "check that the map follows the set's own convention"
            if self.listed:
                hint = (
                    f"add the names to {self.listed} (id 0 is its first line), or write 255 where nothing is labelled"
                )
            if self.reduced and unknown == [IGNORE]:
                hint = (
                    f"the set's own maps hold 0..{self.raw_ids[-1]}: this one looks reduced already (classes from 0,"
                    " ignored pixels 255), give the set's own"
                )
            raise UserError(
                f"{path}: label id {', '.join(map(str, unknown[:5]))} out of range, {self.name} defines"
                f" {len(self.classes)} classes; {hint}"
            )
        return local

    def load(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """RGB image [H, W] and its local ids, uint8 [H, W], both as stored. UserError also when their sizes differ."""
        photo = self.pairs.photos.file(i)
        image, label = load_image(photo), self.label(i)
        if image.size != label.shape[::-1]:
            size = f"{label.shape[1]}x{label.shape[0]}"
            hint = "they must have one size"
            if image.size == label.shape and _turned(photo):
                hint = "the label is of the photo as its orientation tag turns it: turn the photo itself, without a tag"
            raise UserError(
                f"{self.pairs.maps.file(i)}: label is {size}, but its image {photo} is"
                f" {image.width}x{image.height}; {hint}"
            )
        return image, label


def described(
    name: str, pairs: Sequence[Pair] = (), voc_background: str = "class", unread: Mapping[str, int] | None = None
) -> SegSet:
    """The classes and the label convention of a set, with these pairs."""
    reader = READERS[name]
    classes, palette = class_table(name)
    table = lookup(reader.raw, reader.ignore)
    if reader.reduced:
        table[IGNORE] = _INVALID
    if name == "coco" and pairs and not pairs[0][1].name.lower().endswith("_labeltrainids.png"):
        table = RAW_COCO
    if name == "voc" and voc_background == "ignore":
        classes, palette, table = classes[1:], palette[1:], lookup(reader.raw[1:], (0,))
    return SegSet(
        name, classes, palette, Pairs(pairs), table, unread or {}, palette_maps=reader.palette, reduced=reader.reduced
    )


def open_set(name: str, data_root: str | Path, split: str = "train", voc_background: str = "class") -> SegSet:
    """Find one split under `data_root`, pair images with labels and check up to eight files spread over it.

    `split="pretrain"` is the train list for every set but LabelMeFacade, which has its own. `voc_background="ignore"`
    leaves VOC 20 classes. UserError: unknown set or split, missing tree, empty split, unpaired, unreadable or
    mislabelled file.
    """
    if name not in READERS:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(NAMES)}, or name your own: {name}=FOLDER")
    reader, root = READERS[name], Path(data_root)
    splits = {"pretrain": reader.splits["train"], **reader.splits}
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; choose from {', '.join(splits)}")
    tree = root / reader.tree
    expected = f"expected {tree}/{reader.layout}"
    if not root.is_dir():
        raise UserError(f"data root {root} does not exist; set DATA_ROOT to the folder that holds {reader.tree}/")
    if not tree.is_dir():
        raise UserError(f"{name}: {tree} does not exist; set DATA_ROOT to the folder that holds it; {expected}")
    unread = Counter[str]()
    pairs = reader.pairs(tree, splits[split], unread)
    if not pairs:
        raise UserError(f"{name}: split {split!r} is empty, no image found; {expected}")

    opened = described(name, pairs, voc_background, unread)
    for i in sorted({round(j * (len(pairs) - 1) / (CHECKED - 1)) for j in range(CHECKED)}):
        opened.load(i)
    return opened


# Their union -------------------------------------------------------------------------------------------------------


def to_union(local: Tensor, offset: int | Tensor) -> Tensor:
    """Local uint8 ids (255 = ignore) of any shape -> int64 union ids, `offset + local`, -1 = ignore.

    Offsets of several sets broadcast.
    """
    ignored = local == IGNORE  # before the offset is added: afterwards 255 may be a class
    return (local.long() + offset).masked_fill_(ignored, -1)


class UnionDataset(Dataset):
    """Concatenation of sets whose classes are put side by side, never merged: C = sum of the C_i (paper 2106.04121).

    `transform(image, label)` gets PIL images (RGB, and mode L with local ids) and returns two views (q, q_label, k,
    k_label). `cache_size=S > 0` scales each image with a shorter side above S down to S once and keeps it decoded in
    the memory of the worker process that read it, so keep workers alive between epochs.
    """

    def __init__(self, sets: Sequence[SegSet], transform: Callable, cache_size: int = 0):
        names = [s.name for s in sets]
        if len(set(names)) < len(names):
            raise UserError(f"data sets {', '.join(names)}: one is named twice, its classes would exist twice")
        self.sets, self.transform, self.cache_size = list(sets), transform, cache_size
        counts = [len(s.classes) for s in sets]
        self.offsets: list[int] = [sum(counts[:i]) for i in range(len(counts))]
        self.num_classes = sum(counts)
        self.class_slices = [slice(o, o + c) for o, c in zip(self.offsets, counts)]
        self.dataset_of_class = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))  # [C]
        self._ends = np.cumsum([len(s) for s in sets]).tolist()
        self._cache: dict[int, tuple[Image.Image, Image.Image]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Index in the union -> (number of the set, index in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} outside a union of {len(self)} images")
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number] - len(self.sets[number]))

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and label (mode L, local ids, 255 = ignore) as the transform gets them."""
        if index in self._cache:
            return self._cache[index]
        number, i = self.locate(index)
        image, ids = self.sets[number].load(i)
        label = Image.fromarray(ids)
        if self.cache_size:
            scale = self.cache_size / min(image.size)
            if scale < 1:
                size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
                image = image.resize(size, Image.Resampling.BILINEAR)
                label = label.resize(size, Image.Resampling.NEAREST)
            self._cache[index] = image, label
        return image, label

    def __getitem__(self, index: int) -> dict[str, Any]:
        """q, k: float [3, s, s]; q_label, k_label: int64 [s, s] union ids, -1 = ignore; dataset, index: int."""
        number = self.locate(index)[0]
        q, q_label, k, k_label = self.transform(*self.read(index))
        offset = self.offsets[number]
        labels = {"q_label": to_union(q_label, offset), "k_label": to_union(k_label, offset)}
        return {"q": q, "k": k, **labels, "dataset": number, "index": index}

    def describe(self) -> str:
        """One line a set: images, classes and their union ids; then the total and the cache."""
        lines = [
            "; ".join(
                [f"{s.name}: {len(s)} images, {len(s.classes)} classes, union ids {c.start}..{c.stop - 1}", *s.notes]
            )
            for s, c in zip(self.sets, self.class_slices)
        ]
        cache = f"decoded in memory, shorter side at most {self.cache_size}" if self.cache_size else "off"
        return "\n".join([*lines, f"union: {len(self)} images, {self.num_classes} classes; image cache {cache}"])
