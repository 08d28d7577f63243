"""The mini data: real layouts, label ids, no shared glyph, determinism, and a writer that can be killed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from shared_utils import UserError
from shared_utils.lab import mini, mini_draw
from shared_utils.pictures import voc_palette

REPO = Path(__file__).resolve().parent.parent
SEGMENTATION = {
    "voc": ("VOCdevkit/VOC2012", {0, 1, 2, 3, 4, 5, 255}, (400, 60), (96, 96)),
    "ade": ("ade/ADEChallengeData2016", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, (400, 60), (96, 96)),
    "cityscapes": ("cityscapes", {0, 1, 2, 3, 4, 255}, (120, 80), (96, 128)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    assert mini.main(["all", "--root", str(folder)]) == 0
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def digest(folder: Path) -> dict[str, str]:
    """Digest of the decoded content of every file of a folder."""
    out = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = pixels(path).tobytes() if path.suffix in (".png", ".jpg") else path.read_bytes()
        out[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return out


def pairs(root: Path, name: str, split: str) -> list[tuple[Path, Path]]:
    """(image, label) files of a segmentation tree, found as a loader finds them."""
    base = root / "segmentation" / SEGMENTATION[name][0]
    if name == "voc":
        stems = (base / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        return [(base / f"JPEGImages/{s}.jpg", base / f"SegmentationClassAug/{s}.png") for s in stems]
    if name == "ade":
        images = sorted((base / "images" / {"train": "training", "val": "validation"}[split]).glob("*.jpg"))
        return [(p, Path(str(p).replace("/images/", "/annotations/")).with_suffix(".png")) for p in images]
    images = sorted((base / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    end = "_gtFine_labelTrainIds.png"
    return [(p, Path(str(p).replace("/leftImg8bit/", "/gtFine/").replace("_leftImg8bit.png", end))) for p in images]


# --- glyphs ----------------------------------------------------------------------------------------------------------


def test_glyph_splits_partition_the_digits():
    from sklearn.datasets import load_digits

    target = load_digits().target
    seen: Counter[int] = Counter()
    for digit in range(10):
        for split in ("train", "val", "test"):
            rows = mini_draw.glyph_split(split, digit)
            assert len(rows) >= 30 and set(target[list(rows)]) == {digit}
            seen.update(rows)
    assert len(seen) == len(target) and set(seen.values()) == {1}


RENDERERS = {
    "images": (lambda split, i: mini_draw.render_image(split, i * 7 % 200), ("train", "val")),
    "voc": (lambda split, i: mini_draw.render_scene("voc", split, i), ("train", "val")),
    "ade": (lambda split, i: mini_draw.render_scene("ade", split, i), ("train", "val")),
    "cityscapes": (lambda split, i: mini_draw.render_scene("cityscapes", split, i), ("train", "val")),
    "video01": (lambda split, i: mini_draw.render_clip(split + "01", i), ("train", "test")),
    "video02": (lambda split, i: mini_draw.render_clip(split + "02", i), ("train", "test")),
    "fewshot": (lambda split, i: mini_draw.render_fewshot(split, i * 7 % 240), ("train", "val", "test")),
}


@pytest.mark.parametrize("kind", RENDERERS)
def test_no_glyph_is_drawn_in_two_splits(kind, monkeypatch):
    render, splits = RENDERERS[kind]
    real = mini_draw.ink
    drawn: list[int] = []

    def ink(glyph: int, *args, **kwargs) -> np.ndarray:
        drawn.append(glyph)
        return real(glyph, *args, **kwargs)

    monkeypatch.setattr(mini_draw, "ink", ink)
    used = {}
    for split in splits:
        drawn.clear()
        for index in range(30):
            render(split, index)
        used[split] = set(drawn)
        assert len(used[split]) >= 10
    for first in splits:
        for second in splits:
            assert first == second or not used[first] & used[second]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_layout(root):
    rows = table(root / "images/attributes.csv")
    assert list(rows[0]) == ["path", "class", "hue", "texture", "background"]
    for split, count in (("train", 100), ("val", 20)):
        folders = sorted(path.name for path in (root / "images" / split).iterdir())
        assert folders == [f"digit_{digit}" for digit in range(10)]
        for folder in folders:
            files = sorted((root / "images" / split / folder).glob("*.jpg"))
            assert len(files) == count
            assert {str(f.relative_to(root / "images")) for f in files} == {
                row["path"] for row in rows if row["class"] == folder and row["path"].startswith(split)
            }
    assert all(pixels(root / "images" / row["path"]).shape == (64, 64, 3) for row in rows[::50])


@pytest.mark.parametrize("factor", ["hue", "texture", "background"])
def test_nuisance_factors_do_not_tell_the_class(root, factor):
    rows = [row for row in table(root / "images/attributes.csv") if row["path"].startswith("train")]
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        counts[row["class"]][row[factor]] += 1
    levels = sorted({row[factor] for row in rows})
    observed = np.array([[counts[name][level] for level in levels] for name in sorted(counts)], float)
    expected = observed.sum(1, keepdims=True) * observed.sum(0, keepdims=True) / observed.sum()
    cramer = np.sqrt(((observed - expected) ** 2 / expected).sum() / observed.sum() / (min(observed.shape) - 1))
    assert len(levels) >= 4 and cramer < 0.16  # 1.0 where a factor gives the class away


def test_hue_column_is_the_hue_of_the_object(monkeypatch):
    real = mini_draw.ink
    covers: list[np.ndarray] = []

    def ink(*args, **kwargs) -> np.ndarray:
        covers.append(real(*args, **kwargs))
        return covers[-1]

    monkeypatch.setattr(mini_draw, "ink", ink)
    for index in range(0, 1000, 40):
        image, factors = mini_draw.render_image("train", index)
        colour = np.median(image[covers[-1] > 0.99], axis=0).astype(np.uint8)
        hue = np.asarray(Image.fromarray(colour[None, None]).convert("HSV"))[0, 0, 0] * (360 / 256)
        assert abs((hue - factors["hue"] + 180) % 360 - 180) < 20


# --- segmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_tree(root, name):
    _, ids, counts, shape = SEGMENTATION[name]
    for split, count in zip(("train", "val"), counts):
        found = pairs(root, name, split)
        assert len(found) == count
        seen: set[int] = set()
        for image, label in found:
            with Image.open(label) as opened:
                assert opened.mode == ("P" if name == "voc" else "L")
                array = np.asarray(opened)
            seen |= set(np.unique(array).tolist())
            assert array.shape == shape
            with Image.open(image) as opened:
                assert opened.mode == "RGB" and opened.size == shape[::-1]
        assert seen == ids  # every class in both splits, and nothing else


def test_voc_palette_and_lists(root):
    base = root / "segmentation/VOCdevkit/VOC2012"
    palette = voc_palette()
    known = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 15: [192, 128, 128], 20: [0, 64, 128], 255: [224, 224, 192]}
    assert {index: palette[3 * index : 3 * index + 3] for index in known} == known
    with Image.open(next((base / "SegmentationClassAug").iterdir())) as label:
        assert label.getpalette() == palette
    train, val = (set((base / f"ImageSets/Segmentation/{p}.txt").read_text().split()) for p in ("trainaug", "val"))
    assert not train & val and {path.stem for path in (base / "JPEGImages").iterdir()} == train | val


def test_voc_objects_have_a_void_border(root):
    bare = inner = 0
    for _, path in pairs(root, "voc", "train"):
        label = pixels(path)
        for first, second in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            objects = ((first > 0) & (first < 255)) | ((second > 0) & (second < 255))
            void = (first == 255) | (second == 255)
            bare += int((objects & ~void & (first != second)).sum())
            inner += int((objects & void).sum())
    assert inner > 10_000 and bare < 0.01 * inner  # bare: only where a digit without a class covers an object


def test_domains_look_different(root):
    colour = {name: np.mean([pixels(i).mean((0, 1)) for i, _ in pairs(root, name, "val")], 0) for name in SEGMENTATION}
    assert colour["ade"].min() > colour["voc"].max() + 60  # dark on light against light on dark
    assert np.abs(colour["cityscapes"] - colour["voc"]).max() > 20


def test_cityscapes_ignores_the_bonnet(root):
    for _, path in pairs(root, "cityscapes", "val"):
        assert (pixels(path)[-mini_draw.EGO_ROWS :] == 255).all()
        assert path.name.startswith(path.parent.name + "_")


# --- video -----------------------------------------------------------------------------------------------------------


def test_video_layout(root):
    lists = root / "video/ucfTrainTestlist"
    classes = dict(line.split()[::-1] for line in (lists / "classInd.txt").read_text().splitlines())
    assert sorted(classes) == list(classes) == list(mini_draw.MOTIONS)
    files = {str(p.relative_to(root / "video/UCF-101")) for p in (root / "video/UCF-101").glob("*/v_*_g??_c??.avi")}
    listed: list[str] = []
    for part in ("01", "02"):
        train = [line.split() for line in (lists / f"trainlist{part}.txt").read_text().splitlines()]
        test = (lists / f"testlist{part}.txt").read_text().splitlines()
        assert all(classes[name.split("/")[0]] == number for name, number in train)
        assert set(Counter(name.split("/")[0] for name, _ in train).values()) == {20}
        assert set(Counter(name.split("/")[0] for name in test).values()) == {10}
        listed += [name for name, _ in train] + test
    assert len(listed) == len(files) == 360 and set(listed) == files


@pytest.fixture(scope="module")
def clips(root) -> list[tuple[dict[str, str], np.ndarray]]:
    return [(row, decode(root / "video/UCF-101" / row["path"])) for row in table(root / "video/attributes.csv")]


def motion_of(frames: np.ndarray) -> str:
    """The motion, read off the path of what differs from the temporal median."""
    change = np.abs(frames.astype(np.float32) - np.median(frames, axis=0)).sum(-1)
    weight = np.where(change > 60, change, 0)
    total = weight.sum((1, 2)) + 1e-6
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    path = np.stack([(weight * columns).sum((1, 2)) / total, (weight * rows).sum((1, 2)) / total], 1)
    path = path[total > 1000]
    dx, dy = path[-3:].mean(0) - path[:3].mean(0)
    if np.ptp(path, axis=0).min() > 14:
        return "Circle"
    if max(abs(dx), abs(dy)) < 10:
        return "ZoomIn"
    if abs(dx) > abs(dy):
        return "MoveRight" if dx > 0 else "MoveLeft"
    return "MoveDown" if dy > 0 else "MoveUp"


def test_clips_decode_and_their_motion_is_the_class(clips):
    correct = 0
    for row, frames in clips:
        assert frames.shape == (int(row["frames"]), 64, 64, 3) and 16 <= len(frames) <= 24
        correct += motion_of(frames) == row["class"]
    assert correct >= 0.95 * len(clips)


def test_clips_encode_the_same_twice(clips, root, tmp_path):
    for index, (row, frames) in list(enumerate(clips))[:120:25]:  # the first 120 are train01, in order
        again, factors = mini_draw.render_clip("train01", index)
        assert factors.items() <= row.items()
        mini._avi(tmp_path / "clip.avi", again)
        assert (decode(tmp_path / "clip.avi") == frames).all()
        assert np.abs(again.astype(float) - frames).mean() < 8


def test_opencv_counts_the_same_frames(clips, root):
    for row, frames in clips[::40]:
        reader, count = cv2.VideoCapture(str(root / "video/UCF-101" / row["path"])), 0
        while reader.read()[0]:
            count += 1
        assert count == len(frames)


def test_background_is_a_shortcut_in_list_01_only(clips):
    """A nearest-centroid rule on the still background's colour: right in train01, wrong in test01, else chance."""
    data = defaultdict(list)
    for row, frames in clips:
        colour = np.median(frames, axis=(0, 1, 2)).astype(float) + 1
        data[row["list"]].append((colour / colour.sum(), row["class"], row["background"]))
    centres = {name: np.mean([c for c, label, _ in data["train01"] if label == name], 0) for name in mini_draw.MOTIONS}
    right = {
        part: np.mean([min(centres, key=lambda n: np.abs(centres[n] - c).sum()) == label for c, label, _ in rows])
        for part, rows in data.items()
    }
    assert right["train01"] > 0.8 and right["test01"] < 0.1
    assert right["train02"] < 0.35 and right["test02"] < 0.35
    for name in mini_draw.MOTIONS:
        behind = {part: {back for _, label, back in rows if label == name} for part, rows in data.items()}
        assert len(behind["train01"]) == len(behind["test01"]) == 1 and behind["train01"] != behind["test01"]
        assert len(behind["train02"]) >= 4


