"""Damage drawn at random, and what each reader makes of it: python tests/jobs/random_damage.py [--count N] [--record]

A reader gets a small set whose pictures differ, and something is done to it: bytes of one file are changed, a file or
folder is added, taken away or renamed, a line of a list is doubled, a number of a label map is another one. Then the
set is read twice, by the product and by a few lines of this file (PIL, OpenCV, zipfile, splitting at commas), which
look at what lies on the disk now. There are four ends:

refused       one line, which names a file or folder that has to do with it
as it is      everything that was read is what is there: names, labels, order, every pixel or number
in silence    something else was read, or what cannot be read rightly was read at all, and nothing was said
traceback     of a kind that an entry point does not turn into a line

The last two are failures. What a damage cannot tell from data (a flipped bit of a JPEG) is read as other decoders do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from shared_utils import UserError  # noqa: E402
from tests.jobs import fuzz_loaders as sets  # noqa: E402
from tests.jobs.pretraining import flags, record, stamp  # noqa: E402

HEADER = ("reader", "drawn", "refused in one line", "read as it is", "wrong in silence", "traceback", "commit, date")
PICTURES = {".jpg", ".jpeg", ".png"}
FILMS = {".avi", ".mp4"}
LISTS = {".txt", ".csv", ".json"}

Row = tuple[tuple[str, ...], Any]  # what something is called and belongs to; its numbers


class Damaged(Exception):
    """What is there cannot be read, or contradicts itself."""


# --- what is there: read without the product --------------------------------------------------------------------------


def png_is_whole(data: bytes) -> bool:
    """Whether the chunks of a PNG have the checksums that stand behind them, up to its end."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body, given = data[at + 4 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if body[:4] == b"IEND":  # all numbers stand before it
            return True
        if len(given) < 4 or zlib.crc32(body) != int.from_bytes(given, "big"):
            return False
        at += 12 + length
    return False


def opened(path: Path) -> Image.Image:
    try:
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:
        raise Damaged(f"{path.name}: {error}") from None
    if data[:4] == b"\x89PNG" and not png_is_whole(data):
        raise Damaged(f"{path.name}: a checksum does not fit")
    return image


def picture(path: Path) -> np.ndarray:
    """[H, W, 3]; of 16 bits the higher 8."""
    image = opened(path)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def numbers(path: Path, kinds: Sequence[str] = ("PNG",)) -> np.ndarray:
    """[H, W] of a label map."""
    image = opened(path)
    if image.format not in kinds or image.mode not in ("L", "P"):
        raise Damaged(f"{path.name}: {image.format} of mode {image.mode}")
    return np.asarray(image).astype(np.int64)


def film(path: Path) -> np.ndarray:
    """[T, 4, 4, 3], mean colours, by OpenCV's FFmpeg."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    found = []
    while True:
        there, frame = capture.read()
        if not there:
            break
        found.append(coarse(frame[..., ::-1]))
    if not found:
        raise Damaged(f"{path.name}: no picture")
    return np.stack(found)


def coarse(frame: np.ndarray) -> np.ndarray:
    h, w = frame.shape[0] // 4 * 4, frame.shape[1] // 4 * 4
    return frame[:h, :w].reshape(4, h // 4, 4, w // 4, 3).mean((1, 3))


def hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") or part in ("Thumbs.db", "__MACOSX") for part in path.relative_to(root).parts)


def below(root: Path, kinds: Iterable[str] = PICTURES) -> list[Path]:
    """Files of these endings, through links, hidden ones aside."""
    found = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    return sorted(path for path in found if path.suffix.lower() in kinds and not hidden(path, root))


def lines(file: Path) -> list[str]:
    """Of a text, without blanks around them, empty ones left out."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{file.name}: {error}") from None
    found = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    return [line for line in found if line]


def once(names: list[str], file: Path) -> list[str]:
    """Names that must differ."""
    if len(set(names)) < len(names):
        raise Damaged(f"{file.name}: {Counter(names).most_common(1)[0][0]} is there twice")
    return names


def table(file: Path) -> list[dict[str, str]]:
    head, *rows = ([cell.strip().strip('"') for cell in line.split(",")] for line in lines(file))
    if any(len(row) != len(head) for row in rows):
        raise Damaged(f"{file.name}: lines of other lengths")
    return [dict(zip(head, row)) for row in rows]


def in_classes(root: Path, at: Path | None = None) -> Iterator[Row]:
    """CLASS/**/*.jpg."""
    for path in below(root):
        yield (os.path.relpath(path, at or root), path.relative_to(root).parts[0]), picture(path)
    for name in sorted({path.relative_to(root).parts[0] for path in below(root)}):
        yield ("class", name), 0


def listed(root: Path, file: Path, labelled: bool) -> Iterator[Row]:
    """`CLASS/NAME` or `NAME LABEL` a line, below `root`."""
    rows = [re.fullmatch(r"(.*\S)\s+(\d+)" if labelled else "(.*)", line) for line in lines(file)]
    if not all(rows):
        raise Damaged(f"{file.name}: no label")
    once([row[1] for row in rows if row], file)
    for row in rows:
        assert row is not None
        name = os.path.normpath(row[1])
        if not (root / name).is_file():
            raise Damaged(f"{name} is not there")
        yield (name, row[2] if labelled else name.split("/")[0]), picture(root / name)


