"""uvos_dino's data, scores and evaluation scripts."""

import csv
import json
import math
import os
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from shared_utils import UserError, checkpoint
from shared_utils.pictures import davis_palette
from uvos_dino import data, eval_oneshot, evaluate, metrics, visualize
from uvos_dino.inference import load_model
from uvos_dino.lab import grid, kmeans
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.vision_transformer import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of five frames 32 x 48 with two moving squares, as DAVIS-2016 (white) and 2017 (palette)."""
    root, rng = tmp_path_factory.mktemp("davis"), np.random.default_rng(0)
    for name in ("aa", "bb"):
        for t in range(5):
            mask = np.zeros((32, 48), np.uint8)
            mask[4:14, 4 + 2 * t : 14 + 2 * t], mask[16:30, 30:42], mask[:2, :9] = 1, 2, 255
            rgb = rng.integers(0, 60, (32, 48, 3)) + np.array([[20, 20, 20], [190, 0, 0], [0, 190, 0]])[mask % 253 % 3]
            for kind, image in (
                ("JPEGImages", Image.fromarray(rgb.astype(np.uint8))),
                ("Annotations_unsupervised", Image.fromarray(mask)),
                ("Annotations", Image.fromarray((mask == 1).astype(np.uint8) * 255)),
            ):
                file = root / kind / "480p" / name / f"{t:05d}.{'jpg' if kind == 'JPEGImages' else 'png'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                if kind == "Annotations_unsupervised":
                    image.putpalette(davis_palette())
                image.save(file)
    for year, lines in (
        ("2016", "/JPEGImages/480p/aa/00000.jpg /Annotations/480p/aa/00000.png\n"),
        ("2017", "aa\nbb\n"),
    ):
        (root / "ImageSets" / year).mkdir(parents=True)
        (root / "ImageSets" / year / "val.txt").write_text(lines)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    model = AttEncoder(VisionTransformer(8, 64, 1, 32), num_heads=4)
    checkpoint.save(file, {"iteration": 7, "model_state_dict": model.state_dict(), "args": {"num_heads": 4}})
    return file


# --- data ------------------------------------------------------------------------------------------------------------


def test_layouts(davis: Path) -> None:
    one = data.open_videos("DAVIS", davis, "val")
    assert [v.name for v in one] == ["aa"] and list(one[0].masks) == [0, 1, 2, 3, 4]
    two = data.open_videos("DAVIS2017", davis, "val", ["bb"])
    assert "Annotations_unsupervised" in str(two[0].masks[0])
    assert set(np.unique(data.read_mask(two[0].masks[0], False))) == {0, 1, 2, 255}
    assert set(np.unique(data.read_mask(one[0].masks[0], True))) == {0, 1}
    assert len(data.training_videos(davis)) == 2


@pytest.mark.parametrize(
    ("dataset", "frames", "masks", "first"),
    [
        ("FBMS", "FBMS/x/marple_{:03d}.jpg", "FBMS_annotation/x/marple_{:03d}.png", 40),
        ("STv2", "STv2_img/JPEGImages/x/a{:03d}.png", "STv2_gt&pred/STv2_gt/GroundTruth/x/b{:03d}.png", 1),
        ("YTVIS", "val/JPEGImages/x/{:05d}.jpg", "val/Annotations/x/{:05d}.png", 0),
        ("MOVi", "val/x/rgba_{:05d}.png", "val/x/segmentation_{:05d}.png", 0),
    ],
)
def test_other_layouts(dataset: str, frames: str, masks: str, first: int, tmp_path: Path) -> None:
    for t in range(4):
        for name in [frames] + [masks] * (t % 2 == 0):  # every second frame is annotated
            file = tmp_path / name.format(first + t)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), t, np.uint8)).save(file)
    split = "all" if dataset == "FBMS" else "val"  # FBMS has no folder of its splits
    (video,) = data.open_videos(dataset, tmp_path, split)
    assert len(video.frames) == 4 and list(video.masks) == [0, 2]
    assert video.masks[2].name.endswith(f"{first + 2}.png")
    video.masks[2].rename(video.masks[2].with_name(os.fsdecode(b"\xff\xe9.png")))
    with pytest.raises(UserError, match="\udcff\udce9.png: an annotation of no frame"):  # not one annotation less
        data.open_videos(dataset, tmp_path, split)


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: shutil.rmtree(root / "JPEGImages" / "480p" / "bb"), "bb: no frames; expected 00000.jpg"),
        (lambda root: shutil.rmtree(root / "Annotations_unsupervised" / "480p" / "bb"), "bb: no annotation"),
        (lambda root: remove(root / "ImageSets", root / "JPEGImages"), "no DAVIS2017 here"),
    ],
)
def test_a_broken_tree_is_named(davis: Path, tmp_path: Path, change, said: str) -> None:
    root = shutil.copytree(davis, tmp_path / "davis")
    change(root)
    with pytest.raises(UserError, match=said):
        data.open_videos("DAVIS2017", root, "val")


def picture(file: Path, pixels: np.ndarray, **how) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **how)
    return file


def sequence(root: Path, name: str, count: int = 2) -> None:
    """Frames and white annotations of DAVIS' layout."""
    for t in range(count):
        picture(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", np.full((16, 16, 3), t, np.uint8))
        picture(root / f"Annotations/480p/{name}/{t:05d}.png", np.eye(16, dtype=np.uint8) * 255)


PAIRS = "/JPEGImages/480p/{0}/00000.jpg /Annotations/480p/{0}/00000.png\n"


@pytest.mark.parametrize(
    ("dataset", "list_file", "line"),
    [
        ("DAVIS", "ImageSets/480p/val.txt", PAIRS),  # as the archive of 2016 has it
        ("DAVIS", "ImageSets/1080p/val.txt", PAIRS.replace("480p", "1080p")),
        ("DAVIS", "ImageSets/2016/val.txt", "{0}\n"),
        ("DAVIS", "ImageSets/480p/val.txt", "\ufeff" + PAIRS.replace("/", "\\").replace("\n", " \r\n")),
        ("DAVIS2017", "ImageSets/2017/val.txt", "{0}  \n\n"),
        ("DAVIS2017", "ImageSets/2019/val.txt", "{0}/\n"),
        ("FBMS", "ImageSets/val.txt", "{0}\n"),
    ],
)
def test_the_publishers_list_is_read(dataset: str, list_file: str, line: str, tmp_path: Path) -> None:
    for name in ("a train", "b val", "c-val"):
        sequence(tmp_path, name.replace(" ", "_") if "/" in line or "\\" in line else name)
    if dataset == "FBMS":
        (tmp_path / "JPEGImages/480p").rename(tmp_path / "FBMS")
        (tmp_path / "Annotations/480p").rename(tmp_path / "FBMS_annotation")
    names = ["b_val" if "/" in line or "\\" in line else "b val", "c-val"]
    file = tmp_path / list_file
    file.parent.mkdir(parents=True)
    file.write_text("".join(line.format(name) for name in names), encoding="utf-8")
    found = data.open_videos(dataset, tmp_path, "val")
    assert [video.name for video in found] == names
    said = data.said(dataset, tmp_path, "val", found)
    assert "2 of 2 sequences" in said and str(file) in said and "4 annotated frames of 4" in said
    with pytest.raises(UserError, match="--split vall: .*; choose from val, or give all: every sequence"):
        data.open_videos(dataset, tmp_path, "vall")
    assert len(data.open_videos(dataset, tmp_path, "all")) == 3
    file.unlink()
    with pytest.raises(
        UserError, match=r"--split val: .* expected .*val.txt, from the publisher's archive, or give all"
    ):
        data.open_videos(dataset, tmp_path, "val")


def test_a_split_that_is_a_folder_needs_no_list(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "JPEGImages/x/00000.jpg", np.zeros((8, 8), np.uint8))
        picture(tmp_path / split / "Annotations/x/00000.png", np.ones((8, 8), np.uint8))
    (video,) = found = data.open_videos("YTVIS", tmp_path, "val")
    assert "val" in video.frames[0].parts and "every folder of" in data.said("YTVIS", tmp_path, "val", found)
    with pytest.raises(UserError, match="no YTVIS here; expected .*vall/JPEGImages"):
        data.open_videos("YTVIS", tmp_path, "vall")


@pytest.mark.parametrize("name", ["{}.jpg", "frame{}.jpg", "img_{}_left.jpg", "{:03d}.JPG", "v2-10.{}.jpeg"])
def test_frames_are_in_the_order_of_their_numbers(name: str, tmp_path: Path) -> None:
    for t in range(1, 13):
        picture(tmp_path / "x" / name.format(t), np.full((8, 8, 3), 20 * t, np.uint8), format="JPEG")
    (frames,) = data.training_videos(tmp_path)
    assert [path.name for path in frames] == [name.format(t) for t in range(1, 13)]
    clip = data.read_video(frames, (8, 8))
    assert (clip[:, 0, 0, 0].diff() > 0).all()


def test_numbers_of_several_frames_place_nothing(tmp_path: Path) -> None:
    frames = [Path(f"cam{c}_{t}.jpg") for c in (1, 2) for t in range(3)]
    found, others = data.by_frame([Path("1.png"), Path("cam2_1.png")], frames)
    assert found == {4: Path("cam2_1.png")} and others == [Path("1.png")]
    # The frame's own name in a file's name counts more than its last number.
    frames = [Path(f"{t:05d}.jpg") for t in range(3)]
    files = [Path(name) for name in ("00000_object_2.png", "mask2.png", "00001-v0.png")]
    assert data.by_frame(files, frames) == ({0: files[0], 2: files[1], 1: files[2]}, [])


def test_clips() -> None:
    rng = random.Random(0)
    found = {tuple(data.clip_indices(20, 3, 4, rng)) for _ in range(300)}
    assert found == {(c - 4, c, c + 4) for c in range(4, 16)}
    assert {tuple(data.clip_indices(4, 3, 4, rng)) for _ in range(50)} == {(0, 1, 2), (1, 2, 3)}
    assert data.clip_indices(1, 3, 4) == [0, 0, 0] and set(data.clip_indices(2, 3, 4)) <= {0, 1}


def test_augmentation_is_the_same_for_all_frames() -> None:
    augment = data.ClipAugment((16, 24), 0)
    frame = torch.rand(3, 16, 24)
    random.seed(1), torch.manual_seed(1)
    out = [augment(frame.expand(3, 3, 16, 24)) for _ in range(8)]
    assert all(torch.allclose(x, x[:1].expand_as(x), atol=1e-6) for x in out)
    plain = data.normalise(frame, "imagenet")
    assert any(not torch.allclose(x[0], plain, atol=1e-3) for x in out)
    assert torch.equal(data.ClipAugment((16, 24), 0, on=False)(frame[None])[0], plain)
    assert 0.1 <= augment.sigma <= 2 and augment.sigma == data.ClipAugment((16, 24), 0).sigma


def test_frames_are_resized_as_floats(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (21, 35, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    exact = cv2.resize(rgb / 255.0, (24, 16), interpolation=cv2.INTER_LINEAR)  # the release's float64
    ours = data.read_frame(tmp_path / "a.png", (16, 24)).permute(1, 2, 0)
    assert torch.allclose(ours.double(), torch.from_numpy(exact), atol=1e-6)
    for patch, shape in ((8, (3, 16, 32)), (14, (3, 14, 28)), (16, (3, 16, 32)), (7, (3, 21, 35))):
        assert data.read_frame(tmp_path / "a.png", (-1, -1), patch).shape == shape
    with pytest.raises(UserError, match="a.png: 21 x 35 pixels are less than a patch of 32"):
        data.read_frame(tmp_path / "a.png", (-1, -1), 32)


# --- scores ----------------------------------------------------------------------------------------------------------


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    H, W = mask.shape
    out = np.zeros((H, W), bool)
    for y in range(H):
        for x in range(W):
            near = {mask[min(y + dy, H - 1), min(x + dx, W - 1)] for dy in (0, 1) for dx in (0, 1)}
            out[y, x] = len(near) > 1
    return out


def slow_f(own: np.ndarray, gt: np.ndarray) -> float:
    """F by distances between all pairs of boundary pixels."""
    a, b = np.argwhere(slow_boundary(own)), np.argwhere(slow_boundary(gt))
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    radius = math.ceil(0.008 * math.hypot(*own.shape))
    close = ((a[:, None] - b[None]) ** 2).sum(-1) <= radius**2
    p, r = close.any(1).mean(), close.any(0).mean()
    return 0.0 if p + r == 0 else 2 * p * r / (p + r)


@pytest.mark.parametrize("seed", range(4))
def test_scores_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = metrics.upsample(rng.integers(-1, 4, (4, 5)), 23, 31)
    truth = metrics.upsample(rng.integers(0, 4, (3, 4)), 23, 31).astype(np.uint8)
    truth[5:7, :20] = 255
    J, F = metrics.frame_scores(labels, truth, 5, 2)  # the third object and the fifth cluster: nothing
    valid = truth != 255
    for k in range(5):
        for o in range(2):
            a, b = (labels == k) & valid, (truth == o + 1) & valid
            assert J[k, o] == pytest.approx((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            assert F[k, o] == pytest.approx(slow_f(a, b))


def test_matching_by_frame_and_by_sequence() -> None:
    truth = np.zeros((6, 20, 24), np.uint8)
    truth[:, 2:9, 2:9], truth[:, 11:18, 12:22] = 1, 2
    swapped = truth.copy()
    swapped[3:] = np.array([0, 2, 1])[truth[3:]]
    scores = metrics.video_scores(list(swapped.astype(int)), list(truth), 3, 2)
    by_frame, by_sequence = (metrics.matched(scores, match) for match in ("frame", "sequence"))
    assert by_frame.J.min() == by_frame.F.min() == 1
    assert (by_sequence.J.mean() + by_sequence.F.mean()) / 2 < 0.7
    permuted = metrics.matched(metrics.video_scores(list(np.array([2, 0, 1])[truth]), list(truth), 3, 2), "sequence")
    assert permuted.J.min() == permuted.F.min() == 1
    for seed in range(10):
        rng = np.random.default_rng(seed)
        some = metrics.Scores(rng.random((4, 3, 5)), rng.random((4, 3, 5)))
        total = {m: sum(x.sum() for x in metrics.matched(some, m)) for m in ("frame", "sequence")}
        assert total["frame"] >= total["sequence"] - 1e-12


def test_void_does_not_count_and_too_few_clusters_are_padded() -> None:
    truth = np.zeros((16, 20), np.uint8)
    truth[4:10, 4:10], truth[10:14, 4:10] = 1, 255
    exact, more = (truth == 1).astype(int) - 1, ((truth == 1) | (truth == 255)).astype(int) - 1
    for labels in (exact, more):
        J, F = metrics.frame_scores(labels, truth, 1, 1)
        assert J[0, 0] == F[0, 0] == 1
    scores = metrics.video_scores([exact], [np.where(truth == 255, 2, truth)], 1, 2)
    assert scores.J.shape == (2, 2, 1) and metrics.matched(scores, "frame").J[:, 0].tolist() == [1, 0]
    metrics.check_proposals("dog", 300, 300)
    metrics.check_proposals("dog", 999, 0)
    with pytest.raises(UserError, match="dog: 301 clusters, the evaluation takes 300"):
        metrics.check_proposals("dog", 301, 300)


def test_nearest_is_pytorchs_and_statistics_are_the_official_ones() -> None:
    labels = torch.arange(35).view(1, 1, 5, 7)
    for size in ((13, 30), (11, 7), (40, 61)):
        exact = torch.nn.functional.interpolate(labels.float(), size).long()[0, 0].numpy()
        assert (metrics.upsample(labels[0, 0].numpy(), *size) == exact).all()
    mean, recall, decay = metrics.statistics(np.linspace(1, 0, 9))
    assert (mean, recall, decay) == (pytest.approx(0.5), pytest.approx(4 / 9), pytest.approx(0.75))


def test_foreground_scores() -> None:
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 4, (3, 9, 9)).astype(np.uint8), rng.integers(0, 5, (3, 9, 9))
    truth[0, 0] = 255
    inside = (truth > 0) & (truth < 255)
    expected = adjusted_rand_score(truth[inside], labels[inside])
    assert metrics.rand_index(labels, truth) == pytest.approx(expected)
    assert metrics.rand_index(truth.astype(int), truth) == 1 and metrics.mean_iou(truth.astype(int), truth, 4) == 1
    assert 0 < metrics.mean_iou(labels, truth, 5) < 0.4
    assert math.isnan(metrics.rand_index(labels, 0 * truth)) and math.isnan(metrics.mean_iou(labels, 0 * truth, 5))


# --- scripts ---------------------------------------------------------------------------------------------------------


def flags(davis: Path, weights: Path, out: Path, *more: str) -> list[str]:
    words = f"--resume_path {weights} --basepath {davis} --resolution 32 48 --ratio 3 --tau 1e-4 --save_path {out}"
    return [*words.split(), "--threads", "1", *more]


def test_segmentation_is_written_and_scored(davis: Path, weights: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "own"
    assert eval_oneshot.main(flags(davis, weights, out, "--foreground")) == 0
    saved = checkpoint.load(out / "aa.pth")
    assert saved["labels"].shape == (4, 4, 6) and saved["clusters"] > 1  # the last frame is left out
    pngs = sorted((out / "bb").glob("*.png"))
    assert len(pngs) == 5
    last, before = (Image.open(path) for path in pngs[:2:-1])
    assert last.mode == "P" and last.getpalette()[:9] == davis_palette()[:9]
    assert (np.asarray(last) == np.asarray(before)).all() and np.asarray(last).min() >= 1
    result = json.loads((out / "result.json").read_text())
    rows = list(csv.reader((out / "sequence" / "per-sequence_results-val.csv").open()))
    assert rows[0] == ["Sequence", "J-Mean", "F-Mean"] and [r[0] for r in rows[1:]] == ["aa_1", "aa_2", "bb_1", "bb_2"]
    head = list(csv.reader((out / "frame" / "global_results-val.csv").open()))
    assert head[0] == list(evaluate.COLUMNS) and float(head[1][0]) == pytest.approx(
        result["frame"]["J&F-Mean"] / 100, abs=1e-3
    )
    assert result["FG-ARI"] <= 100 and result["clusters"] > 1 and "git_commit" in result

    # PNGs alone, and the release's one-hot files, score the same.
    assert evaluate.main(["--results", str(out), "--basepath", str(davis)]) == 0
    for name in ("aa", "bb"):
        (out / f"{name}.pth").unlink()
    assert evaluate.main(["--results", str(out), "--basepath", str(davis), "--match", "sequence"]) == 0
    again = json.loads((out / "result.json").read_text())
    assert again["frame"] == pytest.approx(result["frame"]) and again["sequence"] == pytest.approx(result["sequence"])
    other = tmp_path / "release"
    assert eval_oneshot.main(flags(davis, weights, other, "--release_masks", "--png", "false")) == 0
    masks = checkpoint.load(other / "aa.pth")
    assert list(masks) == [0, 1, 2, 3] and masks[0][0].shape == (1, saved["clusters"], 1, 4, 6)
    assert json.loads((other / "result.json").read_text())["frame"] == pytest.approx(result["frame"])
    assert "matched by frame" in capsys.readouterr().out


def test_all_frames_and_memory_and_own_size(davis: Path, weights: Path, tmp_path: Path) -> None:
    for name, more in (("kept", ()), ("again", ("--memory_gb", "0")), ("own", ("--resolution", "-1", "-1"))):
        argv = flags(davis, weights, tmp_path / name, "--drop_last_frame", "false", *more)
        assert eval_oneshot.main(argv) == 0
    kept, again, own = (checkpoint.load(tmp_path / name / "bb.pth")["labels"] for name in ("kept", "again", "own"))
    assert kept.shape == (5, 4, 6) and torch.equal(kept, again) and torch.equal(kept, own)
    argv = flags(davis, weights, tmp_path / "norm", "--drop_last_frame", "false", "--eval_norm", "imagenet")
    assert eval_oneshot.main(argv) == 0
    assert not torch.equal(checkpoint.load(tmp_path / "norm" / "bb.pth")["labels"], kept)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resolution", "30", "48"], "multiples of the encoder's patch"),
        (["--ratio", "0"], "--ratio 0: must be at least 1"),
        (["--num_heads", "7"], "--num_heads 7: does not divide the 64 channels"),
        (["--num_heads", "-4"], "--num_heads -4: must be at least 1"),
        (["--sequences", "zz"], "--sequences zz: not in DAVIS2017"),
        (["--max_proposals", "1"], "clusters, the evaluation takes 1"),
        (["--device", "nosuch"], "--device nosuch: not available"),
        (["--resume_path", "nosuch.pth"], "nosuch.pth: no such checkpoint"),
        (["--basepath", "nosuch"], "nosuch: no DAVIS2017 here"),
    ],
)
def test_bad_input_is_one_line(davis: Path, weights: Path, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        eval_oneshot.main(flags(davis, weights, tmp_path / "out", *more))


def test_an_annotation_without_its_frame_is_named(davis: Path, tmp_path: Path) -> None:
    shutil.copytree(davis, tmp_path / "davis")
    frame = min((tmp_path / "davis/JPEGImages/480p").glob("*/*.jpg"))
    name = frame.parent.name
    frame.unlink()
    mask = f"{name}/{frame.stem}.png"
    with pytest.raises(UserError, match=f"{mask}: an annotation of no frame in .*{name} .*; restore the frame"):
        data.open_videos("DAVIS2017", tmp_path / "davis", "val", [name])


def test_checkpoints_of_others(weights: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(weights)
    model, said, minutes = load_model(weights)
    assert "iteration 7" in said and "4 heads" in said and minutes is None and not model.training
    released = {k: saved[k] for k in ("iteration", "model_state_dict")} | {
        "optimizer_state_dict": {},
        "loss": torch.ones(()),
    }
    checkpoint.save(tmp_path / "released.pth", released)
    assert "8 heads" in load_model(tmp_path / "released.pth")[1]
    del released["model_state_dict"]["temporal_transformer.0.attn.proj.bias"]
    checkpoint.save(tmp_path / "short.pth", released)
    with pytest.raises(UserError, match=r"1 missing \(temporal_transformer.0.attn.proj.bias\)"):
        load_model(tmp_path / "short.pth")
    checkpoint.save(tmp_path / "other.pth", {"state_dict": {}})
    with pytest.raises(UserError, match="holds no model_state_dict"):
        load_model(tmp_path / "other.pth")


def test_results_that_are_not_there(davis: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing for aa; expected aa.pth or aa/00000.png"):
        evaluate.main(["--results", str(tmp_path), "--basepath", str(davis)])
    checkpoint.save(tmp_path / "aa.pth", {"x": torch.ones(1)})
    with pytest.raises(UserError, match="neither labels of uvos_dino.eval_oneshot nor the release's masks"):
        evaluate.main(["--results", str(tmp_path), "--basepath", str(davis)])


def test_masks_are_placed_by_the_names_of_their_frames(davis: Path, tmp_path: Path) -> None:
    """The annotation as its own result: a file more or less is named, and no other file moves to its place."""

    def scored(name: str, *more: str) -> dict:
        argv = ["--results", str(tmp_path / name), "--basepath", str(davis), "--sequences", "bb", *more]
        assert evaluate.main(argv) == 0
        return json.loads((tmp_path / name / "result.json").read_text())

    def results(name: str, *without: str) -> Path:
        folder = tmp_path / name / "bb"
        shutil.copytree(davis / "Annotations_unsupervised" / "480p" / "bb", folder)
        for frame in without:
            (folder / f"{frame}.png").unlink()
        return folder

    results("whole")
    assert scored("whole")["frame"]["J-Mean"] == 100
    folder = results("others")  # a Mac's helper files, pictures beside the masks, a capital suffix
    for name in ("._00000.png", "00000_overlay.jpg"):
        (folder / name).write_bytes(b"x")
    (folder / "00001.png").rename(folder / "00001.PNG")
    assert scored("others")["frame"]["J-Mean"] == 100
    results("last", "00004")  # as the release leaves it: the mask before it stands for it
    assert 90 < scored("last")["frame"]["J-Mean"] < 100
    results("ends", "00000", "00004")
    assert scored("ends", "--skip_ends")["frame"]["J-Mean"] == 100
    with pytest.raises(
        UserError, match="bb: no mask of frame 00000; expected one for each annotated frame but the last"
    ):
        scored("ends")
    results("gaps", "00001", "00003", "00004")
    with pytest.raises(UserError, match="bb: no mask of frame 00001, 00003, 00004;"):
        scored("gaps")
    shutil.copy(results("more") / "00004.png", tmp_path / "more" / "bb" / "00077.png")
    with pytest.raises(UserError, match="bb: masks of no frame: 00077.png; expected the names of .*bb: 00000.png"):
        scored("more")
    folder = results("numbers")
    for number in range(5):  # other names, the numbers of the frames
        (folder / f"{number:05d}.png").rename(folder / f"mask{number}.png")
    assert scored("numbers")["frame"]["J-Mean"] == 100
    labels = torch.zeros(6, 4, 6, dtype=torch.int32)
    (tmp_path / "long").mkdir()
    checkpoint.save(tmp_path / "long" / "bb.pth", {"labels": labels, "clusters": 1})
    with pytest.raises(UserError, match="bb: masks of 6 frames, where there are 5"):
        scored("long")


def test_annotations_in_colours_are_refused_and_black_and_white_ones_read(tmp_path: Path) -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:5] = 255
    exact = (mask > 0).astype(np.uint8)
    for mode in ("L", "RGB", "RGBA", "1"):
        Image.fromarray(mask).convert(mode).save(tmp_path / "mask.png")
        assert (data.read_mask(tmp_path / "mask.png", True) == exact).all(), mode
    grey = np.array([0, 1, 2, 255], np.uint8).repeat(80).reshape(40, 8)
    palette = Image.fromarray(grey)
    palette.putpalette(davis_palette())
    palette.save(tmp_path / "mask.png")
    assert (data.read_mask(tmp_path / "mask.png", False) == grey).all()
    colours = palette.convert("RGB")
    levels = Image.fromarray(grey).convert("RGB")  # equal channels, but not 0 and 255 alone
    for number, image in enumerate((colours, levels, Image.fromarray(grey.astype(np.uint16) * 300))):
        image.save(tmp_path / f"bad{number}.png")
        for binary in (True, False):
            with pytest.raises(UserError, match=rf"bad{number}.png: colours, .* palette or grey PNG \(mode P or L\)"):
                data.read_mask(tmp_path / f"bad{number}.png", binary)


def disc(size: int = 96, radius: float = 30) -> np.ndarray:
    """A filled circle [size, size], bool."""
    y, x = np.ogrid[:size, :size]
    return (x - size // 2) ** 2 + (y - size // 2) ** 2 <= radius**2


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_masks_with_in_between_values_are_cut_at_half(tmp_path: Path) -> None:
    exact = disc()
    white = exact.astype(np.uint8) * 255
    big = Image.fromarray(disc(384, 120).astype(np.uint8) * 255)
    soft = cv2.GaussianBlur(white, (0, 0), 3)
    files = {
        "jpeg": picture(tmp_path / "a.jpg", white, quality=60),
        "jpeg in colours": picture(tmp_path / "b.jpg", np.stack([white] * 3, -1), quality=60),
        "jpeg named png": picture(tmp_path / "c.png", white, format="JPEG"),
        "antialiased": picture(tmp_path / "d.png", np.asarray(big.resize((96, 96), Image.Resampling.LANCZOS))),
        "antialiased, RGBA": picture(tmp_path / "e.png", np.asarray(big.resize((96, 96)).convert("RGBA"))),
        "soft": picture(tmp_path / "f.png", soft),
        "with alpha": picture(tmp_path / "g.png", np.stack([soft, np.full_like(soft, 255)], -1)),
    }
    for name, file in files.items():
        mask = data.read_mask(file, True)
        assert set(np.unique(mask)) == {0, 1} and iou(mask == 1, exact) > 0.97, name
    resaved = picture(tmp_path / "h.png", np.asarray(Image.open(files["jpeg"])))
    assert iou(data.read_mask(resaved, True) == 1, exact) > 0.97
    for file in (files["jpeg"], files["soft"]):
        with pytest.raises(UserError, match="in-between grey values .* write it anew from the numbers"):
            data.read_mask(file, False)


def test_numbers_in_grey_levels_are_kept(tmp_path: Path) -> None:
    """2 and 4 bits, a palette's colours as grey levels, levels of a set with one object: numbers, not brightness."""
    numbers = np.zeros((48, 64), np.uint8)
    numbers[4:20, 4:20], numbers[24:44, 8:30], numbers[10:40, 40:60] = 1, 2, 3
    for depth in (1, 2, 4, 8):
        stored = numbers & (2**depth - 1) if depth > 1 else numbers.clip(max=1)
        file = tmp_path / f"{depth}.png"
        write_png(file, stored, depth)
        with Image.open(file) as image:
            assert image.mode == ("1" if depth == 1 else "L")
        assert (data.read_mask(file, False) == stored).all(), depth
        assert (data.read_mask(file, True) == (stored > 0)).all(), depth
    grey = np.array([0, 38, 75, 255], np.uint8)[numbers]
    file = picture(tmp_path / "grey.png", grey)
    assert (data.read_mask(file, False) == grey).all() and (data.read_mask(file, True) == (numbers > 0)).all()


def write_png(file: Path, pixels: np.ndarray, depth: int) -> None:
    """A grey PNG of 1, 2, 4 or 8 bits a pixel, which PIL reads and does not write."""
    bits = np.unpackbits(pixels[..., None], axis=-1)[..., 8 - depth :].reshape(len(pixels), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def benchmark(root: Path, dataset: str, truth: np.ndarray, name: str = "x") -> None:
    """A sequence [T, H, W] of numbers in the layout of `dataset`, all frames annotated."""
    frames, masks = {
        "DAVIS": ("JPEGImages/480p", "Annotations/480p"),
        "DAVIS2017": ("JPEGImages/480p", "Annotations_unsupervised/480p"),
        "YTVIS": ("val/JPEGImages", "val/Annotations"),
    }[dataset]
    for t, mask in enumerate(truth):
        picture(root / frames / name / f"{t:05d}.jpg", np.zeros((*mask.shape, 3), np.uint8))
        image = Image.fromarray(mask)
        if dataset != "DAVIS":
            image.putpalette(davis_palette())
        (root / masks / name).mkdir(parents=True, exist_ok=True)
        image.save(root / masks / name / f"{t:05d}.png")
    for year in ("2016", "2017"):
        (root / "ImageSets" / year).mkdir(parents=True, exist_ok=True)
        with (root / "ImageSets" / year / "val.txt").open("a") as handle:
            handle.write(f"{name}\n")


def predict(folder: Path, maps: np.ndarray, name: str = "x", ending: str = "png", **how) -> Path:
    for t, pixels in enumerate(maps):
        picture(folder / name / f"{t:05d}.{ending}", pixels, **how)
    return folder


def score(root: Path, dataset: str, results: Path, *more: str) -> dict:
    if dataset == "YTVIS":
        shutil.rmtree(root / "ImageSets", ignore_errors=True)
    assert evaluate.main(["--results", str(results), "--basepath", str(root), "--dataset", dataset, *more]) == 0
    return json.loads((results / "result.json").read_text())


def scene() -> np.ndarray:
    """Four frames 40 x 60, the objects 1 and 2."""
    truth = np.zeros((4, 40, 60), np.uint8)
    truth[:, 4:16, 4:20], truth[:, 20:36, 30:50] = 1, 2
    return truth


@pytest.mark.parametrize("numbers", [(1, 2), (1, 4), (38, 75), (3, 200)])
def test_objects_are_the_numbers_that_occur(numbers: tuple[int, int], tmp_path: Path) -> None:
    truth = np.array([0, *numbers], np.uint8)[scene()]
    benchmark(tmp_path, "DAVIS2017", truth)
    miss = np.zeros_like(truth)
    miss[:, -3:, :5] = 1
    missed = score(tmp_path, "DAVIS2017", predict(tmp_path / "miss", miss))
    assert missed["sequences"]["x"]["numbers"] == list(numbers)
    for match in evaluate.MATCHES:
        assert missed[match]["J&F-Mean"] == 0
    hit = score(tmp_path, "DAVIS2017", predict(tmp_path / "hit", scene()))
    assert hit["frame"]["J&F-Mean"] == hit["sequence"]["J&F-Mean"] == 100 and hit["clusters"] == 2
    rows = list(csv.reader((tmp_path / "hit/frame/per-sequence_results-val.csv").open()))
    assert [row[0] for row in rows[1:]] == [f"x_{number}" for number in numbers]
    own = score(tmp_path, "DAVIS2017", predict(tmp_path / "own", truth))  # grey levels 38 and 75: two clusters
    assert own["frame"]["J&F-Mean"] == 100 and own["clusters"] == 2


def test_objects_that_enter_late_count_as_in_the_set(tmp_path: Path) -> None:
    truth = scene()
    truth[:2][truth[:2] == 2] = 0  # the second object enters in the third frame
    seen = np.where(scene() == 2, 2, 0).astype(np.uint8)  # it is found, and also where it is not yet
    out = {}
    for dataset in ("DAVIS2017", "YTVIS"):
        benchmark(tmp_path / dataset, dataset, truth)
        out[dataset] = score(tmp_path / dataset, dataset, predict(tmp_path / dataset / "out", seen))
    assert out["DAVIS2017"]["sequences"]["x"]["numbers"] == [1]
    assert out["DAVIS2017"]["frame"]["J&F-Mean"] == 0
    assert out["YTVIS"]["sequences"]["x"]["numbers"] == [1, 2]
    rows = out["YTVIS"]["sequences"]["x"]["sequence"]
    assert [row[0] for row in rows] == [0, 1] and out["YTVIS"]["frame"]["J-Mean"] == 50
    # A set with one object: every annotated frame counts; right is nothing where it is not there.
    white = np.where(truth == 2, 255, 0).astype(np.uint8)
    benchmark(tmp_path / "DAVIS", "DAVIS", white)
    exact = score(tmp_path / "DAVIS", "DAVIS", predict(tmp_path / "DAVIS/exact", white))
    early = score(tmp_path / "DAVIS", "DAVIS", predict(tmp_path / "DAVIS/early", seen))
    assert exact["sequence"]["J-Mean"] == 100 and early["sequence"]["J-Mean"] == 50


def test_a_number_below_the_first_frames_largest_counts_when_it_enters(tmp_path: Path) -> None:
    """davis2017-evaluation counts 1..largest of the first annotation; one that never comes is not there."""
    truth = np.array([0, 1, 5], np.uint8)[scene()]
    truth[2:, 30:38, 4:14] = 3
    benchmark(tmp_path, "DAVIS2017", truth)
    found = score(tmp_path, "DAVIS2017", predict(tmp_path / "out", truth))
    assert found["sequences"]["x"]["numbers"] == [1, 3, 5] and found["frame"]["J&F-Mean"] == 100


def test_an_object_in_the_skipped_ends_alone_does_not_count(tmp_path: Path) -> None:
    truth = scene()
    truth[1:][truth[1:] == 2] = 0
    benchmark(tmp_path, "DAVIS2017", truth)
    results = predict(tmp_path / "out", np.zeros_like(truth))
    assert score(tmp_path, "DAVIS2017", results)["sequences"]["x"]["numbers"] == [1, 2]
    ends = score(tmp_path, "DAVIS2017", results, "--skip_ends")
    assert ends["sequences"]["x"]["numbers"] == [1] and ends["frame"]["J&F-Mean"] == 0


def test_an_empty_first_annotation_stops_only_what_needs_it(tmp_path: Path, capsys) -> None:
    truth = scene()
    truth[0] = 0
    benchmark(tmp_path, "DAVIS2017", truth)
    results = predict(tmp_path / "out", truth)
    with pytest.raises(UserError, match=r"00000.png: no object in the first annotated frame.*--foreground"):
        score(tmp_path, "DAVIS2017", results)
    alone = score(tmp_path, "DAVIS2017", results, "--foreground")
    assert alone["FG-ARI"] == alone["mIoU"] == 100 and alone["frame"] == {} and alone["sequences"]["x"]["objects"] == 0
    assert "not in J and F, no object in the first annotated frame: x" in capsys.readouterr().out
    benchmark(tmp_path, "DAVIS2017", scene(), "y")
    both = score(tmp_path, "DAVIS2017", predict(tmp_path / "out", scene(), "y"), "--foreground")
    assert both["frame"]["J&F-Mean"] == both["mIoU"] == 100
    benchmark(tmp_path / "late", "YTVIS", truth)
    late = score(tmp_path / "late", "YTVIS", predict(tmp_path / "late/out", truth))
    assert late["frame"]["J&F-Mean"] == 100


def test_soft_predictions_are_one_object(tmp_path: Path) -> None:
    truth = np.stack([disc().astype(np.uint8) * 255] * 3)
    benchmark(tmp_path, "DAVIS", truth)
    soft = np.stack([cv2.GaussianBlur(x, (0, 0), 4) for x in truth])
    hows: tuple[tuple[str, dict[str, Any]], ...] = (("soft", {}), ("jpeg", {"ending": "jpg", "quality": 70}))
    for name, how in hows:
        found = score(tmp_path, "DAVIS", predict(tmp_path / name, soft if name == "soft" else truth, **how))
        assert found["clusters"] == 1 and found["frame"]["J-Mean"] > 97, name
    many = metrics.upsample(np.arange(150, dtype=np.uint8).reshape(10, 15), 160, 240)  # clusters in grey, not a slope
    assert not data.brightness([many]) and data.brightness([soft[0]])


def test_a_white_mask_is_one_cluster(davis: Path, tmp_path: Path) -> None:
    """Masks of DAVIS-2016 as results: white is the first cluster, not the 255th after 254 empty ones."""
    shutil.copytree(davis / "Annotations" / "480p" / "aa", tmp_path / "aa")
    assert evaluate.main(["--results", str(tmp_path), "--basepath", str(davis), "--dataset", "DAVIS"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["clusters"] == 1 and result["frame"]["J&F-Mean"] == 100


def test_masks_of_the_released_checkpoint(tmp_path: Path) -> None:
    """Masks that the fork omid-reza/SSL-UVOS stores, against DAVIS-2016's annotation of 428 x 240 and of 854 x 480.

    UVOS_FORK: its DAVIS_Attn; DATA_ROOT/davis2016, or DAVIS in full size as DAVIS_ROOT.
    """
    fork, half, full = (os.environ.get(name, "") for name in ("UVOS_FORK", "DATA_ROOT", "DAVIS_ROOT"))
    roots = [(f"{half}/davis2016", 79.80, 73.63)] * bool(half) + [(full, 79.95, 72.14)] * bool(full)
    if not fork or not roots:
        pytest.skip("UVOS_FORK and DATA_ROOT or DAVIS_ROOT do not name the stored masks and DAVIS-2016")
    shutil.copy(Path(fork) / "car-shadow.pth", tmp_path)
    for root, J, F in roots:
        argv = ["--results", str(tmp_path), "--basepath", root, "--dataset", "DAVIS", "--sequences", "car-shadow"]
        assert evaluate.main(argv) == 0
        found = json.loads((tmp_path / "result.json").read_text())
        assert found["clusters"] == 10 and found["sequences"]["car-shadow"]["frames"] == 40
        for match in evaluate.MATCHES:
            assert found[match]["J-Mean"] == pytest.approx(J, abs=0.006)
            assert found[match]["F-Mean"] == pytest.approx(F, abs=0.006)


def test_pictures(davis: Path, weights: Path, tmp_path: Path) -> None:
    argv = f"--resume_path {weights} --basepath {davis} --resolution 32 48 --ratio 2 --out {tmp_path}/a.png".split()
    assert visualize.main([*argv, "--count", "3", "--point", "0.2", "0.2", "--gif", f"{tmp_path}/a.gif"]) == 0
    assert (
        Image.open(tmp_path / "a.png").size == (3 * 48, 4 * 32)
        and len(list(ImageSequence.Iterator(Image.open(tmp_path / "a.gif")))) == 5
    )
    with pytest.raises(UserError, match="--point 2.0 0.0"):
        visualize.main([*argv, "--point", "2", "0"])


# --- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "height", "width"), [(1, 30, 40), (5, 240, 428), (9, 240, 428), (10, 40, 400),
                                                        (37, 480, 854), (144, 854, 480)])  # fmt: skip
def test_cells_are_as_many_as_asked_and_alike(count: int, height: int, width: int) -> None:
    shown = metrics.upsample(grid.cells(count, height, width), height, width)
    sizes = np.bincount(shown.ravel(), minlength=count) / shown.size * count
    assert len(sizes) == count and 0.5 < sizes.min() and sizes.max() < 1.6
    for label in range(count):  # each is a rectangle, and none is a sliver
        y, x = np.nonzero(shown == label)
        tall, wide = np.ptp(y) + 1, np.ptp(x) + 1
        assert tall * wide == len(y) and 0.4 < tall / wide < 2.5


def test_controls_are_scored_with_as_many_clusters_as_asked(davis: Path, weights: Path, tmp_path: Path) -> None:
    """Cells and k-means by number and like an evaluation; the same again with the same seed."""
    base = f"--basepath {davis} --dataset DAVIS2017".split()
    encoder = checkpoint.load(weights)["model_state_dict"]
    checkpoint.save(tmp_path / "dino.pth", {k[8:]: v for k, v in encoder.items() if k.startswith("encoder.")})
    keys = f"--dino_path {tmp_path}/dino.pth --resolution 32 48 --threads 1".split()

    def result(folder: Path) -> dict:
        return json.loads((folder / "result.json").read_text())

    run = ["--run_dir", f"{tmp_path}/run/seed0", "--save_path", f"{tmp_path}/run/seed0-test"]
    assert kmeans.main([*keys, *base, "--clusters", "3", *run]) == 0
    found = result(tmp_path / "run/seed0-test")
    assert found["clusters"] == 3 and found["minutes"] >= 0 and (tmp_path / "run/seed0/log.jsonl").read_text() == ""
    assert json.loads((tmp_path / "run/seed0/config.json").read_text())["flags"]["clusters"] == 3
    labels = [checkpoint.load(tmp_path / "run/seed0-test" / f"{name}.pth")["labels"] for name in ("aa", "bb")]
    assert all(x.shape == (5, 4, 6) and set(x.unique().tolist()) == {0, 1, 2} for x in labels)
    assert kmeans.main([*keys, *base, "--clusters", "3", "--save_path", f"{tmp_path}/again"]) == 0
    assert torch.equal(checkpoint.load(tmp_path / "again/aa.pth")["labels"], labels[0])

    found["sequences"]["bb"]["clusters"] = 5
    (tmp_path / "like.json").write_text(json.dumps(found))
    for module, more in ((grid, []), (kmeans, keys)):
        where = tmp_path / module.__name__
        assert module.main([*more, *base, "--like", f"{tmp_path}/like.json", "--save_path", str(where)]) == 0
        assert [row["clusters"] for row in result(where)["sequences"].values()] == [3, 5]
    assert grid.main([*base, "--rows", "2", "--cols", "2", "--save_path", f"{tmp_path}/four"]) == 0
    assert result(tmp_path / "four")["clusters"] == 4
    wrong = {"": "give --clusters K, or --like", "--like nosuch.json": "nosuch.json: No such file"}
    wrong |= {"--rows 2": "give --rows R --cols C", f"--like {weights}": "no result.json"}
    for flags, said in wrong.items():
        with pytest.raises(UserError, match=said):
            grid.main([*base, *flags.split(), "--save_path", f"{tmp_path}/no"])


def test_an_error_ends_the_command_with_code_2(weights: Path, python: str) -> None:
    command = [python, "-m", "uvos_dino.eval_oneshot", "--resume_path", str(weights), "--basepath", "nosuch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: nosuch: no DAVIS2017")
        and "\n" not in done.stderr.strip()
    )
