"""Your own segmentation sets, beside the known ones: `--datasets voc mine=FOLDER other=FOLDER`.

    FOLDER/images/      photos, in any sub-folders
    FOLDER/labels/      a PNG label map of the same name for each: grey ids, or the index of a palette
    FOLDER/classes.txt  one class a line; the first line is id 0

255 is void, and so is each id whose line in classes.txt says `void`. Where `images/` and `labels/` have the folders
`train` and `val` (`test`, too), these are the splits. Otherwise a tenth of the photos is held out: those whose names
have the smallest sha256. All numbers are checked before a run starts, of up to 2,000 label maps.
"""

import argparse
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mdp.datasets import IGNORE, READERS, Pair, Pairs, SegSet, described, folders, lookup, open_set
from shared_utils import UserError
from shared_utils.data import EXTENSIONS, is_helper, load_image, need_folder, read_text
from shared_utils.pictures import voc_palette

SPLITS = ("train", "val", "test")
VOID = "void"
LAYOUT = "images/, labels/ (PNG maps under the photos' names) and classes.txt (one class a line, ids from 0)"
CHECKED = 2000  # label maps that are read before a run starts
EVERY = 10  # one of so many photos is held out where there are no splits

Folders = Mapping[str, Path]


# --datasets --------------------------------------------------------------------------------------------------------