def tables(root: Path) -> Iterator[Row]:
    """PART.csv of filename, label, and images/."""
    rows = {part: table(root / f"{part}.csv") for part in sets.SPLITS if (root / f"{part}.csv").exists()}
    once([row["filename"] for part in rows.values() for row in part], root)
    for part, found in rows.items():
        for row in found:
            yield (part, row["filename"], row["label"]), picture(root / "images" / row["filename"])


def pairs_of(file: Path) -> dict[str, str]:
    """`NUMBER REST` a line."""
    rows = [line.split(None, 1) for line in lines(file)]
    if any(len(row) < 2 for row in rows):
        raise Damaged(f"{file.name}: a line of one word")
    once([row[0] for row in rows], file)
    return {row[0]: row[1] for row in rows}


def cub(root: Path) -> Iterator[Row]:
    root = root / "CUB_200_2011"
    names, labels, parts, classes = (
        pairs_of(root / f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    once(list(names.values()), root)
    once(list(classes.values()), root)
    if not names.keys() == labels.keys() == parts.keys() or not set(labels.values()) <= set(classes):
        raise Damaged("the lists contradict one another")
    if not set(parts.values()) <= {"0", "1"}:
        raise Damaged("a split other than 0 and 1")
    for number, name in names.items():
        part = "train" if parts[number] == "1" else "test"
        yield (part, f"images/{name}", classes[labels[number]]), picture(root / "images" / name)
    for name in classes.values():
        yield ("class", name), 0


def aircraft(root: Path) -> Iterator[Row]:
    root = root / "fgvc-aircraft-2013b/data"
    classes = once(lines(root / "variants.txt"), root / "variants.txt")
    both = {
        part: pairs_of(root / f"images_variant_{name}.txt") for part, name in (("train", "trainval"), ("test",) * 2)
    }
    once([number for rows in both.values() for number in rows], root)
    for part, rows in both.items():
        for number, name in rows.items():
            if name not in classes:
                raise Damaged(f"{name} is no variant")
            yield (part, f"images/{number}.jpg", name), picture(root / f"images/{number}.jpg")
    for name in classes:
        yield ("class", name), 0


def cifarfs(root: Path) -> Iterator[Row]:
    once([name for part in sets.SPLITS for name in lines(root / f"splits/bertinetto/{part}.txt")], root)
    for part in sets.SPLITS:
        for name in lines(root / f"splits/bertinetto/{part}.txt"):
            if not (root / "data" / name).is_dir() or not below(root / "data" / name):
                raise Damaged(f"{name} is not there")
            for path in below(root / "data" / name):
                yield (part, str(path.relative_to(root)), name), picture(path)


def attributes(root: Path) -> Iterator[Row]:
    rows = {row["path"]: row for row in table(root / "attributes.csv")}
    for path in below(root / "train"):
        name = str(path.relative_to(root))
        if name not in rows or not all(rows[name].values()):
            raise Damaged(f"{name} has no row")
        yield (name, rows[name]["hue"]), picture(path)


def by_names(root: Path) -> Iterator[Row]:
    there = below(root / "train")
    for name in dict.fromkeys(lines(root / "list.txt")):
        found = [path for path in there if path.name == name]
        if len(found) != 1:
            raise Damaged(f"{name}: {len(found)} files")
        yield (str(found[0].relative_to(root)), found[0].relative_to(root).parts[1]), picture(found[0])


def maps(pairs: Iterable[tuple[Path, Path]], root: Path, classes: int, void: Iterable[int] = ()) -> Iterator[Row]:
    for photo, label in pairs:
        if not photo.is_file() or not label.is_file():
            raise Damaged(f"{photo.name} has no map, or the map no photo")
        image, ids = picture(photo), numbers(label)
        ids = np.where(np.isin(ids, list(void)), 255, ids)
        if image.shape[:2] != ids.shape or ((ids >= classes) & (ids != 255)).any():
            raise Damaged(f"{label.name}: other sizes, or a number of no class")
        yield ("photo", str(photo.relative_to(root))), image
        yield ("map", str(label.relative_to(root))), ids


def voc(root: Path) -> Iterator[Row]:
    tree = root / sets.VOC
    file = tree / "ImageSets/Segmentation/trainaug.txt"
    stems = once([re.sub(r"\.(jpe?g|png)$", "", line) for line in lines(file)], file)
    photos, labels = ({p.stem: p for p in below(tree / f)} for f in ("JPEGImages", "SegmentationClassAug"))
    if not set(stems) <= photos.keys() & labels.keys():
        raise Damaged("a name without its photo or map")
    yield from maps([(photos[stem], labels[stem]) for stem in stems], root, 21)


def matched(root: Path, images: str, labels: str, classes: int, void: Iterable[int] = ()) -> Iterator[Row]:
    """Photos and maps of one name but for the ending."""
    photos, found = (
        {str(p.relative_to(root / f).with_suffix("")): p for p in below(root / f)} for f in (images, labels)
    )
    if photos.keys() != found.keys():
        raise Damaged("photos and maps of other names")
    yield from maps([(photos[key], found[key]) for key in photos], root, classes, void)


def own(root: Path) -> Iterator[Row]:
    text = (root / "classes.txt").read_bytes().decode("utf-8-sig").rstrip()
    names = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if "" in once(names, root / "classes.txt"):
        raise Damaged("a line without a name")
    for number, name in enumerate(names):
        yield ("class", name), number
    yield from matched(root, "images", "labels", len(names))


def last_number(path: Path) -> tuple[int, str]:
    found = re.findall(r"\d+", path.stem)
    if not found:
        raise Damaged(f"{path.name}: no number")
    return int(found[-1]) if len(found) == 1 else int(found[0]), path.name


def sequences_of(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, list[Path]]]:
    for name in names:
        frames = [path for path in below(folder / name) if path.parent == folder / name]
        if not frames:
            raise Damaged(f"{name}: no frames")
        yield name, sorted(frames, key=last_number)


def davis(root: Path, year: str, binary: bool) -> Iterator[Row]:
    file = root / f"ImageSets/{year}/val.txt"
    words = [line.split()[0] for line in lines(file)]
    names = [word.split("/")[-2] if "/" in word else word for word in words]
    for name, frames in sequences_of(root / "JPEGImages/480p", dict.fromkeys(names)):
        stems = [path.stem for path in frames]
        found = [path for path in below(root / "Annotations/480p" / name, [".png"]) if path.parent.name == name]
        if not found or any(path.stem not in stems for path in found):
            raise Damaged(f"{name}: annotations of no frames")
        if len({opened(path).size for path in frames}) > 1:
            raise Damaged(f"{name}: frames of several sizes")
        for number, path in enumerate(frames):
            yield (name, "frame", str(number)), picture(path)
        for path in found:
            soft = binary and opened(path).format == "JPEG"  # black and white
            ids = numbers(path, ("PNG", "GIF", "BMP", "JPEG"))
            if (
                not binary and opened(path).format == "JPEG" and not set(np.unique(ids)) <= {0, 255}
            ):  # nothing, and void
                raise Damaged(f"{path.name}: JPEG changes numbers")
            yield (name, "mask", str(stems.index(path.stem))), (ids > 127 * soft) * 1 if binary else ids


def frames_below(root: Path) -> Iterator[Row]:
    for name in sorted({str(path.parent.relative_to(root)) for path in below(root)}):
        for _, frames in sequences_of(root, [name]):
            for number, path in enumerate(frames):
                yield (name, str(number)), picture(path)


def films_below(root: Path) -> Iterator[Row]:
    for path in below(root, FILMS):
        yield (str(path.relative_to(root)),), film(path)


def ucf101(root: Path) -> Iterator[Row]:
    found = [re.fullmatch(r"(\S+/\S+)(\s+\d+)?", line) for line in lines(root / "anno/trainlist01.txt")]
    if not all(found):
        raise Damaged("a line that names no video")
    for name in once([row[1] for row in found if row], root / "anno/trainlist01.txt"):
        yield (name, name.split("/")[0]), film(root / "data" / name)


def diving48(root: Path) -> Iterator[Row]:
    try:
        rows = json.loads((root / "Diving48_V2_train.json").read_bytes().decode("utf-8-sig"))
        pairs = [(row["vid_name"], int(row["label"])) for row in rows]
    except Exception as error:
        raise Damaged(str(error)) from None
    once([name for name, _ in pairs], root)
    for name, label in pairs:
        if not 0 <= label < 48:
            raise Damaged(f"label {label}")
        yield (f"{name}.mp4", f"{label:02d}"), film(root / f"rgb/{name}.mp4")


def weights(root: Path) -> Iterator[Row]:
    """A file of torch.save, whose records have checksums."""
    file = root / "weights.pth"
    try:
        with zipfile.ZipFile(file) as records:
            wrong = records.testzip()
        if wrong:
            raise Damaged(f"{wrong}: a checksum does not fit")
        for key, value in torch.load(file, weights_only=True)["state_dict"].items():
            yield (key,), value.numpy()
    except Exception as error:
        raise Damaged(str(error)) from None


def safetensors(root: Path) -> Iterator[Row]:
    """A file of safetensors, which has none."""
    data = (root / "weights.safetensors").read_bytes()
    try:
        (length,) = struct.unpack("<Q", data[:8])
        head, body, end = json.loads(data[8 : 8 + length]), data[8 + length :], 0
        for key, facts in head.items():
            if key != "__metadata__":
                first, last = facts["data_offsets"]
                if facts["dtype"] != "F32":
                    raise Damaged(f"{key}: {facts['dtype']}")
                yield (key,), np.frombuffer(body[first:last], "<f4").reshape(facts["shape"])
                end = max(end, last)
    except Exception as error:
        raise Damaged(str(error)) from None
    if end != len(body):
        raise Damaged("bytes of no tensor")


def bags(root: Path) -> Iterator[Row]:
    try:
        array = np.load(root / "bags.npy", allow_pickle=False)
        if not (root / "bags.json").exists():  # the release's own files have none, and the run says so
            return iter([(("bags",), array)])
        facts = json.loads((root / "bags.json").read_bytes())
        names = "\n".join(str(path.relative_to(root / "train")) for path in below(root / "train"))
        assert facts["order_sha256"] == hashlib.sha256(names.encode()).hexdigest()
        assert facts["sha256"] == hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:16]
    except Exception as error:
        raise Damaged(str(error)) from None
    return iter([(("bags",), array)])


