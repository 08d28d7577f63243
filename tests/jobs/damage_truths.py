"""What lies on the disk, read without the product's readers: the truths of random_damage.py."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from tests.jobs import fuzz_loaders as sets

PICTURES = {".jpg", ".jpeg", ".png"}
FILMS = {".avi", ".mp4"}

Row = tuple[tuple[str, ...], Any]  # what something is called and belongs to; its numbers


class Damaged(Exception):
    """What is there cannot be read, or contradicts itself."""


def png_is_whole(data: bytes) -> bool:
    """Whether the chunks of a PNG have the checksums that stand behind them, up to its end."""
    at = 8
    while at + 8 <= len(data):
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


def listed(root: Path, file: Path, labelled: bool, *more: Path) -> Iterator[Row]:
    """`CLASS/NAME` or `NAME LABEL` a line, below `root`."""
    for other in more:
        yield from listed(root, other, labelled)
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


FINE = {"cub": "CUB_200_2011", "aircraft": "fgvc-aircraft-2013b/data", "cars": "stanford_cars"}


def cub(root: Path) -> Iterator[Row]:
    root = root / FINE["cub"]
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
    root = root / FINE["aircraft"]
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


def cars(part: str) -> Callable[[Path], Iterator[Row]]:
    """The lists are MATLAB's, without checksums; the two folders look for the test list in different places."""

    def read(root: Path) -> Iterator[Row]:
        from scipy.io import loadmat

        root = root / FINE["cars"]
        test = root / ("" if part == "sage" else "devkit") / "cars_test_annos_withlabels.mat"
        try:
            names = [str(n) for n in loadmat(root / "devkit/cars_meta.mat", squeeze_me=True)["class_names"]]
            rows = [
                (name, f"cars_{name}/{row['fname']}", int(row["class"]) - 1)
                for name, file in (("train", root / "devkit/cars_train_annos.mat"), ("test", test))
                for row in np.atleast_1d(loadmat(file, squeeze_me=True)["annotations"])
            ]
        except Exception as error:
            raise Damaged(str(error)) from None
        once([name for _, name, _ in rows], root)
        if any(not 0 <= y < len(names) for *_, y in rows):
            raise Damaged("a label of no class")
        for name, path, y in rows:
            yield (name, path, names[y]), picture(root / path)
        yield from ((("class", name), 0) for name in names)

    return read


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


def cityscapes(root: Path) -> Iterator[Row]:
    def found(folder: str, end: str) -> dict[str, Path]:
        paths = [p for p in below(root / "cityscapes" / folder / "train") if p.name.lower().endswith(end.lower())]
        return {p.name[: -len(end)]: p for p in paths if len(p.relative_to(root).parts) == 5}

    photos, labels = found("leftImg8bit", "_leftImg8bit.png"), found("gtFine", "_gtFine_labelTrainIds.png")
    if photos.keys() != labels.keys():
        raise Damaged("photos and maps of other names")
    yield from maps([(photos[key], labels[key]) for key in photos], root, 19)


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


def davis(
    root: Path, names: str, images: str = "JPEGImages/480p", masks: str = "Annotations/480p", binary: bool = False
) -> Iterator[Row]:
    """`names`: the list; without it every folder counts."""
    words = [line.split()[0] for line in lines(root / names)] if names else []
    named = [word.split("/")[-2] if "/" in word else word for word in words]
    named = named or sorted(path.name for path in (root / images).iterdir() if path.is_dir())
    for name, frames in sequences_of(root / images, dict.fromkeys(named)):
        stems = [path.stem for path in frames]
        found = [path for path in below(root / masks / name, [".png"]) if path.parent.name == name]
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


def hmdb51(root: Path) -> Iterator[Row]:
    for folder in sorted(path for path in (root / "data").iterdir() if path.is_dir()):
        file = root / f"anno/{folder.name}_test_split1.txt"
        rows = [re.fullmatch(r"(.*\S)\s+([012])", line) for line in lines(file)]
        if not all(rows):
            raise Damaged(f"{file.name}: no label")
        for name in once([row[1] for row in rows if row and row[2] == "1"], file):
            yield (f"{folder.name}/{name}", folder.name), film(folder / name)


def k400(root: Path) -> Iterator[Row]:
    for path in below(root / "train", FILMS):
        yield (str(path.relative_to(root / "train")), path.parent.name), film(path)


def fight(root: Path) -> Iterator[Row]:
    rows = table(root / "clips.csv")
    try:
        source = {f"{row['class']}/{row['clip']}": int(row["source_video"]) for row in rows}
    except (KeyError, ValueError) as error:
        raise Damaged(str(error)) from None
    once([f"{row['class']}/{row['clip']}" for row in rows], root / "clips.csv")
    tested = sorted(set(source.values()) - {-1})[::3]
    for name, number in source.items():
        if number >= 0 and number not in tested:
            ((_, frames),) = sequences_of(root, [name])
            pixels = [picture(path) for path in frames]
            if len({x.shape for x in pixels}) > 1:
                raise Damaged(f"{name}: frames of several sizes")
            yield (name, name.split("/")[0]), np.stack([coarse(x) for x in pixels])


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


def in_parts(root: Path, *parts: str) -> Iterator[Row]:
    for part in parts:
        yield from no_classes(in_classes(root / part, root))


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
