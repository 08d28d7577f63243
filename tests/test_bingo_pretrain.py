"""BINGO's scripts on mini data: bags, teacher, distillation, every arm, exact resume, two processes, bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bingo import arms, compute_knn, main_moco, main_teacher
from bingo.options import learning_rate
from shared_utils import UserError, checkpoint, mini
from shared_utils.run import Diverged, Run

ROOT = Path(__file__).resolve().parents[1]
DATA = "--per_class 5 --img_size 16 --cache --workers 0 --threads 1".split()  # 50 images
NETS = "--t_arch resnet10 --t_width 8 --t_stem cifar --s_arch resnet10 --s_width 4 --s_stem cifar --hidden 16".split()
RUN = "--batch_size 8 --moco_k 32 --log-every 1 --end_epoch 2 --init_lr 0.05 --warmup_epochs 1".split()  # 12 steps


@pytest.fixture(scope="module")
def data() -> Path:
    return mini.ensure("images")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    flags = "--arch resnet10 --width 8 --stem cifar --moco_dim 16 --batch_size 8 --moco_k 32 --end_epoch 1".split()
    assert (
        main_teacher.main([*DATA, "--data_dir", str(data), *flags, "--log-every", "1", "--output-dir", str(out)]) == 0
    )
    return out


@pytest.fixture(scope="module")
def corr(data, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corr")
    network = [
        "--arch",
        "resnet10",
        "--t_width",
        "8",
        "--t_stem",
        "cifar",
        "--ckpt_name",
        str(teacher / "checkpoint.pth"),
    ]
    for kind in ("knn", "kmeans", "label", "random"):
        flags = ["--bags", kind, "--corr_dir", str(folder), "--corr_name", f"{kind}.npy", *network]
        assert compute_knn.main([*DATA, "--data_dir", str(data), *flags]) == 0
    return folder


@pytest.fixture
def train(data, teacher, corr):
    """Distil in this process; the rows of the log."""
    base = [*DATA, *NETS, *RUN, "--data_dir", str(data), "--pretrain_path", str(teacher / "checkpoint.pth")]
    base += ["--corr_npy", str(corr / "knn.npy"), "--check_teacher", "20"]

    def run(out: Path, *extra: str) -> list[dict[str, Any]]:
        assert main_moco.main([*base, "--output-dir", str(out), *extra]) == 0
        return rows(out)

    run.flags = base  # type: ignore[attr-defined]
    return run


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors(thing: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, flat."""
    if isinstance(thing, torch.Tensor):
        return {name: thing}
    pairs = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list | tuple) else ()
    return {k: v for key, value in pairs for k, v in tensors(value, f"{name}/{key}").items()}


def differing(a: Path, b: Path) -> list[str]:
    x, y = (tensors(checkpoint.load(out / "checkpoint.pth")) for out in (a, b))
    assert x.keys() == y.keys() and len(x) > 50
    return [key for key in x if not torch.equal(x[key], y[key])]


def test_bag_files(corr, data):
    knn, label, random = (np.load(corr / f"{kind}.npy") for kind in ("knn", "label", "random"))
    assert knn.dtype == np.int64 and knn.shape == random.shape == (50, 5) and label.shape == (50,)
    for array in (knn, random):
        assert not (array == np.arange(50)[:, None]).any() and array.min() >= 0 and array.max() < 50
    assert label.tolist() == [c for c in range(10) for _ in range(5)]
    assert len(np.unique(np.load(corr / "kmeans.npy"))) > 1
    assert json.loads((corr / "knn.json").read_text())["kind"] == "knn"


