"""The training script of flat: arms, what a step does, exact resume, two processes, bad input."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flat import aet, data, save_features
from flat.train import main
from shared_utils import UserError, checkpoint
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing, tensors

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--dataset folder --image_size 16 --model Conv4 --width 4 --method cosine --num_classes 4 --batch_size 8 "
    "--workers 0 --threads 1 --log-every 1 --stop_epoch 1 --cache --holdout 1 --train_aug --crop padded"
).split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base: four classes of seven noisy images (three steps an epoch with one of each held out); val, novel: two."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, classes in (("train", 4), ("val", 2), ("test", 2)):
        for i in range(classes * 7):
            noise = rng.integers(0, 120, (16, 16, 3)) + 40 * np.eye(3, dtype=np.int64)[i // 7 % 3]
            path = root / split / f"{split}{i // 7}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.astype(np.uint8)).save(path)
    return root


def train(images: Path, out: Path, *extra: str) -> list[dict]:
    """Run in this process; the rows of the log."""
    assert main([*SMALL, "--data_dir", str(images), "--output-dir", str(out), *extra]) == 0
    return rows(out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- arms ------------------------------------------------------------------------------------------------------------

NONE = ("--aet none", "--aet_lambda 0", "--cls_on_transformed 1 --aet none")


@pytest.mark.parametrize(
    "arm",
    [
        "",
        "--aet none",
        "--aet avt --aet_lambda 0.125 --bn two_pass",
        "--aet avt --decoder mlp --aet_pool gap --avt_noise_eval 1 --aet_warm 10",
        "--aet_type affine --bn split --method baseline",
        "--decoder block --method baseline++ --aet_smooth",
        "--cls_on_transformed 1 --aet none --recipe cosine",
        "--aet_targets shuffled --aet_pad reflect --aet_norm estimate --amp bf16",
        "--aet_shift 0 --shrink 1 --enlarge 1 --recipe rfs --lr 0.001",
        "--method protonet --train_n_way 3 --n_shot 1 --test_n_way 1 --epoch_steps 3 --per_class 6 --holdout 0",
        "--recipe bf3s --epoch_steps 4 --lr 0.001 --model WRN28 --width 8 --aet none",
    ],
)
def test_every_arm_trains(arm: str, images: Path, tmp_path: Path) -> None:
    log = train(images, tmp_path, *arm.split())
    assert len(log) == (4 if "bf3s" in arm else 3)
    state = checkpoint.load(tmp_path / "checkpoint.pth")["state"]
    regularised = "--aet none" not in arm
    assert any(key.startswith("decoder.fc.") for key in state) == regularised == ("loss/at" in log[0])
    assert any(key.startswith("decoder.fc2.") for key in state) == ("avt" in arm) == ("feature.noise.0.weight" in state)
    assert any(key.startswith("classifier.") for key in state) == ("protonet" not in arm)
    assert any(key.startswith("other.") for key in state) == ("split" in arm)
    assert ("acc/rotation" in log[0]) == (regularised and "affine" not in arm)
    numbered = checkpoint.load(tmp_path / "0.tar")
    assert numbered["epoch"] == 0 and set(numbered["state"]) == set(state)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["aet_lambda"] is not None and config["versions"]["torch"]
    words = ["--checkpoint", str(tmp_path / "checkpoint.pth"), "--workers", "0", "--threads", "1"]
    assert save_features.main(words) == 0
    saved = checkpoint.load(tmp_path / "features.pt")
    assert saved["count"] == 14 and ("novel_decoder_mse" in saved["scores"]) == regularised
    assert ("held_base_accuracy" in saved["scores"]) == ("protonet" not in arm)
    again = [r for r in log if "held/base_accuracy" in r]
    if "avt_noise_eval 1" not in arm and again and "bf16" not in arm:  # the last evaluation of the training
        assert saved["scores"]["held_base_accuracy"] == pytest.approx(again[-1]["held/base_accuracy"], abs=1e-3)


def test_without_weight_it_is_the_baseline_to_the_bit(images: Path, tmp_path: Path) -> None:  # 8f
    train(images, tmp_path / "none", "--aet", "none", "--stop_epoch", "2")
    train(images, tmp_path / "zero", "--aet_lambda", "0", "--stop_epoch", "2")
    assert differing(tmp_path / "none", tmp_path / "zero", 40) == []
    train(images, tmp_path / "some", "--aet_lambda", "0.01", "--stop_epoch", "2")
    none, some = tensors(tmp_path / "none"), tensors(tmp_path / "some")
    assert not torch.equal(none["/state/feature.trunk.0.C.weight"], some["/state/feature.trunk.0.C.weight"])
    # the arms see the same batches of the same crops: the first loss of the classifier before any update is common
    # to all that normalise images alone
    train(images, tmp_path / "apart", "--bn", "two_pass")
    first = [rows(tmp_path / name)[0]["loss/cls"] for name in ("none", "apart")]
    assert first[0] == first[1]


def test_labels_do_not_touch_the_regulariser(images: Path, tmp_path: Path, monkeypatch) -> None:  # 8g
    train(images, tmp_path / "own")
    as_list = data.as_list

    def relabelled(files: data.Files, *rest: Any) -> Any:  # the same images in the same order under other labels
        out = as_list(files, *rest)
        return out.take(slice(None), (out.labels + 1) % len(files))

    monkeypatch.setattr(data, "as_list", relabelled)
    train(images, tmp_path / "other")
    own, other = (rows(tmp_path / name)[0] for name in ("own", "other"))
    assert own["loss/at"] == other["loss/at"] and own["loss/cls"] != other["loss/cls"]


def test_targets_belong_to_their_images_unless_shuffled(images: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple] = []
    loss, warp = aet.aet_loss, aet.warp

    def spy_warp(pixels: torch.Tensor, theta: torch.Tensor, pad: str) -> torch.Tensor:
        assert pixels.dtype == torch.uint8  # before any normalisation
        seen.append((theta,))
        return warp(pixels, theta, pad)

    def spy_loss(mu: torch.Tensor, target: torch.Tensor, smooth: bool) -> torch.Tensor:
        seen[-1] += (target,)
        return loss(mu, target, smooth)

    monkeypatch.setattr(aet, "warp", spy_warp)
    monkeypatch.setattr(aet, "aet_loss", spy_loss)
    mean, std = aet.normalisation(aet.Family("projective", 16, 2, 0.8, 1.2))
    for name, by in (("own", 0), ("shuffled", 1)):
        seen.clear()
        train(images, tmp_path / name, "--aet_targets", name, "--holdout", "0")
        for theta, target in seen:
            torch.testing.assert_close(target, ((theta - mean) / std).float().roll(by, 0))
        assert len({float(theta[0, 0]) for theta, _ in seen}) == 3  # other draws at every step


# --- checkpoints and selection ---------------------------------------------------------------------------------------


def test_a_checkpoint_without_its_decoder_gives_the_same_features(images: Path, tmp_path: Path) -> None:  # 8n
    train(images, tmp_path)
    words = ["--workers", "0", "--threads", "1", "--checkpoint"]
    save_features.main([*words, str(tmp_path / "checkpoint.pth")])
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    bare = {k: v for k, v in saved["state"].items() if not k.startswith("decoder.")}
    (tmp_path / "bare").mkdir()
    checkpoint.save(tmp_path / "bare/x.tar", {**saved, "state": bare})
    save_features.main([*words, str(tmp_path / "bare/x.tar")])
    one, two = (checkpoint.load(folder / "features.pt") for folder in (tmp_path, tmp_path / "bare"))
    assert torch.equal(one["features"], two["features"]) and one["weights"] == two["weights"]
    assert "held_base_accuracy" in one["scores"]
    save_features.main([*words, str(tmp_path / "checkpoint.pth"), "--dataset", "folder", "--split", "val"])
    other = checkpoint.load(tmp_path / "features_val.pt")  # across domains nothing was held out
    assert other["split"] == "val" and not any(key.startswith("held") for key in other["scores"])
    assert "novel_decoder_mse" in one["scores"] and "novel_decoder_mse" not in two["scores"]
    assert not any("decoder" in key for key in one if key != "scores")
    bare.pop("feature.trunk.0.C.weight")
    checkpoint.save(tmp_path / "bare/y.tar", {**saved, "state": bare})
    with pytest.raises(UserError, match=r"y.tar, taken as Conv4 for 16 pixels: .*1 missing \(feature.trunk.0.C.weight"):
        save_features.main([*words, str(tmp_path / "bare/y.tar")])
    with pytest.raises(UserError, match="features.pt: no `state` inside"):
        save_features.main([*words, str(tmp_path / "features.pt")])


def test_recipe_rfs_keeps_five_augmented_copies(images: Path, tmp_path: Path) -> None:
    """Drawn by (copy, image) alone, by the training's own augmentation; other recipes keep none."""
    train(images, tmp_path / "rfs", *"--recipe rfs --lr 0.001 --aet none --crop rfs".split())
    train(images, tmp_path / "plain", "--aet", "none")
    for name in ("rfs", "plain"):
        for copy, workers in (("a", "0"), ("b", "2")):
            out = tmp_path / f"{name}-{copy}.pt"
            flags = ["--checkpoint", str(tmp_path / name / "checkpoint.pth"), "--out", str(out), "--workers", workers]
            assert save_features.main([*flags, "--threads", "1"]) == 0
    first, second, plain = (checkpoint.load(tmp_path / f"{name}.pt") for name in ("rfs-a", "rfs-b", "plain-a"))
    assert "augmented" not in plain and plain["recipe"] == "closerlook"
    assert first["recipe"] == "rfs" and first["augmented"].shape == (14, 5, first["features"].shape[1])
    assert torch.equal(first["augmented"], second["augmented"])
    spread = first["augmented"].std(1).mean(1)
    assert (spread > 0).all() and not torch.equal(first["augmented"][:, 0], first["features"])
    flags = ["--checkpoint", str(tmp_path / "plain/checkpoint.pth"), "--out", str(tmp_path / "asked.pt")]
    assert save_features.main([*flags, "--workers", "0", "--threads", "1", "--aug_support", "2"]) == 0
    assert checkpoint.load(tmp_path / "asked.pt")["augmented"].shape[1] == 2