def class_names(root: Path) -> Iterator[Row]:
    found = lines(root / "names.txt")
    if len(found) != 4:
        raise Damaged(f"{len(found)} names")
    for number, name in enumerate(found):
        yield (name,), number


# --- what the product reads -------------------------------------------------------------------------------------------


def of(images: Any, root: Path, *head: str, classes: bool = False, loader: bool = False) -> Iterator[Row]:
    """An ImageList. `loader`: by the decoder of the batched loader."""
    from shared_utils.decode import read_pixels

    for i, path in enumerate(images.paths()):
        label = images.label(i)
        name = images.classes[label] if images.classes else str(label)
        pixels = read_pixels(path) if loader else np.asarray(images.image(i))
        yield (*head, os.path.relpath(path, root), name), pixels
    for name in images.classes if classes else ():
        yield ("class", name), 0


def of_set(found: Any, root: Path) -> Iterator[Row]:
    for i, (photo, label) in enumerate(found.pairs):
        image, ids = found.load(i)
        yield ("photo", os.path.relpath(photo, root)), np.asarray(image)
        yield ("map", os.path.relpath(label, root)), ids


def of_videos(found: Any, root: Path) -> Iterator[Row]:
    from fame.video import read

    for i, video in enumerate(found.videos):
        frames = read(video, range(video.count))
        label = [found.classes[found.labels[i]]] if found.classes else []
        yield (os.path.relpath(video.path, root), *label), np.stack([coarse(frame) for frame in frames])