def test_bags_from_mapped_features_are_the_same(corr, data, teacher, tmp_path):
    flags = [
        "--arch",
        "resnet10",
        "--t_width",
        "8",
        "--t_stem",
        "cifar",
        "--ckpt_name",
        str(teacher / "checkpoint.pth"),
    ]
    flags += ["--corr_dir", str(tmp_path), "--corr_name", "k.npy", "--feature_file", str(tmp_path / "features.npy")]
    assert compute_knn.main([*DATA, "--data_dir", str(data), *flags, "--batch_size", "7"]) == 0
    assert np.array_equal(np.load(tmp_path / "k.npy"), np.load(corr / "knn.npy"))
    stored = np.load(tmp_path / "features.npy")
    assert stored.shape == (50, 64) and np.allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "arm",
    [
        "",
        "--one_pass --bn_splits 2",
        "--loss paper",
        "--loss intra",
        "--mix none --lam 1,0",
        "--corr_npy {corr}/random.npy",
        "--corr_npy {corr}/label.npy",
        "--corr_npy {corr}/kmeans.npy --teacher_bn train --bn_splits 2",
        "--s_arch efficientnet-b0 --s_width 64 --s_stem imagenet --img_size 32 --end_epoch 1",
        "--s_arch mobilenetv3 --s_width 64 --s_stem imagenet --img_size 32 --end_epoch 1 --loss intra",
        "--amp bf16 --aug_plus false --decay_method step --schedule 1",
    ],
)
def test_every_arm_trains(arm, train, corr, tmp_path):
    log = train(tmp_path, *arm.format(corr=corr).split())
    assert len(log) >= 5 and all(0 < row["loss"] < 12 for row in log)
    assert log[0].keys() >= {"step", "epoch", "loss", "lr", "acc1", "acc5", "sim/positive", "feat/std", "data_wait"}
    assert ("loss/mix" in log[0]) is ("none" not in arm and "loss" not in arm)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    assert {"module.queue", "module.queue_ptr"} < set(saved) and list(tmp_path.glob("events.*"))
    assert {key.split(".")[1] for key in saved} == {"queue", "queue_ptr", "encoder_q", "encoder_k"}


def test_the_teacher_in_the_checkpoint_is_the_one_of_the_file(train, teacher, tmp_path):
    train(tmp_path)
    source = checkpoint.load(teacher / "checkpoint.pth")["state_dict"]
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    keys = [key for key in saved if key.startswith("module.encoder_k.")]
    assert len(keys) > 50  # the q encoder of the file, though it holds a k encoder too
    for key in keys:
        assert torch.equal(saved[key], source[key.replace("encoder_k", "encoder_q")]), key
    assert not torch.equal(source["module.encoder_k.conv1.weight"], source["module.encoder_q.conv1.weight"])