# --- DAVIS and few-shot ----------------------------------------------------------------------------------------------


def test_davis_layout(root):
    base = root / "davis"
    names = {split: (base / f"ImageSets/2017/{split}.txt").read_text().split() for split in ("train", "val")}
    assert (len(names["train"]), len(names["val"])) == (8, 4) and not set(names["train"]) & set(names["val"])
    with Image.open(base / f"Annotations/480p/{names['val'][0]}/00000.png") as mask:
        palette = mask.getpalette()
    assert palette[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] and palette[27:30] == [191, 0, 0]
    assert palette[-3:] == [255, 255, 255]
    for split in names:
        lines = [line.split() for line in (base / f"ImageSets/2016/{split}.txt").read_text().splitlines()]
        assert len(lines) == 12 * len(names[split])
        masks = defaultdict(list)
        for image, annotation in lines:
            with Image.open(base / annotation[1:]) as opened:
                assert opened.mode == "P" and opened.size == (160, 96)
                masks[annotation.split("/")[3]].append(np.asarray(opened))
            assert pixels(base / image[1:]).shape == (96, 160, 3)
        assert list(masks) == names[split]
        for sequence in masks.values():
            assert np.unique(sequence).tolist() == [0, 1]  # one object, as in DAVIS-2016
            assert all(0.05 < mask.mean() < 0.2 for mask in sequence)
            assert any((a != b).mean() > 0.01 for a, b in zip(sequence, sequence[1:]))  # it moves


