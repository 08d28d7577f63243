"""The pretraining script of fame: arms, exact resume, two processes, bad input."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fame import main_cam, train
from fame.fame import MASKS
from fame.train import get_parser, learning_rate, main
from shared_utils import UserError, checkpoint
from tests.checkpoints import differing

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "-a tiny --width 2 -cs 32 -fpc 4 --stride 1 --moco_dim 8 --moco_k 32 -b 8 --bn_splits 2 --moco_m 0.9 --lr 0.05 "
    "--epochs 1 --bins 5 --workers 0 --threads 1 --log-every 1 --cache"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen videos of six noisy frames, two classes, in UCF101's layout: two steps an epoch."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    lines = []
    for i in range(16):
        name = f"class{i // 8}/v{i:02d}"
        (root / "data" / name).mkdir(parents=True)
        still = rng.integers(0, 160, (36, 40, 3))
        for t in range(6):
            frame = still.copy()
            frame[8:20, 4 * t : 4 * t + 10] += rng.integers(20, 90, (1, 1, 3))
            Image.fromarray(frame.astype(np.uint8)).save(root / "data" / name / f"img_{t:05d}.png")
        lines.append(f"{name}.avi\n")
    (root / "anno").mkdir()
    for file in ("trainlist01.txt", "testlist01.txt"):
        (root / "anno" / file).write_text("".join(lines))
    return root


def pretrain(data: Path, out: Path, *extra: str) -> list[dict]:
    """Run in this process; the rows of the log."""
    flags = ["--index_cache", str(out / "index.pth"), "--output-dir", str(out), *extra]
    assert main([str(data), *SMALL, *flags]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "arm",
    [
        *(f"--mask {mask}" for mask in MASKS),
        "--merge_views both --queue_order clean --hue correct --jitter kornia_old",
        "--alpha 0.5 --warmup --schedule 3 --amp bf16 --bn_splits 1",
    ],
)
def test_every_arm_trains(arm, data, tmp_path):
    log = pretrain(data, tmp_path, *arm.split())
    assert len(log) == 2 and log[0].keys() >= {"step", "loss", "lr", "data_wait", "data_share", "moco_train/acc1"}
    assert 0 < log[1]["data_share"] < 1
    state = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    assert int(state["module.queue_ptr"]) == 0  # 2 steps x 2 x 8 keys
    assert {"module.queue", "module.encoder_q.fc.2.weight", "module.encoder_k.features.0.weight"} <= set(state)
    assert json.loads((tmp_path / "result.json").read_text())["minutes"] >= 0
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["blur_sigma"] > 0


def test_a_folder_without_labels_trains(data, tmp_path, capsys):
    """Videos in no class folders: no word of classes, and pictures of them afterwards."""
    log = pretrain(data / "data/class0", tmp_path, "--dataset", "folder", "-b", "4")
    said = capsys.readouterr().out
    assert len(log) == 2 and "(folder): 8 videos, 6 to 6 frames" in said
    assert "look at: python -m fame.main_cam" in said and "main_retrieve" not in said


def test_arms_and_their_flags_change_the_result(data, tmp_path):
    pretrain(data, tmp_path / "full")
    for arm in ("--mask none", "--mask random", "--beta 0.3", "--merge_views both", "--queue_order clean", "--seed 1"):
        pretrain(data, tmp_path / arm, *arm.split())
        assert "/state_dict/module.queue" in differing(tmp_path / "full", tmp_path / arm), arm


def test_pictures_and_tensorboard(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(data, tmp_path, "--image_every", "1")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"loss/total", "moco_train/acc1", "moco_train/acc5", "feat/std", "sim/positive", "sim/same_view"}
    assert set(events.Tags()["scalars"]) >= names
    picture = events.Images("clips/first_mask_merged_second")[1]
    assert (picture.height, picture.width) == (4 * 34 + 2, 8 * 34 + 2)


def test_defaults_and_schedules(data, tmp_path):
    args = get_parser().parse_args([])
    expected = {
        "moco_dim": 128, "moco_k": None, "moco_m": 0.999, "moco_t": 0.1, "lr": 0.03, "momentum": 0.9, "wd": 1e-4,
        "batch_size": 256, "epochs": 200, "schedule": [120, 160], "lr_decay": 0.1, "beta": 0.5, "crop_size": 112,
        "frame_per_clip": 16, "step_between_clips": 1, "stride": 2, "wp_lr": 0.0025, "cos": False, "mask": "full",
        "hue": "release", "queue_order": "release", "bins": 10, "laplace": 1.0, "alpha": 1.0, "hflip": 0.5,
        "min_scale": 0.2, "bn_splits": 1, "merge_views": "first",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    for dataset, k in (("k400", 65536), ("ucf101", 2048)):
        args = get_parser().parse_args(["--dataset", dataset])
        train.check_flags(args, 1)
        assert args.moco_k == k
    release = "-a I3D --dataset k400 --lr 0.01 -fpc 16 -cs 224 -b 64 -j 8 --cos --epochs 200 -p 5 --log_dir x folder"
    args = get_parser().parse_args(release.split())
    assert (args.workers, args.log_every, args.output_dir, args.data) == (8, 5, Path("x"), Path("folder"))
    assert [learning_rate(args, e) for e in (0, 100)] == pytest.approx([0.01, 0.005])
    assert learning_rate(args, 199) == pytest.approx(0.01 * 0.5 * (1 + np.cos(np.pi * 199 / 200)))
    steps = get_parser().parse_args("--lr 0.01 --schedule 120 180".split())
    rates = [learning_rate(steps, e) for e in (0, 119, 120, 180, 199)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0001, 0.0001])
    warm = get_parser().parse_args("--lr 0.0325 --warmup --schedule 10 20".split())
    assert [learning_rate(warm, e) for e in (0, 5, 10, 20)] == pytest.approx([0.0025, 0.0175, 0.0325, 0.00325])


# --- resume, processes -----------------------------------------------------------------------------------------------


def stop_after(monkeypatch, step: int) -> None:
    """SIGTERM to this process in the loss of step `step` (from 1)."""
    calls: list[int] = []
    info_nce = train.info_nce

    def counted(*args):
        calls.append(1)
        if len(calls) == 2 * step:
            os.kill(os.getpid(), signal.SIGTERM)
        return info_nce(*args)

    monkeypatch.setattr(train, "info_nce", counted)


def test_a_killed_run_resumes_to_the_bit(data, tmp_path, monkeypatch):
    pretrain(data, tmp_path / "whole", "--epochs", "3")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit) as stop:
            pretrain(data, tmp_path / "cut", "--epochs", "3")
        assert stop.value.code == 143
    assert checkpoint.load(tmp_path / "cut/checkpoint.pth")["progress"]["step"] == 3  # inside the second epoch
    pretrain(data, tmp_path / "cut", "--epochs", "3", "--workers", "1")
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    # and it can fail: another queue pointer, and the runs part
    saved = checkpoint.load(tmp_path / "cut/checkpoint.pth")
    saved["state_dict"]["module.queue_ptr"] += 8
    checkpoint.save(tmp_path / "cut/checkpoint.pth", saved)
    assert differing(tmp_path / "whole", tmp_path / "cut") == ["/state_dict/module.queue_ptr"]
    with pytest.raises(UserError, match="--beta was 0.5, is 0.3"):
        pretrain(data, tmp_path / "cut", "--epochs", "3", "--beta", "0.3")


def two_processes(python: str, data: Path, out: Path, *extra: str, code: int = 0, **environment: str) -> list[dict]:
    """Two processes of the training script; the rows of the log. With STOP=n the second gets SIGTERM in step n."""
    script = out.with_suffix(".py")
    script.write_text(
        "import os, signal, sys\n"
        "from fame import train\n"
        "calls, info_nce = [], train.info_nce\n"
        "def counted(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 * int(os.environ.get('STOP', 0)) and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return info_nce(*args)\n"
        "train.info_nce = counted\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script), str(data), *SMALL, "--bn_splits", "1", *extra]
    done = subprocess.run(
        [*command, "--index_cache", str(out / "i.pth"), "--output-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (code == 0) and (not code or f"exitcode  : {code}" in done.stderr), done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_on_the_whole_batch(data, tmp_path, python):  # with batch norm in train mode too
    alone = pretrain(data, tmp_path / "one", "--epochs", "2")
    together = two_processes(python, data, tmp_path / "two", "--epochs", "2")
    for a, b in zip(alone, together, strict=True):  # what is logged is of the whole batch
        assert a.keys() == b.keys()
        for key in a.keys() - {"data_wait", "data_share"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("one", "two"))
    for key in one:
        if "running" in key or "num_batches" in key:  # each process has the statistics of its own share
            continue
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5, msg=key)
    pretrain(
        data, tmp_path / "joined", "--epochs", "2", "--bn_splits", "1"
    )  # one norm and one merge over all: not equal
    joined = checkpoint.load(tmp_path / "joined/checkpoint.pth")["state_dict"]
    assert not torch.allclose(one["module.queue"], joined["module.queue"], atol=1e-3)


def test_two_processes_that_are_stopped_resume_to_the_bit(data, tmp_path, python):
    two_processes(python, data, tmp_path / "whole", "--epochs", "3")
    two_processes(python, data, tmp_path / "cut", "--epochs", "3", code=143, STOP="3")
    assert checkpoint.load(tmp_path / "cut/checkpoint.pth")["progress"]["step"] == 3
    two_processes(python, data, tmp_path / "cut", "--epochs", "3")
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("-b 8 --bn_splits 8", "1 clip a process .*nothing would be merged"),
        ("-b 6 --bn_splits 4", "does not divide over 1 processes x 4"),
        ("--moco_k 20", "must be a multiple of the global batch of 8.*take --moco_k 16"),
        ("--beta 1.2", "must lie in 0..1"),
        ("--moco_t 0", "must be above 0"),
        ("--moco_k 0", "--moco_k 0: must be at least 1"),
        ("--blur_sigma 0", "--blur_sigma .* must be above 0"),
        ("--wd -1", "--wd -1: must not be negative"),
        ("--momentum -0.1", "--momentum -0.1: must not be negative"),
        ("--lr_decay 0", "--lr_decay 0.0: must be above 0"),
        ("--bins 0", "--bins 0: must be at least 1"),
        ("--warmup --schedule", "--warmup climbs up to the first entry"),
        ("-b 32", "--batch_size 32: the data has 16 videos; give --batch_size 16"),
        ("-b 34 --bn_splits 17", "--batch_size 34: the data has 16 videos; give a lower --bn_splits too"),
        ("-fpc 40", "16 of 16 videos cannot be used.*a lower --stride or --frame_per_clip takes shorter ones"),
    ],
)
def test_bad_flags_are_named_before_training(extra, expected, data, tmp_path):
    with pytest.raises(UserError, match=expected):
        pretrain(data, tmp_path / "out", *extra.split())
    assert not (tmp_path / "out/log.jsonl").exists()


def test_the_command_line_ends_with_one_line_on_an_error(data, tmp_path, python):
    command = [python, "-m", "fame.train", str(data), *SMALL, "-b", "1", "--bn_splits", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "error: 1 clip" in done.stderr


def test_activation_maps(data, tmp_path, capsys):
    pretrain(data, tmp_path)
    flags = ["--pretrained", str(tmp_path / "checkpoint.pth"), "--out", str(tmp_path / "cam"), "--count", "3"]
    assert main_cam.main([str(data), *flags]) == 0
    pictures = sorted((tmp_path / "cam").glob("*.png"))
    assert len(pictures) == 3 and Image.open(pictures[0]).size == (4 * 34 + 2, 3 * 34 + 2)
    assert "of the activation lies inside masks of 50 %" in capsys.readouterr().out
    model = torch.nn.Module()
    spots = torch.zeros(1, 5, 2, 2, 2)
    spots[0, :, :, 0, 1] = 1.0
    model.maps = lambda x: spots  # type: ignore[assignment]
    heat = main_cam.activation(model, torch.zeros(1, 3, 4, 8, 8))
    assert heat.shape == (1, 4, 8, 8) and float(heat[0, 0, 0, 7]) > 0.99 and float(heat[0, 0, 7, 0]) < 0.01
    with pytest.raises(UserError, match="--count 0: must be at least 1"):
        main_cam.main([str(data), "--count", "0"])
