"""Small sets, the product's readers of them, and what they must give: the readers of random_damage.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tests.jobs import damage_truths as truths
from tests.jobs import fuzz_loaders as sets
from tests.jobs.damage_truths import FILMS, Row, below, coarse

# --- what the product reads -------------------------------------------------------------------------------------------


def of(images: Any, root: Path, *head: str, classes: bool = False, loader: bool = False) -> Iterator[Row]:
    """An ImageList. `loader`: by the decoder of the batched loader."""
    from shared_utils.decode import Encoded

    for i, path in enumerate(images.paths()):
        label = images.label(i)
        name = images.classes[label] if images.classes else str(label)
        pixels = Encoded(path).pixels() if loader else np.asarray(images.image(i))
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
        at = root / truths.FINE[kind]
        yield from of(train, at, "train", classes=True)
        yield from of(test, at, "test")

    return read


def read_mra_lists(root: Path) -> Iterator[Row]:
    from mra import data, main_supervised

    words = ["--data_path", str(root), "--train_list", f"{root}/train.txt", "--val_list", f"{root}/val.txt"]
    found = data.open_sets(main_supervised.get_parser().parse_args(words))
    for images in (found.train, found.tests["val"]):
        yield from of(images, root)


def read_mra_few(at: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from mra.data import read_fewshot

        for part, images in read_fewshot(root).items():
            yield from of(images, root / at, part)

    return read


def read_flat(reader: str, at: str = "", *more: Any) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from flat import data

        found = getattr(data, reader)(root, *more)
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


def read_davis(name: str, split: str) -> Callable[[Path], Iterator[Row]]:
    def read(root: Path) -> Iterator[Row]:
        from uvos_dino import data

        for video in data.open_videos(name, root, split):
            for i, frame in enumerate(data.read_video(video.frames, (-1, -1))):
                yield (video.name, "frame", str(i)), (frame.permute(1, 2, 0).numpy() * 255).round()
            for i, path in video.masks.items():
                yield (video.name, "mask", str(i)), data.read_mask(path, data.LAYOUTS[name].binary)

    return read


def read_training(root: Path) -> Iterator[Row]:
    from uvos_dino import data

    for frames in data.training_videos(root):
        for number, path in enumerate(frames):
            pixels = data.read_frame(path, (-1, -1)).permute(1, 2, 0).numpy() * 255
            yield (os.path.relpath(path.parent, root), str(number)), pixels.round()


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


def few_folders(root: Path) -> None:
    sets.classes(root, *sets.SPLITS, each=3, own=True)


def named_list(root: Path) -> None:
    for name in sets.classes(root, "train"):
        part, group, file = name.split("/")
        (root / name).rename(root / part / group / f"{group}_{file}")
    sets.text(root / "list.txt", [path.name for path in below(root / "train")[::2]])


def labelled_maps(images: str, labels: str, names: str = "") -> Callable[[Path], None]:
    """Each map has a block of another number."""

    def make(root: Path) -> None:
        sets.segmentation(images, labels, names)(root)
        for i in range(16):
            path = root / labels.format(f"{i:02d}")
            sets.mask(path, 1 + i % 2, mode="P" if "VOC" in images else "L")

    return make


def ordered_sequences(
    frames: str = sets.FRAMES, masks: str = sets.MASKS, names: str = "", pairs: bool = False
) -> Callable[[Path], None]:
    """The object of frame t begins at line 4 t, so that one frame's mask is not another's."""

    def make(root: Path) -> None:
        sets.sequences(frames, masks, names, pairs)(root)
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


READERS: dict[str, Reader] = {
    "class folders": Reader(lambda r: sets.classes(r, "train"), read_folder, lambda r: truths.in_classes(r / "train")),
    "class folders, batched loader": Reader(
        lambda r: sets.classes(r, "train"), lambda r: read_folder(r, True), lambda r: truths.in_classes(r / "train")
    ),
    "photographs": Reader(sets.photos, read_photos, lambda r: truths.flat_rows(r, r)),
    "training and test folders": Reader(
        lambda r: sets.classes(r, "train", "val", each=4),
        read_splits,
        lambda r: truths.in_parts(r, "train", "val"),
    ),
    "labelled images by name": Reader(named_list, read_labelled, truths.by_names),
    "sage list": Reader(sets.listed, read_sage_list, lambda r: truths.listed(r / "train", r / "list.txt", False)),
    "sage attributes": Reader(sets.attributes, read_attributes, truths.attributes),
    "sscl own folders": Reader(
        lambda r: (sets.classes(r, "known", each=4), sets.photos(r / "all", 8)), read_sscl, truths.sscl_truth
    ),
    "mra lists": Reader(
        sets.numbered,
        read_mra_lists,
        lambda r: truths.listed(r, r / "train.txt", True, r / "val.txt"),
    ),
    "mra few-shot tables": Reader(sets.tables, read_mra_few("images"), truths.tables),
    "mra few-shot folders": Reader(few_folders, read_mra_few(""), truths.fewshot_folders),
    "flat folders": Reader(few_folders, read_flat("_from_folders", "", Counter()), truths.fewshot_folders),
    "flat miniImagenet": Reader(sets.tables, read_flat("_from_csv", "images"), truths.tables),
    "flat cifarfs": Reader(sets.cifarfs, read_flat("_from_lists"), truths.cifarfs),
    "mdp voc": Reader(
        labelled_maps(f"{sets.VOC}/JPEGImages/{{}}.jpg", f"{sets.VOC}/SegmentationClassAug/{{}}.png",
                      f"{sets.VOC}/ImageSets/Segmentation/trainaug.txt"),
        read_mdp("voc"), truths.voc, "SegmentationClassAug",
    ),
    "mdp camvid": Reader(
        labelled_maps("camvid11/images/train/{}.jpg", "camvid11/labels/train/{}.png"),
        read_mdp("camvid"),
        lambda r: truths.matched(r, "camvid11/images/train", "camvid11/labels/train", 11, (11,)), "labels/",
    ),
    "mdp cityscapes": Reader(
        labelled_maps("cityscapes/leftImg8bit/train/aachen/{}_leftImg8bit.png",
                      "cityscapes/gtFine/train/aachen/{}_gtFine_labelTrainIds.png"),
        read_mdp("cityscapes"), truths.cityscapes, "labelTrainIds",
    ),
    "mdp own": Reader(
        lambda r: (labelled_maps("images/a {}.jpg", "labels/a {}.png")(r),
                   sets.text(r / "classes.txt", ["ground", "house", "tree"])),  # type: ignore[func-returns-value]
        read_own, truths.own, "labels/",
    ),
    "uvos_dino DAVIS": Reader(
        ordered_sequences(names="ImageSets/2016/val.txt", pairs=True), read_davis("DAVIS", "val"),
        lambda r: truths.davis(r, "ImageSets/2016/val.txt", binary=True),
        "Annotations",
    ),
    "uvos_dino DAVIS2017": Reader(
        ordered_sequences(names="ImageSets/2017/val.txt"), read_davis("DAVIS2017", "val"),
        lambda r: truths.davis(r, "ImageSets/2017/val.txt"),
        "Annotations",
    ),
    "uvos_dino YTVIS": Reader(
        ordered_sequences("train/JPEGImages/{0}/{1}.jpg", "train/Annotations/{0}/{1}.png"),
        read_davis("YTVIS", "train"),
        lambda r: truths.davis(r, "", "train/JPEGImages", "train/Annotations"), "Annotations",
    ),
    "uvos_dino training": Reader(sets.sequences("JPEGImages/{0}/{1}.jpg"), read_training, truths.frames_below),
    "uvos_dino frames": Reader(sets.sequences("{0}/my {1}.jpg"), read_clips, truths.frames_below),
    "uvos_dino videos": Reader(
        shaded(lambda r: sets.films(r / "a/my {}.mp4", 3)), lambda r: read_clips(r, True), truths.films_below, close=6.0
    ),
    "fame folder": Reader(
        shaded(lambda r: sets.films(r / "a/my {}.avi", 4)), read_fame("folder", ""), truths.films_below, close=6.0
    ),
    "fame ucf101": Reader(shaded(sets.videos("ucf101")), read_fame("ucf101", "data"), truths.ucf101, close=6.0),
    "fame hmdb51": Reader(shaded(sets.videos("hmdb51")), read_fame("hmdb51", "data"), truths.hmdb51, close=6.0),
    "fame k400": Reader(shaded(sets.videos("k400")), read_fame("k400", "train"), truths.k400, close=6.0),
    "fame fight": Reader(sets.videos("fight"), read_fame("fight", ""), truths.fight),
    "fame diving48": Reader(shaded(sets.videos("diving48")), read_fame("diving48", "rgb"), truths.diving48, close=6.0),
    "weights of torch.save": Reader(only(make_weights, "weights.pth"), read_weights("weights.pth"), truths.weights),
    "weights of safetensors": Reader(
        only(make_weights, "weights.safetensors"), read_weights("weights.safetensors"), truths.safetensors
    ),
    "bingo bags": Reader(make_bags, read_bags, truths.bags, files=r"bags\..*"),
    "names of classes": Reader(
        lambda r: sets.text(r / "names.txt", ["red bird", "dog", "cat", "Élan"]), read_class_names, truths.class_names
    ),
}  # fmt: skip
for kind in truths.FINE:
    for part in ("sage", "mra"):
        truth = truths.cars(part) if kind == "cars" else {"cub": truths.cub, "aircraft": truths.aircraft}[kind]
        READERS[f"{part} {kind}"] = Reader(sets.fine(kind), read_fine(kind, part), truth)