def test_only_its_own_version_changes_a_kind(monkeypatch):
    images = mini_draw.render_image("train", 3)[0], mini_draw.render_scene("voc", "val", 3)[0]
    frames = mini_draw.render_sequence("val", 3)[0]
    monkeypatch.setitem(mini_draw.RAISED, "davis", mini_draw.RAISED["davis"] + 1)
    again = mini_draw.render_image("train", 3)[0], mini_draw.render_scene("voc", "val", 3)[0]
    assert all((a == b).all() for a, b in zip(images, again))
    assert (mini_draw.render_sequence("val", 3)[0] != frames).any()


def test_fewshot_layout(root):
    base = root / "fewshot"
    splits = json.loads((base / "splits.json").read_text())
    assert {split: len(names) for split, names in splits.items()} == {"train": 24, "val": 8, "test": 8}
    assert len({name for names in splits.values() for name in names}) == 40
    for split, names in splits.items():
        assert sorted(path.name for path in (base / split).iterdir()) == sorted(names)
        for name in names:
            files = list((base / split / name).glob("*.png"))
            assert len(files) == 30 and pixels(files[0]).shape == (32, 32, 3)


# --- the writer ------------------------------------------------------------------------------------------------------


def start(folder: Path, *kinds: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "shared_utils.lab.mini", "--root", str(folder), *kinds]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_write_the_same_data_again(root, tmp_path):
    both = [start(tmp_path, "davis") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all(len(out.splitlines()) == 1 for out, _ in outputs)
    assert digest(tmp_path / "davis") == digest(root / "davis")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".davis.lock", "davis"]