def read_folder(root: Path, loader: bool = False) -> Iterator[Row]:
    from shared_utils.data import training_folder

    yield from of(training_folder(root), root / "train", classes=True, loader=loader)


def read_photos(root: Path) -> Iterator[Row]:
    from shared_utils.data import flat_folder

    yield from of(flat_folder(root), root)


def read_splits(root: Path) -> Iterator[Row]:
    from shared_utils import evaluation
    from shared_utils.flags import Parser

    parser = Parser()
    evaluation.add_data_flags(parser)
    for images in evaluation.open_splits(parser.parse_args(["--data_dir", str(root), "--img_size", "32"])):
        yield from of(images, root)


def read_sage_list(root: Path) -> Iterator[Row]:
    from sage.data import training_images

    yield from of(training_images(root, root / "list.txt"), root / "train")


def read_attributes(root: Path) -> Iterator[Row]:
    from sage.data import attribute_labels
    from shared_utils.data import image_folder

    images = image_folder(root / "train")
    labels, values = attribute_labels(root, images)["hue"]
    for i, path in enumerate(images.paths()):
        yield (os.path.relpath(path, root), values[labels[i]]), np.asarray(images.image(i))


def read_labelled(root: Path) -> Iterator[Row]:
    from shared_utils.data import image_folder
    from shared_utils.evaluation import labelled_indices, subset

    train = image_folder(root / "train")
    yield from of(subset(train, labelled_indices(train, root / "list.txt", 1.0, root / "train", 0)), root)


