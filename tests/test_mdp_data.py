"""mdp: the readers on tiny official trees, bad input, the union label space, and loading."""

import contextlib
import gc
import hashlib
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from mdp.datasets import (
    COCO_HOLES,
    NAMES,
    PNG,
    READERS,
    Pairs,
    SegSet,
    UnionDataset,
    class_table,
    described,
    open_set,
    to_union,
)
from mdp.transforms import TwoViews
from shared_utils import UserError
from shared_utils.data import Keyed, fingerprint, sample_rng

SIZE = (12, 8)  # width, height of the tiny images
SPLITS = Path(__file__).parent.parent / "mdp" / "splits"


# Official trees, written from their documentation and not from the readers -----------------------------------------


def ids_map(ids: list[int]) -> np.ndarray:
    """uint8 [8, 12] that holds `ids` over and over."""
    return np.resize(np.array(ids, np.uint8), SIZE[::-1])


def write_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


def write_label(path: Path, ids: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    if palette:
        image.putpalette([(37 * i) % 256 for i in range(768)])
        assert image.mode == "P"
    image.save(path)


def write_list(path: Path, stems: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{stem}\n" for stem in stems))


def voc_tree(root: Path, ids: np.ndarray) -> None:
    tree = root / "VOCdevkit/VOC2012"
    for stem in ("2007_000032", "2008_000002", "2007_000033"):
        write_image(tree / f"JPEGImages/{stem}.jpg")
    write_label(tree / "SegmentationClass/2007_000032.png", ids, palette=True)  # VOC's own map, with the border
    write_label(tree / "SegmentationClassAug/2007_000032.png", np.zeros_like(ids))  # SBD's, which must not win
    write_label(tree / "SegmentationClassAug/2008_000002.png", ids)  # SBD maps are grey
    write_label(tree / "SegmentationClass/2007_000033.png", ids, palette=True)
    write_list(tree / "ImageSets/Segmentation/trainaug.txt", ["2007_000032", "2008_000002"])
    write_list(tree / "ImageSets/Segmentation/val.txt", ["2007_000033"])


def context_tree(root: Path, ids: np.ndarray) -> None:
    tree = root / "VOCdevkit/VOC2010"
    for stem, split in (("2008_000002", "train"), ("2008_000003", "val")):
        write_image(tree / f"JPEGImages/{stem}.jpg")
        write_label(tree / f"SegmentationClassContext/{stem}.png", ids)
        write_list(tree / f"ImageSets/SegmentationContext/{split}.txt", [stem])


def ade_tree(root: Path, ids: np.ndarray) -> None:
    tree = root / "ade/ADEChallengeData2016"
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(tree / f"images/{split}/{stem}.jpg")
        write_label(tree / f"annotations/{split}/{stem}.png", ids)


def coco_tree(root: Path, ids: np.ndarray) -> None:
    for split, stem in (("train2017", "000000000009"), ("train2017", "000000000025"), ("val2017", "000000000139")):
        write_image(root / f"coco_stuff164k/images/{split}/{stem}.jpg")
        write_label(root / f"coco_stuff164k/annotations/{split}/{stem}.png", np.full_like(ids, 181))  # the raw map
        write_label(root / f"coco_stuff164k/annotations/{split}/{stem}_labelTrainIds.png", ids)


def cityscapes_tree(root: Path, ids: np.ndarray) -> None:
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        stem = f"{split}/{city}/{city}_000000_000019"
        write_image(root / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png")
        write_label(root / f"cityscapes/gtFine/{stem}_gtFine_labelTrainIds.png", ids)
        write_label(root / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png", np.full_like(ids, 33))
        write_label(root / f"cityscapes/gtFine/{stem}_gtFine_color.png", ids, palette=True)


def camvid_tree(root: Path, ids: np.ndarray) -> None:
    for split in ("train", "val", "test"):
        write_image(root / f"camvid11/images/{split}/0001TP_{split}.jpg")
        write_label(root / f"camvid11/labels/{split}/0001TP_{split}.png", ids)


def labelmefacade_tree(root: Path, ids: np.ndarray) -> None:
    for split in ("train", "test"):
        write_image(root / f"labelmefacade8/images/{split}/street_{split}.jpg")
        write_label(root / f"labelmefacade8/labels/{split}/street_{split}.png", ids)


def ccp_tree(root: Path, ids: np.ndarray) -> None:
    for stem in ("0001", "0002"):
        write_image(root / f"ccp59/images/{stem}.jpg")
        write_label(root / f"ccp59/labels/{stem}.png", ids)


# name: writer, classes, {raw id: local id}, images of the train split
TREES: dict[str, tuple[Callable, int, dict[int, int], int]] = {
    "voc": (voc_tree, 21, {0: 0, 1: 1, 20: 20, 255: 255}, 2),
    "ade": (ade_tree, 150, {0: 255, 1: 0, 75: 74, 150: 149}, 1),
    "coco": (coco_tree, 171, {0: 0, 84: 84, 170: 170, 255: 255}, 2),
    "cityscapes": (cityscapes_tree, 19, {0: 0, 18: 18, 255: 255}, 2),
    "context": (context_tree, 60, {0: 0, 1: 1, 59: 59}, 1),
    "context59": (context_tree, 59, {0: 255, 1: 0, 59: 58}, 1),
    "camvid": (camvid_tree, 11, {0: 0, 10: 10, 11: 255}, 1),
    "labelmefacade": (labelmefacade_tree, 8, {0: 0, 7: 7, 255: 255}, 1),
    "ccp": (ccp_tree, 59, {0: 0, 58: 58}, 2),
}


def write_tree(name: str, root: Path) -> dict[int, int]:
    """Write the set's tree with every raw id of its table; return that table."""
    writer, _, expected, _ = TREES[name]
    writer(root, ids_map(list(expected)))
    return expected


def tiny(root: Path, *names: str) -> list[SegSet]:
    for name in names:
        write_tree(name, root)
    return [open_set(name, root) for name in names]


# Readers -----------------------------------------------------------------------------------------------------------


def test_every_reader_is_tested():
    assert set(TREES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_reader(name, tmp_path):
    expected = write_tree(name, tmp_path)
    opened = open_set(name, tmp_path)
    assert len(opened) == TREES[name][3]
    assert len(opened.classes) == len(opened.palette) == len(set(opened.classes)) == TREES[name][1]
    assert all(0 <= value <= 255 for colour in opened.palette for value in colour)
    for i in range(len(opened)):
        image, label = opened.load(i)
        assert image.mode == "RGB" and image.size == SIZE and label.dtype == np.uint8
        np.testing.assert_array_equal(label, ids_map(list(expected.values())))
    assert open_set(name, tmp_path, "train").pairs == opened.pairs
    for split in sorted({"val", "test"} & READERS[name].splits.keys()):
        assert not set(open_set(name, tmp_path, split).pairs) & set(opened.pairs), (
            "train shares an image with another split"
        )
    if name != "labelmefacade":  # it has lists of its own
        assert open_set(name, tmp_path, "pretrain").pairs == opened.pairs


def test_voc_background_ignored(tmp_path):
    write_tree("voc", tmp_path)
    opened = open_set("voc", tmp_path, "trainaug", voc_background="ignore")
    assert opened.pairs == open_set("voc", tmp_path).pairs
    assert len(opened.classes) == len(opened.palette) == 20 and opened.classes[0] == "aeroplane"
    np.testing.assert_array_equal(opened.label(0), ids_map([255, 0, 19, 255]))


def test_coco_raw_ids_close_the_holes(tmp_path):
    holes = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert sorted(COCO_HOLES) == holes
    raw = [0, 10, 12, 91, 92, 181, 255]
    write_image(tmp_path / "coco_stuff164k/images/train2017/000000000009.jpg")
    label = tmp_path / "coco_stuff164k/stuffthingmaps/train2017/000000000009.png"
    write_label(label, ids_map(raw))
    local = [i - sum(hole < i for hole in holes) if i < 255 else 255 for i in raw]
    assert local == [0, 10, 11, 80, 81, 170, 255]  # 80 things, then stuff
    np.testing.assert_array_equal(open_set("coco", tmp_path).label(0), ids_map(local))
    write_label(label, ids_map([0, 44]))
    with pytest.raises(UserError, match="44 out of range"):
        open_set("coco", tmp_path)


def test_known_class_names():
    """Positions that other files of the release rely on: they pin the order of the name lists."""
    known = "ade 0 wall, ade 149 flag, coco 0 person, coco 170 wood, cityscapes 18 bicycle, context 0 background"
    known += ", context59 0 aeroplane, camvid 3 road, labelmefacade 7 window, ccp 41 skin"
    for entry in known.split(", "):
        name, index, title = entry.split()
        assert class_table(name)[0][int(index)] == title


def test_labelmefacade_lists_follow_their_rule(tmp_path):
    """The 200 smallest sha256 of the official test stems are held out; pretraining has the other 645 and train."""

    def digest(stem: str) -> str:
        return hashlib.sha256(stem.encode()).hexdigest()

    pretrain = (SPLITS / "labelmefacade_pretrain.txt").read_text().split()
    holdout = (SPLITS / "labelmefacade_holdout.txt").read_text().split()
    train, rest = pretrain[:100], pretrain[100:]
    assert (len(rest), len(holdout), len({*pretrain, *holdout})) == (645, 200, 945)
    assert sorted(holdout + rest, key=digest) == holdout + rest and train == sorted(train)

    tree, jpg, png = tmp_path / "labelmefacade8", io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(jpg, "jpeg")
    Image.new("L", (4, 4)).save(png, "png")
    for kind, content, ending in (("images", jpg, "jpg"), ("labels", png, "png")):
        for split, stems in (("train", train), ("test", rest + holdout)):
            (tree / kind / split).mkdir(parents=True)
            for stem in stems:
                (tree / kind / split / f"{stem}.{ending}").write_bytes(content.getvalue())
    found = {s: {p.stem for p, _ in open_set("labelmefacade", tmp_path, s).pairs} for s in ("pretrain", "holdout")}
    assert found == {"pretrain": set(pretrain), "holdout": set(holdout)}
    assert len(open_set("labelmefacade", tmp_path, "train")) == 100
    for kind, ending in (("images", "jpg"), ("labels", "png")):
        (tree / kind / "test" / f"{rest[7]}.{ending}").unlink()
    with pytest.raises(UserError, match=rest[7]):
        open_set("labelmefacade", tmp_path, "pretrain")


# Bad input ---------------------------------------------------------------------------------------------------------


def refusal(name: str, root: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        open_set(name, root, split)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_missing_root_tree_and_split(tmp_path):
    message = refusal("ade", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "DATA_ROOT" in message
    for name in NAMES:
        message = refusal(name, tmp_path)
        assert str(tmp_path / READERS[name].tree) in message and READERS[name].layout in message
    write_tree("ccp", tmp_path)
    assert "no split 'val'; choose from pretrain, train" in refusal("ccp", tmp_path, "val")
    assert "'imagenet'" in refusal("imagenet", tmp_path) and "camvid" in refusal("imagenet", tmp_path)


def test_empty_split(tmp_path):
    write_tree("ade", tmp_path)
    for path in (tmp_path / "ade/ADEChallengeData2016").glob("*/training/*"):
        path.unlink()
    message = refusal("ade", tmp_path)
    assert "'train' is empty" in message and READERS["ade"].layout in message
    write_tree("voc", tmp_path)
    write_list(tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt", [])
    assert "trainaug.txt: the list is empty" in refusal("voc", tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").unlink()
    assert "trainaug.txt is missing" in refusal("voc", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_image_without_label_and_label_without_image(name, tmp_path):
    write_tree(name, tmp_path)
    image, label = open_set(name, tmp_path).pairs[-1]
    kept = label.read_bytes()
    label.unlink()
    message = refusal(name, tmp_path)
    assert str(image) in message and str(label.parent) in message and "no label" in message
    label.write_bytes(kept)
    image.rename(tmp_path / "elsewhere.jpg")
    message = refusal(name, tmp_path)
    # a list names the image that is missing; without a list the label is the odd one, or nothing is left of the split
    assert any(hint in message for hint in (str(image), str(label), "is empty"))


def test_label_without_image(tmp_path):
    write_tree("camvid", tmp_path)
    extra = tmp_path / "camvid11/labels/train/0001TP_extra.png"
    write_label(extra, ids_map([0]))
    assert str(extra) in refusal("camvid", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_label_size_mismatch(name, tmp_path):
    write_tree(name, tmp_path)
    image, label = open_set(name, tmp_path).pairs[0]
    write_label(label, np.ones((8, 11), np.uint8))
    message = refusal(name, tmp_path)
    assert all(part in message for part in (str(label), str(image), "11x8", "12x8"))


@pytest.mark.parametrize("name", NAMES)
def test_label_id_out_of_range(name, tmp_path):
    write_tree(name, tmp_path)
    label = open_set(name, tmp_path).pairs[0][1]
    first_bad = max(raw for raw in TREES[name][2] if raw < 255) + 1
    for bad in (first_bad, 254):
        ids = ids_map([1])
        ids[3, 4] = bad
        write_label(label, ids)
        message = refusal(name, tmp_path)
        assert str(label) in message and f"{bad} out of range" in message


@pytest.mark.parametrize("name", NAMES)
def test_png_modes(name, tmp_path):
    write_tree(name, tmp_path)
    label = open_set(name, tmp_path).pairs[0][1]
    first_bad = max(raw for raw in TREES[name][2] if raw < 255) + 1
    for value in (first_bad, 256, 257, 65535):  # 257 is 1 where only the low byte is kept
        Image.fromarray(np.full(SIZE[::-1], value, np.uint16)).save(label)
        message = refusal(name, tmp_path)
        assert str(label) in message and f"{value} out of range" in message
    Image.fromarray(np.ones(SIZE[::-1], np.uint16)).save(label)  # stored numbers count, in 16 bits too
    assert set(np.unique(open_set(name, tmp_path).label(0))) == {TREES[name][2].get(1, 1)}
    Image.new("RGB", SIZE).save(label)
    assert str(label) in refusal(name, tmp_path) and "'RGB'" in refusal(name, tmp_path)
    write_label(label, ids_map([1]), palette=True)
    if name in ("voc", "context", "context59"):  # the official maps of these have a palette
        assert len(open_set(name, tmp_path)) == TREES[name][3]
    else:
        assert str(label) in refusal(name, tmp_path) and "'P'" in refusal(name, tmp_path)


def test_truncated_files(tmp_path):
    write_tree("ade", tmp_path)
    image, label = open_set("ade", tmp_path).pairs[0]
    for path in (label, image):
        path.write_bytes(path.read_bytes()[:-30])
        assert str(path) in refusal("ade", tmp_path)
    image.write_text("this is no image")
    assert str(image) in refusal("ade", tmp_path)


def test_faults_beyond_the_checked_files_surface_when_read(tmp_path):
    """The opening check takes 8 files; the same checks hold for the rest when training reads them."""
    for i in range(30):
        write_image(tmp_path / f"ccp59/images/{i:04}.jpg")
        write_label(tmp_path / f"ccp59/labels/{i:04}.png", ids_map([0, 1]))
    label = tmp_path / "ccp59/labels/0001.png"
    write_label(label, ids_map([0, 59]))
    union = UnionDataset([open_set("ccp", tmp_path)], TwoViews("moco", 8))
    with pytest.raises(UserError, match=f"{label}: label id 59"):
        union[1]


def test_one_set_twice(tmp_path):
    [ade] = tiny(tmp_path, "ade")
    with pytest.raises(UserError, match="ade, ade"):
        UnionDataset([ade, ade], TwoViews("moco", 8))


# Other people's files ----------------------------------------------------------------------------------------------


def grey_png(path: Path, ids: np.ndarray, depth: int) -> None:
    """A grey PNG of `depth` bits a pixel that stores `ids` [H, W] as they are (PIL writes 1, 8 and 16 only)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    bits = (ids[..., None].astype(int) >> np.arange(depth)[::-1]) & 1  # [H, W, depth]
    rows = np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, 0, 0, 0, 0)
    path.write_bytes(PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def facade(root: Path, ids: np.ndarray) -> Path:
    """A train split of LabelMeFacade with one image, whose label map is returned."""
    write_image(root / "labelmefacade8/images/train/a.jpg", ids.shape[::-1])
    label = root / "labelmefacade8/labels/train/a.png"
    write_label(label, ids)
    return label


@pytest.mark.parametrize(("depth", "ids"), [(1, [0, 1]), (2, [0, 1, 2, 3]), (4, [0, 7, 5]), (8, [0, 7, 255])])
@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_grey_maps_of_few_bits_give_the_stored_numbers(depth, ids, size, tmp_path):
    """Decoders stretch 2 and 4 bits to 0..255 (0, 85, 170, 255 and 0, 17, 34, ...)."""
    stored = np.resize(np.array(ids, np.uint8), size)
    label = facade(tmp_path, stored)
    grey_png(label, stored, depth)
    np.testing.assert_array_equal(open_set("labelmefacade", tmp_path).label(0), stored)


def test_a_flipped_bit_of_a_map_is_never_another_number(tmp_path):
    """Pillow's decoder skips the checksums of the pixels, and alone it gives other numbers for some of these files."""
    ids = np.random.default_rng(0).integers(0, 8, (12, 16)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    label, rng, unseen = facade(tmp_path, ids), random.Random(0), 0
    found, whole = open_set("labelmefacade", tmp_path), label.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        label.write_bytes(data)
        try:
            assert np.array_equal(found.label(0), ids)
        except UserError:
            with contextlib.suppress(Exception), Image.open(label) as image:
                unseen += not np.array_equal(np.asarray(image), ids)
    assert unseen


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_maps_count_by_index(bits, tmp_path):
    """VOC's maps: by index, at every depth and also with a palette of its own (here colours that no set has)."""
    write_tree("voc", tmp_path)
    label = open_set("voc", tmp_path).pairs[0][1]
    ids = ids_map(list(range(min(2**bits, 21))))
    image = Image.fromarray(ids)
    image.putpalette([(11 * i + 5) % 256 for i in range(768)])
    image.save(label, bits=bits)
    np.testing.assert_array_equal(open_set("voc", tmp_path).label(0), ids)


def test_a_palette_that_an_optimiser_ordered_anew_counts_by_its_colours(tmp_path):
    """The same VOC map with its palette sorted by use, as lossless PNG tools leave it."""
    write_tree("voc", tmp_path)
    label = open_set("voc", tmp_path).pairs[0][1]
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}  # VOC's
    ids = ids_map(list(colours))
    for order in ([255, 15, 0, 1, 20], [0, 1, 15, 20, 255]):
        image = Image.fromarray(np.vectorize(order.index)(ids).astype(np.uint8))
        image.putpalette(sum((list(colours[i]) for i in order), []))
        image.save(label)
        np.testing.assert_array_equal(open_set("voc", tmp_path).label(0), ids)


def test_a_palette_of_greys_is_grey(tmp_path):
    """`convert("P")` of a grey map gives such a palette, in sets whose maps have none."""
    label = facade(tmp_path, ids_map([0, 3, 7]))
    Image.fromarray(ids_map([0, 3, 7])).convert("P").save(label)
    with Image.open(label) as stored:
        assert stored.mode == "P"
    np.testing.assert_array_equal(open_set("labelmefacade", tmp_path).label(0), ids_map([0, 3, 7]))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_label_maps_of_another_format(kind, tmp_path):
    label = facade(tmp_path, ids_map([0, 3, 7]))
    Image.fromarray(ids_map([0, 3, 7])).save(label, format=kind)
    message = refusal("labelmefacade", tmp_path)
    assert str(label) in message and f"this is {kind}" in message and "export it as PNG" in message
    assert ("changes the numbers" in message) == (kind == "JPEG")


@pytest.mark.parametrize("name", ["labelmefacade", "voc"])
def test_jpeg_maps_beside_the_photos(name, tmp_path):
    write_tree(name, tmp_path)
    label = open_set(name, tmp_path).pairs[0][1]
    label.unlink()
    for folder in {label.parent, label.parents[1] / "SegmentationClassAug"}:
        (folder / label.name).unlink(missing_ok=True)
    Image.fromarray(ids_map([0, 3])).save(label.with_suffix(".jpg"))
    assert f"{label.stem}.jpg is no label map: JPEG changes the numbers" in refusal(name, tmp_path)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "RGB"])
def test_maps_with_colours_or_transparency(mode, tmp_path):
    label = facade(tmp_path, ids_map([0, 3, 7]))
    Image.fromarray(ids_map([0, 3, 7])).convert(mode).save(label)
    assert f"PNG mode {mode!r}" in refusal("labelmefacade", tmp_path)


@pytest.mark.parametrize("name", ["ade", "context59"])
def test_maps_that_are_reduced_already(name, tmp_path):
    """Classes from 0 and ignored pixels at 255: the sets' own maps never hold 255. VOC's and others' do."""
    write_tree(name, tmp_path)
    label = open_set(name, tmp_path).pairs[0][1]
    write_label(label, ids_map([255, 0, 1, 40]))
    message = refusal(name, tmp_path)
    assert str(label) in message and "reduced already" in message and f"0..{READERS[name].raw[-1]}" in message
    write_label(label, ids_map([0, 1, 40]))
    np.testing.assert_array_equal(open_set(name, tmp_path).label(0), ids_map([255, 0, 39]))


def test_the_orientation_tag_of_a_photo_moves_nothing(tmp_path):
    """Both are read as stored; a map that was drawn on the turned photo is refused with its cure."""
    label = facade(tmp_path, ids_map([0, 3, 7]))
    photo = tmp_path / "labelmefacade8/images/train/a.jpg"
    pixels = np.asarray(Image.open(photo))
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = tag
        Image.fromarray(pixels).save(photo, exif=exif)
        image, ids = open_set("labelmefacade", tmp_path).load(0)
        assert image.size == SIZE
        np.testing.assert_array_equal(ids, ids_map([0, 3, 7]))
        write_label(label, ids_map([0, 3, 7]).T.copy())
        message = refusal("labelmefacade", tmp_path)
        assert ("as its orientation tag turns it" in message) == (tag >= 5)
        write_label(label, ids_map([0, 3, 7]))


@pytest.mark.parametrize("name", NAMES)
def test_hidden_and_foreign_files_are_none_of_the_set(name, tmp_path):
    """What macOS, file servers and notebooks leave: resource forks, thumbnails, checkpoints, in every set."""
    write_tree(name, tmp_path)
    before = open_set(name, tmp_path).pairs
    for path in {path for pair in before for path in pair}:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")
        (path.parent / ".DS_Store").write_bytes(b"\0")
        (path.parent / "Thumbs.db").write_bytes(b"\0")
        for base in (path.parent, path.parents[1]):  # at the depth of the images, and of Cityscapes' cities
            for folder in ("@eaDir", ".ipynb_checkpoints", "__MACOSX", "#recycle"):
                (base / folder).mkdir(exist_ok=True)
                (base / folder / path.name).write_bytes(path.read_bytes())
    found = open_set(name, tmp_path)
    assert found.pairs == before and not found.unread


@pytest.mark.parametrize("name", NAMES)
def test_other_files_between_the_photos_are_counted(name, tmp_path):
    write_tree(name, tmp_path)
    before = open_set(name, tmp_path).pairs
    folder = before[0][0].parent
    for file in ("a.heic", "b.HEIC", "c.txt"):
        (folder / file).write_bytes(b"\0")
    found = open_set(name, tmp_path)
    assert found.pairs == before and found.unread == {".heic": 2, ".txt": 1}


def test_pairs_are_no_python_objects(tmp_path):
    """The loader's processes would copy one each; a packed set has as many objects whatever its length."""
    files = [(tmp_path / f"images/{i}.jpg", tmp_path / f"labels/{i}.png") for i in range(3000)]
    gc.collect()
    before = len(gc.get_objects())
    found = described("camvid", files)
    gc.collect()
    assert len(gc.get_objects()) - before < 200
    assert found.pairs == files and found.pairs[-1] == files[-1] and found.pairs[5:7] == files[5:7]
    assert found.fingerprint() == fingerprint([path for pair in files for path in pair])


def test_one_name_twice(tmp_path):
    write_tree("camvid", tmp_path)
    photo = open_set("camvid", tmp_path).pairs[0][0]
    write_image(photo.with_suffix(".png"))
    message = refusal("camvid", tmp_path)
    assert photo.with_suffix(".png").name in message and photo.name in message and "keep one" in message


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "{} ",
        "{}.jpg",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",  # DeepLab's train_aug.txt
        "/data/VOC2012/JPEGImages/{}.jpg",
        "{}\r",
    ],
)
def test_forms_of_a_split_list(form, tmp_path):
    write_tree("voc", tmp_path)
    before = open_set("voc", tmp_path).pairs
    text = "\n".join(form.format(photo.stem) for photo, _ in before) + "\n\n  \n"
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").write_text("\ufeff" + text)
    assert open_set("voc", tmp_path).pairs == before


def test_lists_that_say_something_else(tmp_path):
    """A class list of VOC (1: it is there, -1: it is not) names every image of the set; a list names an image twice."""
    write_tree("voc", tmp_path)
    file = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
    write_list(file, ["2007_000032  1", "2008_000002 -1"])
    assert f"{file}, line 1: expected an image" in refusal("voc", tmp_path)
    write_list(file, ["2007_000032", "2008_000002", "2007_000032"])
    assert f"{file} names 2007_000032 2 times" in refusal("voc", tmp_path)
    file.unlink()
    assert "trainaug.txt is missing" in refusal("voc", tmp_path)  # never every image of the folder


# Union label space -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 171), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_union_minus_offset_is_local(counts, seed, number):
    """A local id comes back, ignore stays -1, and the sets' ids are disjoint."""
    number %= len(counts)
    sets = [SegSet(str(i), ("c",) * c, ((0, 0, 0),) * c, Pairs(), np.zeros(0)) for i, c in enumerate(counts)]
    union = UnionDataset(sets, TwoViews("moco", 8))
    local = torch.from_numpy(np.random.default_rng(seed).integers(-1, counts[number], (7, 9)).astype(np.uint8))
    ids = to_union(local, union.offsets[number])
    assert ids.dtype == torch.int64
    ignored = local == 255
    assert (ids[ignored] == -1).all()
    assert torch.equal((ids - union.offsets[number])[~ignored], local[~ignored].long())
    assert (union.dataset_of_class[ids[~ignored]] == number).all()
    assert union.num_classes == len(union.dataset_of_class) == sum(counts)
    assert all((union.dataset_of_class[s] == i).all() for i, s in enumerate(union.class_slices))


def test_union_id_255_is_a_class(tmp_path):
    """VOC + ADE + COCO: 342 classes; COCO's local 84 is union 255 and survives beside an ignored pixel."""
    union = UnionDataset(tiny(tmp_path, "voc", "ade", "coco"), TwoViews("mmseg", 12))
    assert (union.num_classes, union.offsets) == (342, [0, 21, 171])
    number, i = union.locate(3)
    assert (number, i) == (2, 0) and union[3]["dataset"] == 2 and len(union) == 5
    seen = set(to_union(torch.from_numpy(union.sets[2].label(0)), union.offsets[2]).unique().tolist())
    assert seen == {-1, 171, 255, 341}
    with sample_rng(0):
        views = [union[3] for _ in range(8)]
    assert set(torch.cat([v[k] for v in views for k in ("q_label", "k_label")]).unique().tolist()) == seen
    assert "342 classes" in union.describe() and "coco: 2 images, 171 classes, union ids 171..341" in union.describe()
    with pytest.raises(IndexError):
        union[5]


# Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aug", ["moco", "mmseg"])
def test_samples_depend_on_seed_epoch_index_alone(aug, tmp_path):
    keyed = Keyed(UnionDataset(tiny(tmp_path, "voc", "ccp"), TwoViews(aug, 8)), seed=3)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(4)]
    here = [keyed[key] for key in keys]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    loader = DataLoader(keyed, sampler=keys[::-1], batch_size=None, num_workers=2)  # type: ignore[arg-type]
    for a, b in zip(here[::-1], loader):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert not torch.equal(here[0]["q"], here[4]["q"]), "another epoch, another view"


def test_cache(tmp_path):
    """Large images are kept at the cache's size, small ones as they are; reading again touches no file."""
    ids = np.random.default_rng(0).integers(0, 8, (60, 80)).astype(np.uint8)
    tree = tmp_path / "labelmefacade8"
    write_image(tree / "images/train/large.jpg", (80, 60))
    write_label(tree / "labels/train/large.png", ids)
    write_image(tree / "images/train/small.jpg")
    write_label(tree / "labels/train/small.png", ids_map([0, 255, 7]))
    opened = open_set("labelmefacade", tmp_path)
    plain, cached = (UnionDataset([opened], TwoViews("moco", 16), cache_size=s) for s in (0, 30))
    assert [cached.read(i)[0].size for i in (0, 1)] == [(40, 30), SIZE]
    for i in (0, 1):
        image, label = cached.read(i)
        assert image.size == label.size and label.mode == "L"
        assert set(np.unique(np.asarray(label))) == set(np.unique(opened.label(i)))
    with sample_rng(4):
        small = plain[1]
    with sample_rng(4):
        again = cached[1]
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(again[k])) for k, v in small.items())
        before = [np.asarray(part).copy() for part in cached.read(0)]
        seen = torch.cat([cached[0]["q_label"].flatten() for _ in range(10)])
    assert set(seen.tolist()) == set(np.unique(ids).tolist())
    for path in [*tree.rglob("*.jpg"), *tree.rglob("*.png")]:
        path.unlink()
    assert all(cached[i]["q"].shape == (3, 16, 16) for i in (0, 1))
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, cached.read(0))), "views never alter the cache"
    assert "shorter side at most 30" in cached.describe() and "cache off" in plain.describe()
    with pytest.raises(UserError, match="large.jpg"):
        plain[0]


def test_real_small_sets():
    root = os.environ.get("DATA_ROOT")
    if not root or not (Path(root) / "camvid11").is_dir():
        pytest.skip("DATA_ROOT does not hold camvid11, labelmefacade8 and ccp59")
    splits = [("camvid", "train", 367), ("camvid", "val", 101), ("camvid", "test", 233), ("ccp", "train", 1004)]
    splits += [("labelmefacade", s, n) for s, n in (("train", 100), ("test", 845), ("pretrain", 745), ("holdout", 200))]
    for name, split, count in splits:
        opened = open_set(name, root, split)
        assert len(opened) == count
        for i in range(0, count, 50):
            assert opened.label(i).min() < len(opened.classes)