def test_a_ramp_is_resumed_to_the_bit(images: Path, tmp_path: Path, monkeypatch) -> None:
    flags = "--model ResNet12 --drop_block 0.4 --drop_block_steps 6 --aet none --stop_epoch 2".split()
    log = train(images, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            train(images, tmp_path / "parts", *flags)
    train(images, tmp_path / "parts", *flags)
    assert differing(tmp_path / "whole", tmp_path / "parts", 40) == []
    at_once = train(images, tmp_path / "once", *flags, "--drop_block_steps", "0")
    assert [row["loss"] for row in at_once] != [row["loss"] for row in log]


def test_selection_on_the_validation_classes(images: Path, tmp_path: Path) -> None:
    flags = ["--select", "val", "--episodes", "20", "--test_n_way", "2", "--n_shot", "1", "--save_freq", "1"]
    bigger = tmp_path / "data"
    shutil.copytree(images, bigger)
    for name in ("val0", "val1"):
        for i in range(12):
            shutil.copy(
                bigger / "val" / name / sorted(os.listdir(bigger / "val" / name))[0],
                bigger / "val" / name / f"c{i}.png",
            )
    log = train(bigger, tmp_path / "out", *flags, "--stop_epoch", "3")
    scores = [row["val/proto"] for row in log if "val/proto" in row]
    best = checkpoint.load(tmp_path / "out/best_model.tar")
    assert log[-1]["val/best"] == max(scores) and best["epoch"] in (0, 1, 2)
    assert {p.name for p in (tmp_path / "out").glob("*.tar")} == {"0.tar", "1.tar", "2.tar", "best_model.tar"}
    ends = [row["val/proto"] for row in log if row["step"] % 3 == 0]
    assert best["epoch"] == ends.index(max(ends))
    with pytest.raises(UserError, match="class val0 has 7 images, an episode takes 1 shots"):
        train(images, tmp_path / "few", *flags)


# --- resume ----------------------------------------------------------------------------------------------------------

FULL = [
    "--stop_epoch",
    "4",
    "--save-every",
    "2",
    "--aet",
    "avt",
    "--val_freq",
    "2",
    "--recipe",
    "cosine",
    "--lr",
    "0.001",
]


def stop_at(step: int, how, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Let `how()` happen inside the step with this number."""
    log = Run.log

    def patched(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        log(self, *args, **kwargs)
        if self.step == step:
            how()

    monkeypatch.setattr(Run, "log", patched)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs (twelve steps) without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train(images, out, *FULL)
    return out


@pytest.mark.parametrize("step", [4, 5, 7])
def test_terminated_and_resumed_is_bit_identical(
    step: int, images: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit) as stopped:
            train(images, tmp_path, *FULL)
    assert stopped.value.code == 143
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == step + 1
    log = train(images, tmp_path, *FULL, *(["--workers", "2"] if step == 4 else []))  # workers change nothing
    assert differing(whole, tmp_path, 40) == []
    drop = {"data_wait"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in log] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows(whole)
    ]


def test_episodic_training_resumes_to_the_bit(images: Path, tmp_path: Path, monkeypatch) -> None:
    flags = (
        "--method protonet --train_n_way 3 --n_shot 2 --test_n_way 1 --epoch_steps 3 --holdout 0 --stop_epoch 2".split()
    )
    train(images, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(1, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            train(images, tmp_path / "parts", *flags)
    train(images, tmp_path / "parts", *flags)
    assert differing(tmp_path / "whole", tmp_path / "parts", 40) == []


@pytest.mark.parametrize("part", ["nothing", "optimizer", "step"])
def test_a_checkpoint_without_a_part_would_not_be_identical(
    part: str, images: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    """The negative test: lose the momentum or the number of the step (the stream of transformations) and it differs."""
    with monkeypatch.context() as patch:
        stop_at(7, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            train(images, tmp_path, *FULL)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    if part == "optimizer":
        saved["optimizer"]["state"] = {}
    elif part == "step":
        saved["progress"]["step"] += 100
    checkpoint.save(tmp_path / "checkpoint.pth", saved)
    train(images, tmp_path, *FULL)
    changed = [key for key in differing(whole, tmp_path, 40) if key.startswith("/state/")]
    assert (changed == []) == (part == "nothing")


def test_resume_with_other_flags_is_refused(images: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(UserError, match=r"--aet-lambda was 1.0, is 0.5; --decoder was linear, is mlp"):
        train(images, tmp_path / "copy", *FULL, "--aet_lambda", "0.5", "--decoder", "mlp")


def test_a_diverged_run_keeps_the_last_good_files(images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("flat.train.learning_rate", lambda args, epoch: 0.001 if epoch < 1 else float("inf"))
    with pytest.raises(Diverged, match=r"step \d: the loss is nan"):
        train(images, tmp_path, "--stop_epoch", "3", "--save_freq", "1")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 3
    assert [path.name for path in tmp_path.glob("*.tar")] == ["0.tar"]


# --- processes and bad input -----------------------------------------------------------------------------------------


def test_two_processes_equal_one(images: Path, tmp_path: Path, python: str) -> None:
    flags = [*SMALL, "--data_dir", str(images), "--stop_epoch", "2", "--recipe", "cosine", "--lr", "0.01"]
    assert main([*flags, "--output-dir", str(tmp_path / "one")]) == 0
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flat.train", *flags, "--output-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    assert two["progress"]["world"] == 2 and len(two["rng"]) == 2
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    for key, value in one["state"].items():
        torch.testing.assert_close(value, two["state"][key], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", r"nowhere/train: no such folder; expected"),
        ("--dataset miniImagenet", r"train.csv: no such file; expected the lists of Ravi"),
        ("--method nosuch", r"--method nosuch: unknown; choose from baseline"),
        ("--model Conv9", r"--model Conv9: unknown backbone; choose from Conv4"),
        ("--image_size 8", r"--image_size 8: Conv4 halves"),
        ("--num_classes 3", r"--num_classes 3: the data has 4 base classes"),
        ("--base_classes 5", r"--base_classes 5: the data has 4 base classes"),
        ("--base_classes 1", r"one base class, train\d; a classifier needs two at the least"),
        ("--holdout 7", r"class train0 has no image left of 7"),
        ("--batch_size 64", r"--batch_size 64: the data has 24 training images; give --batch_size 24"),
        ("--batch_size 1", r"--batch_size 1: 1 processes need equal shares of 2 images or more"),
        ("--shrink 1.3", r"--shrink 1.3 --enlarge 1.2: must be above 0 and in this order"),
        ("--aet_shift 4", r"--aet_shift 4: must be below a quarter of --image_size 16"),
        ("--aet_lambda -1", r"--aet_lambda -1: must not be negative"),
        ("--stop_epoch -2", r"--stop_epoch -2: must be at least -1"),
        ("--aet_pool gap --decoder block", r"--decoder block has a pooling of its own"),
        ("--method protonet --epoch_steps 3", r"5-way episodes need as many classes, the split has 4"),
        ("--method protonet --epoch_steps 3 --train_n_way 2", r"class train0 has 6 images, an episode takes 5 shots"),
        ("--method protonet --epoch_steps 3 --cls_on_transformed 1", r"--cls_on_transformed needs a classifier"),
        ("--method protonet --epoch_steps 0", r"--method protonet needs --epoch_steps"),
        ("--output-dir /dev/null/x", r"/dev/null/x: cannot write here"),
    ],
)
def test_bad_flags_are_one_line(flags: str, message: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(images, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line_on_mini_data_and_with_overlapping_splits(images: Path, tmp_path: Path, python: str) -> None:
    command = [python, "-m", "flat.train", *SMALL, "--num_classes", "24", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--data_dir", str(mini.ensure("fewshot")), "--per_class", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("48 images of 24 base classes", "expected initial loss", "estimated time", "flat.save_features"):
        assert line in done.stdout
    bad = tmp_path / "data"
    shutil.copytree(images, bad)
    shutil.copytree(bad / "train/train0", bad / "test/train0")
    command = [python, "-m", "flat.train", *SMALL, "--data_dir", str(bad)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {bad}: class train0 is in train and in test; splits of classes must not overlap\n"