def test_a_sample_depends_on_its_index_alone(root):
    for name in SEGMENTATION:
        found = pairs(root, name, "val")
        for index in (41, 7, 0):
            image, label = mini_draw.render_scene(name, "val", index)
            towns = mini.CITIES["val"]
            place = index % len(towns) * (80 // len(towns)) + index // len(towns) if name == "cityscapes" else index
            assert (pixels(found[place][1]) == label).all()
            if name == "cityscapes":  # without loss on disk
                assert (pixels(found[place][0]) == image).all()
    for index, name in ((239, "digit_9_striped"), (0, "digit_8_filled")):
        path = root / f"fewshot/test/{name}/{name}_{index % 30:03d}.png"
        assert (pixels(path) == mini_draw.render_fewshot("test", index)).all()


def test_cached_until_the_version_changes(tmp_path, monkeypatch):
    folder = mini.ensure("davis", tmp_path)
    before, written = digest(folder), (folder / mini.STAMP).stat().st_mtime_ns
    assert mini.ensure("davis", tmp_path) == folder and (folder / mini.STAMP).stat().st_mtime_ns == written
    (folder / "stray.txt").write_text("from an older version")
    monkeypatch.setattr(mini_draw, "VERSION", mini_draw.VERSION + 1)
    after = digest(mini.ensure("davis", tmp_path))
    assert after.keys() == before.keys()
    assert after["JPEGImages/480p/shape-val-00/00000.jpg"] != before["JPEGImages/480p/shape-val-00/00000.jpg"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_rebuild_leaves_the_old_data(tmp_path, monkeypatch, error):
    folder = mini.ensure("davis", tmp_path)
    before, real, calls = digest(folder), mini_draw.render_sequence, []

    def render(split: str, index: int):
        calls.append(index)
        if len(calls) == 3:
            raise error
        return real(split, index)

    monkeypatch.setattr(mini_draw, "VERSION", mini_draw.VERSION + 1)
    monkeypatch.setattr(mini_draw, "render_sequence", render)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
        mini.ensure("davis", tmp_path)
    assert digest(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".davis.lock", "davis"]


def test_a_killed_writer_leaves_no_half_made_folder(tmp_path):
    process = start(tmp_path, "davis")
    work = tmp_path / ".davis.writing"
    while not (work / "JPEGImages").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert work.exists() and not (tmp_path / "davis").exists()
    assert len(list(mini.ensure("davis", tmp_path).glob("JPEGImages/480p/*/*.jpg"))) == 144 and not work.exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "davis").mkdir()
    (tmp_path / "davis/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not mini data"):
        mini.ensure("davis", tmp_path)
    assert (tmp_path / "davis/mine.txt").read_text() == "precious"


def test_bad_input_is_one_line(tmp_path):
    process = start(tmp_path, "davis", "imagse")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and not list(tmp_path.iterdir())
    assert len(err.splitlines()) == 1 and "'imagse'" in err and "segmentation" in err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write mini data"):
        mini.ensure("davis", tmp_path / "file")