def test_teacher_check_sees_neighbours_even_with_more_classes_than_images_to_look_at(data):
    from shared_utils.data import image_folder

    images = image_folder(data / "train")
    some = main_moco.sample_classes(images, 64)
    assert len(some) == 64 and some.labels.unique().tolist() == [0, 5]  # two classes of 32
    assert len(main_moco.sample_classes(images, 512)) == 320
    finer = type(images)([(path, i // 50) for i, (path, _) in enumerate(images.samples)], [str(c) for c in range(20)])
    assert torch.bincount(main_moco.sample_classes(finer, 96).labels).max() == 32


def test_one_pass_is_three_passes(train, tmp_path):
    three, one = (
        train(tmp_path / "three", "--end_epoch", "1"),
        train(tmp_path / "one", "--end_epoch", "1", "--one_pass"),
    )
    assert [r["loss"] for r in three] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    a, b = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("three", "one"))
    assert (
        int(a["module.encoder_q.bn1.num_batches_tracked"]) == int(b["module.encoder_q.bn1.num_batches_tracked"]) == 18
    )
    name = "module.encoder_q.bn1.running_mean"
    torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


def test_cross_terms_start_after_the_warmup(train, tmp_path):
    """Runs with other cross weights agree until the first epoch after the warm-up, and not from there on."""
    a, b = train(tmp_path / "a"), train(tmp_path / "b", "--lam", "0.2,0.8")
    assert [r["loss"] for r in a[:6]] == [r["loss"] for r in b[:6]]
    assert all(x["loss"] != y["loss"] for x, y in zip(a[6:], b[6:]))


# --- resume ----------------------------------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch) -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


@pytest.fixture(scope="module")
def whole_flags() -> list[str]:
    return ["--save-every", "2", "--bn_splits", "2", "--teacher_bn", "train"]


@pytest.mark.parametrize("step", [3, 8])
def test_terminated_and_resumed_is_bit_identical(step, train, whole_flags, tmp_path, monkeypatch):
    train(tmp_path / "whole", *whole_flags)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "cut", *whole_flags)
    assert stopped.value.code == 143
    train(tmp_path / "cut", *whole_flags, "--workers", "2")
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [r["loss"] for r in rows(tmp_path / "cut")]


def test_killed_and_resumed_is_bit_identical_and_a_lost_pointer_is_not(train, whole_flags, tmp_path):
    train(tmp_path / "whole", *whole_flags)
    script = (
        "import os, signal; from shared_utils.run import Run, cli; from bingo.main_moco import main; log = Run.log\n"
        "def patched(self, *a, **k):\n    log(self, *a, **k)\n"
        "    self.step == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.log = patched; cli(main)"
    )
    command = [sys.executable, "-c", script, *train.flags, "--output-dir", str(tmp_path / "cut"), *whole_flags]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    saved = checkpoint.load(tmp_path / "cut/checkpoint.pth")
    assert saved["progress"]["step"] == 8
    train(tmp_path / "cut", *whole_flags)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    saved["state_dict"]["module.queue_ptr"].add_(8).remainder_(32)
    checkpoint.save(tmp_path / "lost/checkpoint.pth", saved)
    train(tmp_path / "lost", *whole_flags)
    assert differing(tmp_path / "whole", tmp_path / "lost") != []


def test_resume_with_dropout_is_bit_identical(train, tmp_path, monkeypatch):
    flags = "--s_arch efficientnet-b0 --s_width 64 --s_stem imagenet --img_size 32 --end_epoch 1 --loss intra".split()
    train(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(SystemExit):
            train(tmp_path / "cut", *flags)
    train(tmp_path / "cut", *flags)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_teacher_run_resumes_bit_identical(data, tmp_path, monkeypatch):
    flags = "--arch resnet10 --width 8 --stem cifar --batch_size 8 --moco_k 32 --end_epoch 2 --bn_splits 2".split()
    flags = [*DATA, "--data_dir", str(data), *flags, "--output-dir"]
    main_teacher.main([*flags, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(SystemExit):
            main_teacher.main([*flags, str(tmp_path / "cut")])
    main_teacher.main([*flags, str(tmp_path / "cut")])
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_resume_with_other_flags_is_refused(train, tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="--lam was .*; --moco-t was 0.2, is 0.1.*--overwrite"):
        train(tmp_path, "--lam", "0.6,0.4", "--moco_t", "0.1")


# --- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_two_splits(train, data, tmp_path):
    """Two processes are --bn_splits 2 on one: batch norms, the teacher's shuffled batch, CutMix boxes."""
    flags = ["--teacher_bn", "train", "--init_lr", "0.002"]
    train(tmp_path / "one", *flags, "--bn_splits", "2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "bingo.main_moco", *train.flags, *flags, "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("one", "two"))
    assert torch.equal(one["module.queue_ptr"], two["module.queue_ptr"])
    torch.testing.assert_close(one["module.queue"], two["module.queue"], rtol=0, atol=2e-4)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    for name, value in one.items():
        if name.startswith("module.encoder_q") and "running" not in name:
            torch.testing.assert_close(value, two[name], rtol=0, atol=2e-3)


def test_bags_of_two_processes_are_those_of_one(corr, data, teacher, tmp_path):
    flags = [
        "--arch",
        "resnet10",
        "--t_width",
        "8",
        "--t_stem",
        "cifar",
        "--ckpt_name",
        str(teacher / "checkpoint.pth"),
    ]
    flags += ["--corr_dir", str(tmp_path), "--corr_name", "k.npy", "--feature_file", str(tmp_path / "f.npy")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "bingo.compute_knn", *DATA, "--data_dir", str(data), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "k.npy"), np.load(corr / "knn.npy"))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", r"nowhere/train: no such folder; expected"),
        ("--pretrain_path {tmp}/none.pth", r"none.pth: no such checkpoint file"),
        ("--pretrain_alg swav", r"looks like a moco checkpoint, expected swav"),
        ("--t_width 16", r"taken as moco resnet10 \(width 16, stem cifar\): .*mis-shaped"),
        ("--corr_npy {tmp}/none.npy", r"none.npy: no such correlation file; make it with bingo/run_knn.sh"),
        ("--per_class 4", r"expected integers \[40, K\] for these images"),
        ("--clus_pos_num 6", r"5 neighbours an image, --clus_pos_num asks for 6"),
        ("--moco_k 30", r"--moco_k 30 is no multiple of --batch_size 8; try --moco_k 32"),
        ("--batch_size 6 --bn_splits 4", r"--batch_size 6 does not divide over 1 processes x 4 --bn_splits"),
        ("--bn_splits 8", r"leaves fewer than 2 images for a batch norm"),
        ("--batch_size 64 --moco_k 64", r"a global batch of 64 needs as many samples, the data has 50"),
        ("--moco_dim 64", r"--moco_dim 64: the embedding of this teacher has 16 dimensions"),
        ("--lam 0.5", r"--lam \[0.5\]: two weights"),
        ("--moco_t 0", r"--moco_t and --alpha must be above 0"),
        ("--end_epoch 0", r"--end_epoch 0: must be at least 1"),
    ],
)
def test_bad_flags_are_one_line(flags, message, train, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_diverged_run_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    monkeypatch.setattr("bingo.main_moco.learning_rate", lambda args, epoch: 0.05 if epoch < 1 else float("inf"))
    with pytest.raises(Diverged, match="the loss is nan"):
        train(tmp_path, "--save-every", "1")
    saved = tensors(checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"])
    assert all(bool(value.isfinite().all()) for key, value in saved.items() if "encoder_k" in key)


def test_command_line_prints_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "bingo.main_moco", "--data_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_learning_rate_of_the_release():
    class Args:
        init_lr, end_epoch, decay_method, schedule, lr_decay = 0.03, 200, "cos", [120, 160], 0.1

    assert learning_rate(Args, 0) == 0.03 and learning_rate(Args, 100) == pytest.approx(0.015)  # type: ignore[arg-type]
    Args.decay_method = "step"
    assert [learning_rate(Args, e) for e in (119, 120, 160)] == pytest.approx([0.03, 0.003, 0.0003])  # type: ignore[arg-type]


# --- arms ------------------------------------------------------------------------------------------------------------


def test_a_run_counts_when_both_evaluations_are_there(tmp_path):
    folder = tmp_path / "bingo" / "seed0"
    for job, result in (
        ("knn", {"knn": 30.0, "few_shot": 20.0, "purity": 25.0, "bag_gap": 0.5, "knn10": 0.0}),
        ("linear", {"linear_last": 40.0, "linear": 41.0}),
    ):
        assert arms.read(folder) is None
        file = folder.with_name(f"seed0-{job}") / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(result))
    metrics = {"few_shot": 20.0, "knn": 30.0, "linear_last": 40.0, "purity": 25.0, "bag_gap": 0.5}
    assert arms.read(folder) == metrics
    assert "| BINGO, release's loss | 1 | 20.00 | 30.00 | 40.00 |" in arms.ARMS.table(arms.ARMS.measured(tmp_path))
