"""The pretraining script on mini data: arms, exact resume, two processes, bad input."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mdp.builder import MDP
from mdp.main_pretrain import learning_rate, main
from mdp.models import Encoder
from mdp.prototypes import PrototypeBank
from shared_utils import UserError, checkpoint
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--arch resnet18 --base-channels 8 --head-channels 16 --dilations 1,2 --dim 16 --crop-size 32 --batch-size 8 "
    "--bank-size 64 --workers 0 --threads 1 --lr 0.05 --log-every 1 --epochs 1"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The mini trees with their lists cut to 24 + 24 training images."""
    full = mini.ensure("segmentation")
    root = tmp_path_factory.mktemp("mini")
    shutil.copytree(full / "VOCdevkit", root / "VOCdevkit")
    sets = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    names = (sets / "trainaug.txt").read_text().split()[:24]
    (sets / "trainaug.txt").write_text("\n".join(names) + "\n")
    for kind in ("images", "annotations"):
        source, to = (r / f"ade/ADEChallengeData2016/{kind}/training" for r in (full, root))
        to.mkdir(parents=True)
        for file in sorted(source.iterdir())[:24]:
            shutil.copy(file, to)
    return root


def train(data: Path, out: Path, *extra: str) -> list[dict]:
    """Run in this process; the rows of the log."""
    assert main([*SMALL, "--data-root", str(data), "--output-dir", str(out), *extra]) == 0
    return rows(out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "arm",
    [
        "",
        "--mix none --csc none",
        "--mix region --csc nopush --csc-scope cross",
        "--mix pixel --mix-ignore renorm --proto-update ema --key-encoder self",
        "--bank-type region --mix none --csc none --anchors 8",
        "--bank-type none --mix none --csc none --anchors 8 --norm shuffle",
        "--objective multihead-ce --mix none --csc none",
        "--objective union-ce --mix none --csc none --aug mmseg --voc-background ignore --cache-size 40",
        "--head sep_aspp --amp bf16",
        "--head none",
    ],
)
def test_every_arm_trains(arm, data, tmp_path):
    log = train(data, tmp_path, *arm.split())
    assert len(log) == 6 and all(row["loss"] >= 0 for row in log)
    assert log[0].keys() >= {"step", "epoch", "loss", "lr", "data_wait"}
    assert any(row["loss"] > 0 for row in log)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert any(key.startswith("encoder_q.backbone.layer4") for key in saved["state_dict"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["tau"] == 0.07 and config["versions"]["torch"] and "main_pretrain" not in config["flags"]
    assert list(tmp_path.glob("events.*"))


def test_telemetry_has_the_names_of_the_readme(data, tmp_path):
    log = train(data, tmp_path, "--image-every", "3")
    names = {"loss/p2c", "loss/csc", "acc/pixel_proto", "acc/pixel_proto_voc", "loss/p2c_ade", "proto/valid"}
    assert log[-1].keys() >= names | {"proto/mean_offdiag_cos", "feat/std", "sim/positive", "sim/negative"}
    assert 0 <= log[-1]["acc/pixel_proto"] <= 1 and 2 <= log[-1]["proto/valid"] <= 15
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= names | {"loss/total", "train/lr", "train/data_wait"}
    assert events.Tags()["images"] == ["views/query_label_nearest_prototype"]


def stop_at(step: int, how, monkeypatch) -> None:
    """Let `how()` happen inside the step with this number."""
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            how()

    monkeypatch.setattr(Run, "log", patched)


FULL = ["--epochs", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Two epochs (12 steps) without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train(data, out, *FULL)
    return out


@pytest.mark.parametrize("step", [3, 5, 8])
def test_terminated_and_resumed_is_bit_identical(step, data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit) as stopped:
            train(data, tmp_path, *FULL)
    assert stopped.value.code == 143
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == step + 1
    log = train(data, tmp_path, *FULL, "--workers", "2")  # more workers change nothing
    assert differing(whole, tmp_path) == []
    keys = ("step", "loss", "lr", "acc/pixel_proto")
    assert [[r.get(k) for k in keys] for r in log] == [[r.get(k) for k in keys] for r in rows(whole)]


def test_killed_between_checkpoints_and_resumed_is_bit_identical(data, whole, tmp_path, python):
    script = (
        "import os, signal; from shared_utils.run import Run, cli; from mdp.main_pretrain import main; log = Run.log\n"
        "def patched(self, *a, **k):\n    log(self, *a, **k)\n"
        "    self.step == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.log = patched; cli(main)"
    )
    command = [python, "-c", script, *SMALL, "--data-root", str(data), "--output-dir", str(tmp_path), *FULL]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 8
    train(data, tmp_path, *FULL)
    assert differing(whole, tmp_path) == []
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_a_signal_to_the_whole_process_group_still_saves(data, whole, tmp_path, python):
    """As a batch system sends it: the data workers get it too, and must not take the run down before it has saved."""
    script = (
        "import os, signal; from shared_utils.run import Run, cli; from mdp.main_pretrain import main; log = Run.log\n"
        "def patched(self, *a, **k):\n    log(self, *a, **k)\n    self.step == 6 and os.killpg(0, signal.SIGTERM)\n"
        "Run.log = patched; cli(main)"
    )
    flags = [*SMALL, "--data-root", str(data), "--output-dir", str(tmp_path), *FULL, "--workers", "2"]
    command = [python, "-c", script, *flags]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, start_new_session=True).returncode == 143
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 7
    train(data, tmp_path, *FULL)
    assert differing(whole, tmp_path) == []


@pytest.mark.parametrize("part", ["rng-free", "bank", "optimizer"])
def test_a_checkpoint_without_a_part_would_not_be_identical(part, data, whole, tmp_path, monkeypatch):
    """The negative test: lose the bank's pointer or the momentum and the end differs."""
    with monkeypatch.context() as patch:
        stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            train(data, tmp_path, *FULL)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    if part == "bank":
        saved["bank"]["ptr"].add_(8).remainder_(64)
    elif part == "optimizer":
        saved["optimizer"]["state"] = {}
    checkpoint.save(tmp_path / "checkpoint.pth", saved)
    train(data, tmp_path, *FULL)
    assert (differing(whole, tmp_path) == []) == (part == "rng-free")


def test_resume_with_other_flags_is_refused_and_lists_them(data, whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    with pytest.raises(UserError, match=r"--lr was 0.05, is 0.01; --tau was 0.07, is 0.1.*--overwrite"):
        train(data, out, *FULL, "--lr", "0.01", "--tau", "0.1")
    before = rows(out)
    train(data, out, *FULL, "--log-every", "2")  # a runtime flag; and the run is complete
    assert rows(out) == before


def test_foreign_and_truncated_checkpoints_are_refused(data, whole, tmp_path):
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(1)}}, foreign)
    with pytest.raises(UserError, match="not a checkpoint of this workspace's runs"):
        train(data, tmp_path / "a", "--resume", str(foreign))
    cut = tmp_path / "cut.pth"
    cut.write_bytes((whole / "checkpoint.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{cut}: not a readable checkpoint"):
        train(data, tmp_path / "b", "--resume", str(cut))
    with pytest.raises(UserError, match="no such checkpoint file"):
        train(data, tmp_path / "c", "--resume", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="the weights do not fit ResNet: .*missing"):
        train(data, tmp_path / "d", "--init", str(foreign))


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mdp.main_pretrain.learning_rate", lambda args, step, n: 0.05 if step < 3 else float("inf"))
        with pytest.raises(Diverged, match=r"step 4: the loss is nan; try a lower learning rate"):
            train(data, tmp_path, "--save-every", "1", "--mix", "none")
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert saved["progress"]["step"] <= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-root {tmp}/nowhere", r"data root .*nowhere does not exist"),
        ("--datasets voc,nosuch", r"unknown data set 'nosuch'; choose from voc"),
        ("--datasets voc,voc", r"one is named twice"),
        ("--bank-size 100", r"--bank-size 100 does not divide by the global batch of 8; take --bank-size 96"),
        ("--batch-size 1 --bank-size 64", r"at least 2 images a process"),
        ("--batch-size 4096 --bank-size 4096", r"--batch-size 4096: the data has 48 images"),
        ("--bank-type none --csc none", r"--mix both is defined for prototypes only; add --mix none"),
        ("--objective union-ce --mix none", r"--csc pull is defined for prototypes only; add --csc none"),
        ("--tau 0", r"--tau, --lr and --mix-beta must be above 0"),
        ("--epochs 0", r"--epochs 0: must be at least 1"),
        ("--output-dir /dev/null/x", r"/dev/null/x: cannot write here"),
    ],
)
def test_bad_flags_are_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(data, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_breaks_later_is_one_line_too(workers, data, tmp_path):
    """The preflight reads a few files only; the others are named when a worker meets them."""
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    image = sorted((broken / "ade/ADEChallengeData2016/images/training").iterdir())[1]
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=f"^{image}: not a readable image") as error:
        train(broken, tmp_path / "out", "--workers", workers)
    assert "\n" not in str(error.value)


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path, python):
    command = [python, "-m", "mdp.main_pretrain", "--data-root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data root") and done.stderr.count("\n") == 1