def read_fine(kind: str, part: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        if part == "sage":
            from sage import finegrained, main_finegrained

            words = ["--data_dir", str(root), "--dataset", kind, "--pretrained", "none", "--img_size", "32"]
            train, test = finegrained.open_images(main_finegrained.get_parser().parse_args(words))
        else:
            from mra import data, main_supervised

            words = ["--data_path", str(root), "--dataset", kind]
            found = data.open_sets(main_supervised.get_parser().parse_args(words))
            train, test = found.train, found.tests["test"]
        at = next(root.glob("*"))
        at = at / "data" if kind == "aircraft" else at
        yield from of(train, at, "train", classes=True)
        yield from of(test, at, "test")

    return read


def read_mra_lists(root: Path) -> Iterator[Row]:
    from mra import data, main_supervised

    words = ["--data_path", str(root), "--train_list", f"{root}/train.txt", "--val_list", f"{root}/val.txt"]
    found = data.open_sets(main_supervised.get_parser().parse_args(words))
    for images in (found.train, found.tests["val"]):
        yield from of(images, root)


def read_mra_tables(root: Path) -> Iterator[Row]:
    from mra.data import read_fewshot

    for part, images in read_fewshot(root).items():
        yield from of(images, root / "images", part)


def read_flat(reader: str, at: str = "") -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from flat import data

        found = getattr(data, reader)(root)
        data.check_splits(found, root)
        for split, files in found.items():
            yield from of(data.as_list(files), root / at, data.SPLITS[split])

    return read


def read_sscl(root: Path) -> Iterator[Row]:
    from sscl.data import own_folders

    for images in own_folders(root / "known", root / "all"):
        yield from of(images, root)


def read_mdp(name: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from mdp.datasets import open_set

        yield from of_set(open_set(name, root), root)

    return read


def read_own(root: Path) -> Iterator[Row]:
    from mdp.own import open_own

    for split in ("train", "val"):
        found = open_own("mine", root, split)
        yield from of_set(found, root)
    for number, name in enumerate(found.classes):
        yield ("class", name), number


def read_davis(name: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from uvos_dino import data

        for video in data.open_videos(name, root, "val"):
            for i, frame in enumerate(data.read_video(video.frames, (-1, -1))):
                yield (video.name, "frame", str(i)), (frame.permute(1, 2, 0).numpy() * 255).round()
            for i, path in video.masks.items():
                yield (video.name, "mask", str(i)), data.read_mask(path, data.LAYOUTS[name].binary)

    return read


def read_clips(root: Path, films: bool = False) -> Iterator[Row]:
    from uvos_dino.segment import find_clips, pictures

    for clip in find_clips([root]):
        found = [picture for _, picture in pictures(clip)]
        if films:
            yield (str(clip.path.relative_to(root)),), np.stack([coarse(frame) for frame in found])
        else:
            yield from (((clip.name, str(number)), frame) for number, frame in enumerate(found))


def read_fame(dataset: str, at: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from fame import data, train

        words = [str(root), "--dataset", dataset, "-fpc", "4", "--stride", "1", "--index_cache", f"{root}/../i.pth"]
        args = train.get_parser().parse_args(words)
        data.check_data_flags(args)
        yield from of_videos(data.open_videos(args, train=True), root / at)

    return read


def read_weights(file: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from shared_utils.checkpoint import read_weights

        for key, value in read_weights(root / file).items():
            yield (key,), value.numpy()

    return read


def read_bags(root: Path) -> Iterator[Row]:
    from bingo.data import load_bags
    from shared_utils.data import image_folder

    yield ("bags",), load_bags(root / "bags.npy", image_folder(root / "train"), 4)[0].array


def read_class_names(root: Path) -> Iterator[Row]:
    from shared_utils.predictions import read_names

    yield from (((name,), number) for number, name in enumerate(read_names(root / "names.txt", 4)))


# --- the readers ------------------------------------------------------------------------------------------------------


def classes_and_list(root: Path) -> None:
    sets.listed(root)


def named_list(root: Path) -> None:
    for name in sets.classes(root, "train"):
        part, group, file = name.split("/")
        (root / name).rename(root / part / group / f"{group}_{file}")
    sets.text(root / "list.txt", [path.name for path in below(root / "train")[::2]])


def labelled_maps(images: str, labels: str, names: str = "") -> Callable[[Path], None]:
    """Each map has a block of another number."""

    def make(root: Path) -> None:
        sets.segmentation(images, labels, names)(root)
        for i, path in enumerate(below(root, [".png"])):
            sets.mask(path, 1 + i % 2, mode="P" if "VOC" in images else "L")

    return make


def ordered_sequences(names: str, pairs: bool) -> Callable[[Path], None]:
    """The object of frame t begins at line 4 t, so that one frame's mask is not another's."""

    def make(root: Path) -> None:
        sets.sequences(sets.FRAMES, sets.MASKS if names else "", names, pairs)(root)
        for path in below(root, [".png"]):
            ids = np.zeros((48, 48), np.uint8)
            ids[4 * int(path.stem) : 4 * int(path.stem) + 8, 8:40] = 1 + (path.parent.name == "s1")
            image = Image.fromarray(ids)
            image.putpalette([(i * 37 + c * 91) % 256 for i in range(256) for c in range(3)])
            image.save(path)

    return make


def shades(path: Path, number: int) -> None:
    """12 pictures of flat blocks, their colours drawn by the number of the film and of the picture."""
    from shared_utils.lab.mini import _avi

    blocks = np.random.default_rng(number).integers(0, 255, (12, 2, 2, 3), np.uint8)
    _avi(path, blocks.repeat(24, 1).repeat(24, 2))


def shaded(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def again(root: Path) -> None:
        make(root)
        for number, path in enumerate(below(root, FILMS)):
            shades(path, number)

    return again


def make_weights(root: Path) -> None:
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    state = {f"layer{i}.weight": torch.randn(4, 8, generator=rng) for i in range(6)}
    torch.save({"state_dict": state}, root / "weights.pth")
    save_file(state, root / "weights.safetensors")


def only(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    """Of two files that something writes, one."""

    def one(root: Path) -> None:
        make(root)
        for path in root.iterdir():
            if path.name != name:
                path.unlink()

    return one


def make_bags(root: Path) -> None:
    from bingo.data import save_bags
    from shared_utils.data import image_folder

    sets.classes(root, "train", each=3)
    images = image_folder(root / "train")
    array = np.random.default_rng(0).integers(0, len(images), (len(images), 4))
    save_bags(root / "bags.npy", array, images, "knn")


class Reader(NamedTuple):
    make: Callable[[Path], object]
    read: Callable[[Path], Iterable[Row]]  # the product
    truth: Callable[[Path], Iterable[Row]]
    maps: str = "no maps"  # in the paths of label maps
    close: float = 0.0  # how far numbers may be from one another: of colours that two decoders convert
    files: str = ""  # only files whose names match are damaged


def both(*truths: Callable[[Path], Iterable[Row]]) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        for truth in truths:
            yield from truth(root)

    return read


def no_classes(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if row[0][0] != "class")


def flat_rows(root: Path, at: Path) -> Iterator[Row]:
    return (((os.path.relpath(path, at), "-1"), picture(path)) for path in below(root))


def fewshot_folders(root: Path) -> Iterator[Row]:
    for part in sets.SPLITS:
        for (name, label), pixels in no_classes(in_classes(root / part)):
            yield (part, f"{part}/{name}", label), pixels


def sscl_truth(root: Path) -> Iterator[Row]:
    yield from no_classes(in_classes(root / "known", root))
    yield from flat_rows(root / "all", root)


READERS: dict[str, Reader] = {
    "class folders": Reader(lambda r: sets.classes(r, "train"), read_folder, lambda r: in_classes(r / "train")),
    "class folders, batched loader": Reader(
        lambda r: sets.classes(r, "train"), lambda r: read_folder(r, True), lambda r: in_classes(r / "train")
    ),
    "photographs": Reader(sets.photos, read_photos, lambda r: flat_rows(r, r)),
    "training and test folders": Reader(
        lambda r: sets.classes(r, "train", "val", each=4),
        read_splits,
        both(lambda r: no_classes(in_classes(r / "train", r)), lambda r: no_classes(in_classes(r / "val", r))),
    ),
    "labelled images by name": Reader(named_list, read_labelled, by_names),
    "sage list": Reader(classes_and_list, read_sage_list, lambda r: listed(r / "train", r / "list.txt", False)),
    "sage attributes": Reader(sets.attributes, read_attributes, attributes),
    "sscl own folders": Reader(
        lambda r: (sets.classes(r, "known", each=4), sets.photos(r / "all", 8)), read_sscl, sscl_truth
    ),
    "mra lists": Reader(
        sets.numbered,
        read_mra_lists,
        both(lambda r: listed(r, r / "train.txt", True), lambda r: listed(r, r / "val.txt", True)),
    ),
    "mra few-shot tables": Reader(sets.tables, read_mra_tables, tables),
    "flat miniImagenet": Reader(sets.tables, read_flat("_from_csv", "images"), tables),
    "flat cifarfs": Reader(sets.cifarfs, read_flat("_from_lists"), cifarfs),
    "mdp voc": Reader(
        labelled_maps(f"{sets.VOC}/JPEGImages/{{}}.jpg", f"{sets.VOC}/SegmentationClassAug/{{}}.png",
                      f"{sets.VOC}/ImageSets/Segmentation/trainaug.txt"),
        read_mdp("voc"), voc, "SegmentationClassAug",
    ),
    "mdp camvid": Reader(
        labelled_maps("camvid11/images/train/{}.jpg", "camvid11/labels/train/{}.png"),
        read_mdp("camvid"),
        lambda r: matched(r, "camvid11/images/train", "camvid11/labels/train", 11, (11,)), "labels/",
    ),
    "mdp own": Reader(
        lambda r: (labelled_maps("images/a {}.jpg", "labels/a {}.png")(r),
                   sets.text(r / "classes.txt", ["ground", "house", "tree"])),  # type: ignore[func-returns-value]
        read_own, own, "labels/",
    ),
    "uvos_dino DAVIS": Reader(
        ordered_sequences("ImageSets/2016/val.txt", True), read_davis("DAVIS"), lambda r: davis(r, "2016", True),
        "Annotations",
    ),
    "uvos_dino DAVIS2017": Reader(
        ordered_sequences("ImageSets/2017/val.txt", False), read_davis("DAVIS2017"), lambda r: davis(r, "2017", False),
        "Annotations",
    ),
    "uvos_dino frames": Reader(sets.sequences("{0}/my {1}.jpg"), read_clips, frames_below),
    "uvos_dino videos": Reader(
        shaded(lambda r: sets.films(r / "a/my {}.mp4", 3)), lambda r: read_clips(r, True), films_below, close=6.0
    ),
    "fame folder": Reader(
        shaded(lambda r: sets.films(r / "a/my {}.avi", 4)), read_fame("folder", ""), films_below, close=6.0
    ),
    "fame ucf101": Reader(shaded(sets.videos("ucf101")), read_fame("ucf101", "data"), ucf101, close=6.0),
    "fame diving48": Reader(shaded(sets.videos("diving48")), read_fame("diving48", "rgb"), diving48, close=6.0),
    "weights of torch.save": Reader(only(make_weights, "weights.pth"), read_weights("weights.pth"), weights),
    "weights of safetensors": Reader(
        only(make_weights, "weights.safetensors"), read_weights("weights.safetensors"), safetensors
    ),
    "bingo bags": Reader(make_bags, read_bags, bags, files=r"bags\..*"),
    "names of classes": Reader(
        lambda r: sets.text(r / "names.txt", ["red bird", "dog", "cat", "Élan"]), read_class_names, class_names
    ),
}  # fmt: skip
for kind, truth in (("cub", cub), ("aircraft", aircraft)):
    for part in ("sage", "mra"):
        READERS[f"{part} {kind}"] = Reader(sets.fine(kind), read_fine(kind, part), truth)


# --- what is done to a set --------------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random], object]


def changed(change: Callable[[bytearray, random.Random], object]) -> Damage:
    def apply(path: Path, rng: random.Random) -> None:
        data = bytearray(path.read_bytes())
        change(data, rng)
        path.write_bytes(data)

    return apply


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zeros(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 16] = bytes(len(data[at : at + 16]))


def other_kind(path: Path, rng: random.Random) -> None:
    kind = rng.choice(["text", "GIF", "PNG", "BMP"])
    if kind == "text":
        path.write_text("404: Not Found\n")
    else:
        Image.new("RGB", (40, 40), (rng.randrange(256), 80, 160)).save(path, kind)


def with_another(path: Path, rng: random.Random) -> None:
    """Two files change their names."""
    others = [other for other in sorted(path.parent.iterdir()) if other.suffix == path.suffix and other != path]
    if others:
        other, between = rng.choice(others), path.with_name("between")
        path.rename(between), other.rename(path), between.rename(other)  # type: ignore[func-returns-value]


def link(path: Path, rng: random.Random) -> None:
    """The file lies elsewhere; or nowhere."""
    data = path.read_bytes()
    path.unlink()
    path.symlink_to(path.with_name(".apart") if rng.random() < 0.5 else path.with_name("gone"))
    path.with_name(".apart").write_bytes(data)


def hide(path: Path, rng: random.Random) -> None:
    """What file managers and notebooks leave."""
    kind = rng.choice(["._", ".ipynb_checkpoints", "Thumbs.db", "notes.txt", "more.heic"])
    if kind == ".ipynb_checkpoints":
        (path.parent / kind).mkdir()
        shutil.copy(path, path.parent / kind)
    else:
        path.with_name(kind + path.name if kind == "._" else kind).write_bytes(b"\0\5\26\7 of another program")


def deeper(path: Path, rng: random.Random) -> None:
    """Into a folder of its own."""
    (path.parent / "more").mkdir()
    path.rename(path.parent / "more" / path.name)


def emptied(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path.parent)
    if rng.random() < 0.5:
        path.parent.mkdir()


BYTES: dict[str, Damage] = {
    "cut": lambda p, rng: os.truncate(p, rng.randrange(p.stat().st_size)),
    "a bit flipped": changed(flip),
    "a byte drawn": changed(lambda d, rng: d.__setitem__(rng.randrange(len(d)), rng.randrange(256))),
    "16 bytes of zero": changed(zeros),
    "bytes appended": changed(lambda d, rng: d.extend(rng.randbytes(64))),
    "another kind": other_kind,
}
FILES: dict[str, Damage] = BYTES | {
    "gone": lambda p, rng: p.unlink(),
    "copied": lambda p, rng: shutil.copy(p, p.with_name(f"{p.stem} (1){p.suffix}")),
    "renamed": lambda p, rng: p.rename(p.with_name(f"{p.stem}7{p.suffix}")),
    "ending in capitals": lambda p, rng: p.rename(p.with_suffix(p.suffix.upper())),
    "two exchanged": with_another,
    "linked": link,
    "others' files beside it": hide,
    "deeper": deeper,
    "its folder gone": emptied,
    "its folder renamed": lambda p, rng: p.parent.rename(p.parent.with_name(f"{p.parent.name}x")),
    "grey": lambda p, rng: opened(p).convert("L").save(p),
    "16-bit": lambda p, rng: Image.fromarray(np.full((40, 40), rng.randrange(65536), np.uint16)).save(p, "PNG"),
}
MAPS: dict[str, Damage] = {
    "another number": lambda p, rng: renumber(p, rng),
    "another size": lambda p, rng: opened(p).resize((39, 40)).save(p),
    "as JPEG": lambda p, rng: Image.fromarray((np.asarray(opened(p)) > 0) * np.uint8(255)).save(p, "JPEG"),
}


def renumber(path: Path, rng: random.Random) -> None:
    image = opened(path)
    ids = np.array(image)
    ids[ids > 0] = rng.choice([rng.randrange(4), rng.randrange(256)])
    new = Image.fromarray(ids)
    if image.mode == "P":
        new.putpalette(image.getpalette())  # type: ignore[arg-type]
    new.save(path)


def edited(edit: Callable[[list[str], random.Random], object]) -> Damage:
    """A change of the lines, each with its end."""

    def apply(path: Path, rng: random.Random) -> None:
        rows = path.read_text().splitlines(keepends=True)
        edit(rows, rng)
        path.write_text("".join(rows))

    return apply


def exchange(rows: list[str], rng: random.Random) -> None:
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    rows[i], rows[j] = rows[j], rows[i]


def letter(rows: list[str], rng: random.Random) -> None:
    i = rng.randrange(len(rows))
    at = rng.randrange(len(rows[i]))
    rows[i] = rows[i][:at] + rng.choice("0123456789 ,/\\\"'#;%xé\t") + rows[i][at + 1 :]


TEXTS: dict[str, Damage] = {
    "a line gone": edited(lambda rows, rng: rows.pop(rng.randrange(len(rows)))),
    "a line doubled": edited(lambda rows, rng: rows.append(rng.choice(rows))),
    "two lines exchanged": edited(exchange),
    "lines shuffled": edited(lambda rows, rng: rng.shuffle(rows)),
    "an empty line": edited(lambda rows, rng: rows.insert(rng.randrange(len(rows)), rng.choice(["\n", "  \n"]))),
    "another letter": edited(letter),
    "CR LF": changed(lambda d, rng: d.__setitem__(slice(None), bytes(d).replace(b"\n", b"\r\n"))),
    "byte order mark": changed(lambda d, rng: d.__setitem__(slice(None), b"\xef\xbb\xbf" + bytes(d))),
    "UTF-16": changed(lambda d, rng: d.__setitem__(slice(None), bytes(d).decode().encode("utf-16"))),
    "blanks at the ends": changed(lambda d, rng: d.__setitem__(slice(None), bytes(d).replace(b"\n", b" \t\n"))),
    "no last line's end": changed(lambda d, rng: d.__delitem__(slice(-1, None))),
    "gone": lambda p, rng: p.unlink(),
}


def draw(reader: Reader, root: Path, rng: random.Random) -> tuple[str, Path, Damage]:
    """The name of a damage, its file, and what does it; every kind of file is as likely."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and (not reader.files or re.fullmatch(reader.files, path.name)):
            kind = "map" if reader.maps in str(path) else "list" if path.suffix in LISTS else "file"
            kinds.setdefault(kind if path.suffix in {*PICTURES, *FILMS, *LISTS} else "bytes", []).append(path)
    kind = rng.choice(sorted(kinds))
    path = rng.choice(kinds[kind])
    some = {"bytes": BYTES, "list": BYTES | TEXTS, "file": FILES, "map": FILES | MAPS}[kind]
    names = [name for name in some if path.suffix in PICTURES or name not in ("grey", "16-bit")]
    if kind == "list" and rng.random() < 0.7:  # of the ways in which a list can be wrong most are a list's own
        names = list(TEXTS)
    name = rng.choice(names)
    return f"{kind}: {name}", path, some[name]


# --- the job ----------------------------------------------------------------------------------------------------------


def gather(rows: Iterable[Row]) -> dict[tuple[str, ...], Any]:
    out: dict[tuple[str, ...], Any] = {}
    for key, value in rows:
        while key in out:
            key = (*key, "again")
        out[key] = value
    return out


def difference(found: dict[tuple[str, ...], Any], there: dict[tuple[str, ...], Any], close: float) -> str:
    """What was read otherwise than it is there; "" where nothing was."""
    if more := sorted(found.keys() - there.keys()):
        return f"{len(found)} read, {len(there)} are there; not there: {more[0]}"
    if less := sorted(there.keys() - found.keys()):
        return f"{len(found)} read, {len(there)} are there; not read: {less[0]}"
    for key, value in found.items():
        a, b = np.asarray(value, np.float64), np.asarray(there[key], np.float64)
        if a.shape != b.shape or not np.array_equal(a, b, equal_nan=True) and not (np.abs(a - b) <= close).all():
            far = "" if a.shape != b.shape else f", by up to {np.abs(a - b).max():g}"
            return f"{key}: {a.shape} read, {b.shape} is there{far}"
    return ""


def attempt(reader: Reader, root: Path, names: set[str]) -> tuple[str, str]:
    """One of refused, as it is, in silence, traceback; and the line or the reason."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = gather(reader.read(root))
    except UserError as error:
        line = str(error)
        if "\n" in line or len(line) > 600 or not any(name in line for name in names):
            return "traceback", f"not a line that names it: {line}"
        return "refused", line
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    try:
        there = gather(reader.truth(root))
    except Damaged as error:
        return "in silence", f"{len(found)} read, though {error}"
    wrong = difference(found, there, reader.close)
    return ("in silence", wrong) if wrong else ("as it is", f"{len(found)} things")


ENDS = ("refused", "as it is", "in silence", "traceback")


def main() -> int:
    parser = flags(__doc__, list(READERS), "READER")
    parser.add_argument("--count", type=int, default=300, help="damages, dealt to the readers in turn")
    parser.add_argument("--loud", action="store_true", help="print every line, not only what fails")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
    names = [name for name in READERS if not args.only or name in args.only]
    ends: dict[str, Counter[str]] = {name: Counter() for name in names}
    with tempfile.TemporaryDirectory(prefix="damage-", dir=args.work) as folder:
        work = Path(folder)
        for name in names:
            (work / name).mkdir()
            READERS[name].make(work / name)
            end, line = attempt(READERS[name], work / name, set())
            if end != "as it is":
                raise SystemExit(f"{name}: its clean set: {end}: {line}")
        for number in range(args.count):
            name, case = names[number % len(names)], work / "case" / "set"
            rng = random.Random(f"{args.seed} {name} {number // len(names)}")
            shutil.copytree(work / name, case)
            what, path, damage = draw(READERS[name], case, rng)
            damage(path, rng)
            about = {path.name, path.stem, path.parent.name, f"{path.parent.name}x"}
            about |= {file.name for file in case.rglob("*") if file.suffix in LISTS}
            end, line = attempt(READERS[name], case, about)
            ends[name][end] += 1
            if args.loud or end in ENDS[2:]:
                line = line.replace(str(case), "")
                print(f"{name} {number // len(names)} | {what}, {path.relative_to(case)} | {end} | {line}", flush=True)
            shutil.rmtree(case.parent)
    now = stamp()
    rows = {n: [str(c.total()), *(str(c[end]) for end in ENDS), now] for n, c in ends.items() if c}
    total = sum(ends.values(), Counter[str]())
    rows["all"] = [str(total.total()), *(str(total[end]) for end in ENDS), now]
    for name, row in rows.items():
        print(name, *row, sep=" | ")
    if args.record:
        record("damage", HEADER, rows)
    return int(any(total[end] for end in ENDS[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