def split_words(words: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """`voc,ade mine=FOLDER` -> ([voc, ade, mine], {mine: FOLDER}).

    UserError: no name, a known set's name, no folder.
    """
    names: list[str] = []
    own: dict[str, str] = {}
    for word in words:
        head, sign, folder = word.partition("=")
        listed = [name for name in head.split(",") if name]
        names += listed
        if not sign:
            continue
        name = listed[-1] if listed else ""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(f"--datasets {word}: give NAME=FOLDER, the name of letters, digits, _ . -")
        if name in READERS:
            raise UserError(f"--datasets {word}: {name} is a known set, read below --data-root; give another name")
        if not folder:
            raise UserError(f"--datasets {word}: no folder after {name}=")
        own[name] = folder
    return names, own


class Datasets(argparse.Action):
    """Names go to `datasets`, with commas between, and NAME=FOLDER to `data`: where data lies is no method flag."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        names, own = split_words(values)
        if self.dest == "datasets":
            namespace.datasets = ",".join(names)
        elif len(own) < len(names):
            raise UserError(f"--own_data {' '.join(values)}: give NAME=FOLDER")
        merged = {**own_folders(namespace.data), **own}
        namespace.data = [f"{name}={folder}" for name, folder in merged.items()] or None


def add_datasets_flags(parser: argparse.ArgumentParser, default: str | None, text: str) -> None:
    """--datasets, and --own_data for sets that have moved since a checkpoint was written."""
    form = "NAME=FOLDER"
    parser.add_argument("--datasets", nargs="+", action=Datasets, default=default, metavar=form, help=text)
    moved = "where own sets of --datasets lie now, of a run that knows their names"
    parser.add_argument("--own_data", dest="data", nargs="+", action=Datasets, default=None, metavar=form, help=moved)


def own_folders(data: Sequence[str] | None) -> dict[str, Path]:
    """What `--own_data` holds as {name: folder}."""
    pairs = (word.partition("=") for word in data or [])
    return {name: Path(folder).expanduser() for name, _, folder in pairs}


# Sets of both kinds ------------------------------------------------------------------------------------------------


def open_named(
    name: str, own: Folders, data_root: str | Path, split: str = "train", background: str = "class", check: bool = True
) -> SegSet:
    """A split of an own set, if `own` has the name, else of a known one (`open_set`). UserError as both."""
    if name in own:
        return open_own(name, own[name], split, check)
    return open_set(name, data_root, split, background)


def describe_named(name: str, own: Folders, background: str = "class") -> SegSet:
    """Classes and label convention alone, without files."""
    return empty(name, own[name]) if name in own else described(name, voc_background=background)


def val_split(name: str, own: Folders) -> str:
    """The split that pretraining never reads; where a set has none, its training images (and the result says so)."""
    has = splits(own[name]) or SPLITS[:2] if name in own else READERS[name].splits
    return next((s for s in ("val", "holdout", "test") if s in has), "train")


@dataclass(frozen=True)
class Taxonomy:
    """What predictions need of a set, as checkpoints keep it: its classes' names, numbers in label maps, and RGB."""

    name: str
    classes: tuple[str, ...]
    ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(found: SegSet) -> "Taxonomy":
        return Taxonomy(found.name, found.classes, tuple(found.raw_ids), found.palette)

    @staticmethod
    def read(stored: Mapping[str, Any]) -> "Taxonomy":
        """What `stored()` gave."""
        return Taxonomy(
            stored["name"], tuple(stored["classes"]), tuple(stored["ids"]), tuple(map(tuple, stored["palette"]))
        )

    def stored(self) -> dict[str, Any]:
        colours = [list(colour) for colour in self.palette]
        return {"name": self.name, "classes": list(self.classes), "ids": list(self.ids), "palette": colours}


# Own sets ----------------------------------------------------------------------------------------------------------


def read_classes(file: Path) -> tuple[list[str], list[int]]:
    """Names of the classes and of the void ids in a classes.txt. UserError: missing, empty lines, twice, too many."""
    lines = [line.strip() for line in read_text(file, "one class a line, ids from 0").rstrip().splitlines()]
    void = [i for i, line in enumerate(lines) if line.lower() == VOID]
    classes = [line for line in lines if line.lower() != VOID]
    if "" in classes:
        raise UserError(
            f"{file}: line {lines.index('') + 1} is empty; one class a line, `{VOID}` for an id without one"
        )
    twice = [name for name, times in Counter(classes).items() if times > 1]
    if twice:
        raise UserError(f"{file}: {twice[0]!r} stands there twice; each class once")
    if not classes or len(lines) > IGNORE or len(classes) > IGNORE - 1:
        raise UserError(
            f"{file}: {len(classes)} classes in {len(lines)} lines; 1 to {IGNORE - 1} are possible, 255 is void"
        )
    return classes, void


def splits(folder: Path) -> list[str]:
    """Which of train, val and test `folder`/images has as folders."""
    return [split for split in SPLITS if (folder / "images" / split).is_dir()]


def empty(name: str, folder: Path) -> SegSet:
    """The set without its files. UserError: no such folder, no `images`, `labels` or classes.txt in it."""
    need_folder(folder, f"{name}: expected a folder of {LAYOUT}")
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise UserError(f"{name}: {folder / part} does not exist; {folder} must hold {LAYOUT}")
    file = folder / "classes.txt"
    classes, void = read_classes(file)
    ids = [i for i in range(len(classes) + len(void)) if i not in void]
    colours = np.array(voc_palette()).reshape(-1, 3)[ids]
    return SegSet(
        name, tuple(classes), tuple(map(tuple, colours.tolist())), Pairs(), lookup(ids, void), {},
        palette_maps=True, by_index=True, listed=file,
    )  # fmt: skip


def pairs_of(name: str, folder: Path, split: str, unread: Counter[str]) -> tuple[list[Pair], str]:
    """Photos and label maps of a split, and what there is to say of it. UserError: not paired, no such split."""

    def below(images: str, labels: str) -> list[Pair]:
        endings = tuple(sorted(EXTENSIONS))
        return folders(folder, "", unread, name=name, images=images, labels=[labels], endings=endings, depth=0)

    images, has = folder / "images", splits(folder)
    if not has and split != "test":
        pairs = below("images", "labels")
        order = sorted(range(len(pairs)), key=lambda i: hashlib.sha256(os.fsencode(pairs[i][0].stem)).hexdigest())
        count = max(1, len(pairs) // EVERY) if len(pairs) > 1 else 0
        held = set(order[:count])
        taken = [pair for i, pair in enumerate(pairs) if (i in held) == (split == "val")]
        return taken, f"a tenth held out ({count} photos), as there is no {images / 'val'}"
    if split not in has:
        raise UserError(
            f"{name}: {images / split} does not exist{', only ' * bool(has)}{', '.join(has)}; add it, or put all "
            f"photos into {images}: then a tenth of them is held out as val"
        )
    loose = [path for path in images.iterdir() if path.suffix.lower() in EXTENSIONS and not is_helper(path.name)]
    if loose:
        raise UserError(f"{name}: {min(loose)} lies beside {images / has[0]}; move it into one of {', '.join(has)}")
    return below(f"images/{split}", f"labels/{split}"), ""


def open_own(name: str, folder: Path, split: str = "train", check: bool = True) -> SegSet:
    """One split of an own set, its photos and label maps paired and checked (`pretrain` is `train`).

    UserError, before anything is computed: a missing part, a photo without a map and the other way round, a map that is
    no PNG of ids, ids beyond classes.txt, a map of another size than its photo.
    """
    split = "train" if split == "pretrain" else split
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; choose from {', '.join(SPLITS)}")
    found, unread = empty(name, folder), Counter[str]()
    pairs, note = pairs_of(name, folder, split, unread)
    if not pairs:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UserError(
            f"{name}: no photo ({kinds}) for {split!r} below {folder / 'images'}; {folder} must hold {LAYOUT}"
        )
    notes = [note] if note else []
    found = replace(found, pairs=Pairs(pairs), unread=unread)
    if check and (absent := check_maps(found)):
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        notes.append(f"CAUTION: no label map of {split} holds {shown}")
    return replace(found, notes=tuple(notes))


def check_maps(found: SegSet) -> list[str]:
    """Read label maps, all up to 2,000, and compare their sizes with the photos'; the classes that none of them holds.

    UserError also where palettes differ: then an index means another class in each map.
    """

    def look(i: int) -> tuple[np.ndarray, bytes]:
        label = found.label(i)
        photo = found.pairs.photos.file(i)
        try:
            with Image.open(photo) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            load_image(photo)  # its UserError
            raise
        if i in decoded or size != label.shape[::-1]:
            found.load(i)
        with Image.open(found.pairs.maps.file(i)) as image:
            colours = bytes(image.palette.palette) if image.mode == "P" and image.palette else b""
        return np.bincount(label.ravel(), minlength=IGNORE + 1) > 0, colours

    count = len(found)
    chosen, decoded = (
        sorted({round(j * (count - 1) / max(1, most - 1)) for j in range(most)}) for most in (min(count, CHECKED), 8)
    )
    seen, first = np.zeros(IGNORE + 1, bool), -1
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for i, (ids, colours) in zip(chosen, pool.map(look, chosen)):
            seen |= ids
            if not colours:
                continue
            if first < 0:
                first, reference = i, colours
            shared = min(len(reference), len(colours))
            if reference[:shared] != colours[:shared]:
                raise UserError(
                    f"{found.pairs.maps.file(i)}: its palette has other colours than {found.pairs.maps.file(first)}, "
                    "so an index is not the same class in both; export grey ids, or one palette"
                )
    return [name for i, name in enumerate(found.classes) if not seen[i]]