def test_two_processes_equal_one(data, tmp_path, python):
    flags = [*SMALL, "--data-root", str(data), "--mix", "none", "--lr", "0.005"]
    train(data, tmp_path / "one", "--mix", "none", "--lr", "0.005")
    command = [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mdp.main_pretrain",
    ]
    done = subprocess.run(
        [*command, *flags, "--output-dir", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = checkpoint.load(tmp_path / "one/checkpoint.pth"), checkpoint.load(tmp_path / "two/checkpoint.pth")
    assert two["progress"]["world"] == 2 and len(two["rng"]) == 2
    assert torch.equal(one["bank"]["bank_label"], two["bank"]["bank_label"])
    assert int((one["bank"]["bank_label"] >= 0).sum()) > 48
    for key in ("bank_feat", "proto", "class_sum"):
        torch.testing.assert_close(one["bank"][key], two["bank"][key], rtol=0, atol=2e-4)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][key], rtol=0, atol=2e-3)


def test_momentum_update():
    encoder = Encoder("resnet18", "aspp", 8, 4, 8, (1, 2))
    for m in (0.0, 1.0, 0.9):
        model = MDP(encoder, PrototypeBank(3, 8, 4), moco_m=m)
        before = [p.clone() for p in model.encoder_k.parameters()]
        for p in model.encoder_q.parameters():
            p.data.add_(1.0)
        model.update_key_encoder()
        for old, k, q in zip(before, model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
            torch.testing.assert_close(k, m * old + (1 - m) * q, rtol=1e-5, atol=1e-6)
            assert not k.requires_grad and k.grad is None


def test_learning_rate_warms_up_and_falls_to_zero():
    class Args:
        lr, epochs, warmup_epochs = 0.03, 10, 1

    values = [learning_rate(Args, step, 20) for step in range(200)]  # type: ignore[arg-type]
    assert values[0] == pytest.approx(0.03 / 20) and values[19] == pytest.approx(0.03) == max(values)
    assert values[110] == pytest.approx(0.015) and values[-1] < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: bf16 and fused SGD on the device")
def test_on_a_gpu(data, tmp_path):
    log = train(data, tmp_path, "--device", "cuda", "--epochs", "3")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["amp"] == "bf16" and log[-1]["loss"] < log[1]["loss"]
