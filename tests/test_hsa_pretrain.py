"""The pretraining script of hsa: arms, what a step does, exact resume, two processes, bad input."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hsa import arch, losses, main_knn
from hsa.builder import CsMl
from hsa.data import training_images
from hsa.main_moco import forwards, get_parser, initial_loss, learning_rate, main
from shared_utils import UserError, augment, checkpoint
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing, tensors

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--img_size 16 --arch resnet10 --width 4 --stem cifar_pool --moco_dim 16 --moco_k 24 --batch_size 8 --bn_splits 2 "
    "--moco_m 0.9 --init_lr 0.05 --clus_pos_num 3 --cluster_freq 2 --warmup_epochs 1 --workers 0 --threads 1 "
    "--log-every 1 --end_epoch 1 --cache"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes of eight noisy images: three steps an epoch."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        noise = rng.integers(0, 120, (20, 20, 3)) + 60 * np.eye(3, dtype=np.int64)[i // 8]
        path = root / "train" / f"class{i // 8}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.astype(np.uint8)).save(path)
    return root


def train(data: Path, out: Path, *extra: str) -> list[dict]:
    """Run in this process; the rows of the log."""
    assert main([*SMALL, "--data_dir", str(data), "--output-dir", str(out), *extra]) == 0
    return rows(out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "ways"),
    [
        ("", 2),
        ("--mode moco", 1),
        ("--mode moco --inter_weight 1", 1),
        ("--mix none --feature_dir {tmp}/feats", 2),
        ("--feature_dir auto", 2),
        ("--neighbours random --aug_plus false", 2),
        ("--neighbours label --decay_method step --schedule 1 --amp bf16", 2),
        ("--mode paper --crops 2 --img_size 32", 2),
        ("--mode paper --crops 0 --inter_head stage --inter_weight 0.5", 2),
    ],
)
def test_every_arm_trains(arm, ways, data, tmp_path):
    log = train(data, tmp_path, *arm.format(tmp=tmp_path).split())
    assert (tmp_path / "feats/neighbours.npy").exists() == ("feats" in arm)
    assert (tmp_path / "neighbours.npy").exists() == ("auto" in arm) and not (Path("auto")).exists()
    assert len(log) == 3 and log[0].keys() >= {"step", "epoch", "loss", "lr", "data_wait", "acc1"}
    state = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    assert {"module.queue", "module.queue_ptr", "module.encoder_q.fc.2.weight"} <= set(state)
    assert ("module.queue_l3" in state) == ("inter" in arm or "paper" in arm) == ("loss/level3" in log[0])
    assert ("sim/neighbour" in log[0]) == (ways == 2)
    assert ("neighbours" in checkpoint.load(tmp_path / "checkpoint.pth")) == (ways == 2)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["moco_t"] == 0.2 and config["versions"]["torch"]
    assert config["flags"]["mix"] == ("none" if "moco" in arm or "none" in arm else "cutmix")


def test_without_weight_level_3_is_the_single_level_model_to_the_bit(data, tmp_path):
    train(data, tmp_path / "one", "--end_epoch", "2")
    train(data, tmp_path / "none", "--end_epoch", "2", "--mode", "paper", "--crops", "0", "--inter_weight", "0")
    assert differing(tmp_path / "one", tmp_path / "none") == []
    train(data, tmp_path / "some", "--end_epoch", "2", "--mode", "paper", "--crops", "0", "--inter_weight", "0.1")
    one, some = (tensors(tmp_path / name) for name in ("one", "some"))
    assert not torch.equal(one["/state_dict/module.queue"], some["/state_dict/module.queue"])


def test_telemetry_and_pictures(data, tmp_path):
    log = train(data, tmp_path, "--image_every", "2", "--inter_weight", "1")
    names = {"feat/std", "sim/positive", "sim/negative", "sim/neighbour"}
    names |= {"loss/query", "loss/neighbour", "loss/mix", "loss/level3", "loss/level4", "neighbours/purity"}
    assert log[-1].keys() >= names | {"acc1", "acc5"}
    for row in log:
        parts = [row[f"loss/{name}"] for name in ("query", "neighbour", "mix")]
        assert sum(parts) / 3 == pytest.approx(row["loss/level4"], abs=1e-4)
        assert row["loss/level4"] + row["loss/level3"] == pytest.approx(row["loss"], abs=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= names | {"loss/total", "train/acc1", "train/acc5", "train/lr"}
    assert events.Tags()["images"] == ["views/query_key_add_posq_add_posk_mix"]
    assert len(events.Images("views/query_key_add_posq_add_posk_mix")) == 2
    picture = events.Images("views/query_key_add_posq_add_posk_mix")[0]
    assert (picture.height, picture.width) == (5 * 18 + 2, 8 * 18 + 2)


def test_telemetry_is_taken_at_log_steps_only(data, tmp_path, monkeypatch):
    calls = []
    rank = losses.positive_rank

    def counted(*args):
        calls.append(1)
        return rank(*args)

    monkeypatch.setattr(losses, "positive_rank", counted)
    train(data, tmp_path, "--end_epoch", "2", "--log-every", "3")
    assert len(calls) == 3  # steps 1, 3 and 6


def test_defaults_are_the_release_s():
    args = get_parser().parse_args([])
    expected = {
        "moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.2, "init_lr": 0.03, "momentum": 0.9, "wd": 1e-4,
        "batch_size": 256, "end_epoch": 200, "schedule": [120, 160], "lr_decay": 0.1, "lam": [0.5, 0.5],
        "clus_pos_num": 5, "cluster_freq": 5, "alpha": 2.0, "decay_method": "cos", "aug_plus": True, "arch": "resnet50",
        "warmup_epochs": 11, "mode": "release", "width": 64, "stem": "imagenet",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert learning_rate(args, 0) == 0.03 and learning_rate(args, 100) == pytest.approx(0.015)
    steps = get_parser().parse_args(["--decay_method", "step"])
    assert [learning_rate(steps, e) for e in (119, 120, 160)] == pytest.approx([0.03, 0.003, 0.0003])
    assert forwards(get_parser().parse_args(["--mode", "moco"])) == 4
    args.mix = "cutmix"
    assert forwards(args) == 11


@pytest.mark.parametrize("k", [512, 65536])
def test_expected_initial_loss(k):
    generator = torch.Generator().manual_seed(0)
    z, queue = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (32, k))
    found = float(losses.info_nce(z, z[:, None], queue.T, 0.2).mean())
    assert initial_loss(k, 128, 0.2) == pytest.approx(found, abs=0.01)


# --- what a step does ------------------------------------------------------------------------------------------------


class Spy:
    """Copies of the model's state after every step, of the keys, and of the weights of the loss."""

    def __init__(self, monkeypatch):
        self.states: list[dict] = []
        self.keys: list[torch.Tensor] = []
        self.weights: list[tuple] = []
        save, embed, weigh = Run.save, CsMl.embed_keys, losses.group_weights

        def saving(run):
            self.states.append(copy.deepcopy(run._tracked["state_dict"].state_dict()))
            save(run)

        def embedding(model, *args):
            out = embed(model, *args)
            self.keys.append(out[0].clone())
            return out

        def weighing(lam, mu, *args):
            self.weights.append((tuple(lam), mu))
            return weigh(lam, mu, *args)

        monkeypatch.setattr(Run, "save", saving)
        monkeypatch.setattr(CsMl, "embed_keys", embedding)
        monkeypatch.setattr(losses, "group_weights", weighing)


def test_a_step_in_the_order_of_the_release(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(data, tmp_path, "--end_epoch", "3", "--save-every", "1")
    # saved after each step, and after each epoch once more
    steps = [state for i, state in enumerate(spy.states) if i % 4 != 3]
    assert len(steps) == 9 and len(spy.keys) == 18
    for before, after in zip(steps, steps[1:]):
        for name, value in after.items():
            kind = name.split(".")[-1]
            if "encoder_k" in name and kind in ("weight", "bias"):  # the query weights before this step's update
                old_q = before[name.replace("encoder_k", "encoder_q")]
                torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * old_q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(before["module.encoder_q.conv1.weight"], after["module.encoder_q.conv1.weight"])
    # three query passes and two key passes a step, each with statistics of its own; no pass in eval mode is counted
    assert int(steps[-1]["module.encoder_q.bn1.num_batches_tracked"]) == 27
    assert int(steps[-1]["module.encoder_k.bn1.num_batches_tracked"]) == 18
    # the queue of 24: the last three batches of k_q (the first key of each step), the pointer back at its start
    anchors, near = spy.keys[0::2], spy.keys[1::2]
    assert torch.equal(steps[-1]["module.queue"], torch.cat(anchors[-3:]).T)
    assert int(steps[-1]["module.queue_ptr"]) == 0 and int(steps[3]["module.queue_ptr"]) == 8
    assert all((steps[-1]["module.queue"].T @ key.T < 1 - 1e-6).all() for key in near[-3:])
    # cross terms from epoch 1 on, CutMix from the start, a ratio for each of the two shares
    assert [lam for lam, _ in spy.weights] == [(1.0, 0.0)] * 3 + [(0.5, 0.5)] * 6
    mus = torch.stack([mu for _, mu in spy.weights])
    assert mus.shape == (9, 8) and len(mus[:, ::4].unique()) > 9 and ((mus >= 0) & (mus <= 1)).all()


def test_neighbours_are_those_of_the_momentum_encoder_at_the_refresh(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(data, tmp_path, *"--end_epoch 2 --cluster_freq 1 --init_lr 0.5 --aug_backend pil".split())
    images = training_images(data, transform=augment.plain(16, "pil"))
    found = {}
    for which in ("k", "q"):
        encoder = arch.build("resnet10", 4, "cifar_pool")
        prefix = f"module.encoder_{which}."
        encoder.load_state_dict(
            {k[len(prefix) :]: v for k, v in spy.states[0].items() if k.startswith(prefix) and ".fc." not in k}
        )
        with torch.no_grad():
            feats = F.normalize(encoder.eval()(torch.stack([images[i][0] for i in range(24)]), pre_out=True), dim=1)
        sim = (feats @ feats.T).fill_diagonal_(-1)
        found[which] = sim.topk(3).indices
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["neighbours"]
    assert saved["epoch"] == 1 and torch.equal(saved["index"], found["k"])
    assert not torch.equal(saved["index"], found["q"])


def relabelled(data: Path, root: Path, sizes: tuple[int, ...]) -> Path:
    """The images of `data` in the same order, in classes of other sizes."""
    files = sorted((data / "train").rglob("*.png"))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    for i, file in enumerate(files):
        folder = root / "train" / f"class{next(c for c, end in enumerate(ends) if i < end)}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    return root


def test_labels_have_no_influence(data, tmp_path):
    """Other classes of the same images in the same order: the same neighbours and the same training, to the bit."""
    flags = ["--end_epoch", "2", "--cluster_freq", "1"]
    own = train(data, tmp_path / "own", *flags)
    other = train(relabelled(data, tmp_path / "data", (2, 17, 5)), tmp_path / "other", *flags)
    assert differing(tmp_path / "own", tmp_path / "other") == []
    assert "/neighbours/index" in tensors(tmp_path / "own")
    assert [r["loss"] for r in own] == [r["loss"] for r in other]
    assert own[-1]["neighbours/purity"] != other[-1]["neighbours/purity"]  # the number that labels are for
    label = ["--neighbours", "label"]  # the arm that looks at them
    train(data, tmp_path / "a", *label)
    train(tmp_path / "data", tmp_path / "b", *label)
    assert "/neighbours/index" in differing(tmp_path / "a", tmp_path / "b")


def test_neighbours_are_renewed_exactly_when_due(data, tmp_path, capsys):
    train(data, tmp_path, "--end_epoch", "7", "--cluster_freq", "3")
    assert re.findall(r"epoch (\d+): neighbours \(knn\)", capsys.readouterr().out) == ["0", "3", "6"]


# --- resume ----------------------------------------------------------------------------------------------------------


def stop_at(step: int, how, monkeypatch) -> None:
    """Let `how()` happen inside the step with this number."""
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            how()

    monkeypatch.setattr(Run, "log", patched)


FULL = ["--end_epoch", "4", "--save-every", "2", "--inter_weight", "0.5"]  # refreshes at epochs 0 and 2


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Four epochs (twelve steps) without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train(data, out, *FULL)
    return out


@pytest.mark.parametrize("step", [4, 5, 7])  # inside and at the end of epoch 1, inside epoch 2 that refreshed
def test_terminated_and_resumed_is_bit_identical(step, data, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit) as stopped:
            train(data, tmp_path, *FULL)
    assert stopped.value.code == 143
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == step + 1
    capsys.readouterr()
    log = train(data, tmp_path, *FULL, "--workers", "2")  # more workers change nothing
    assert len(re.findall("renewed in", capsys.readouterr().out)) == (0 if step == 7 else 1)
    assert differing(whole, tmp_path) == []
    keys = ("step", "loss", "lr", "acc1", "neighbours/purity")
    assert [[r[k] for k in keys] for r in log] == [[r[k] for k in keys] for r in rows(whole)]


def test_augmented_in_batches_a_run_resumes_bit_identical(data, whole, tmp_path, monkeypatch):
    """Views, neighbours' draws and small crops are of the sample, whatever the workers."""
    flags = [*FULL[:4], *"--mode paper --crops 2 --img_size 32 --crop_size 16 --aug_backend batch".split()]
    log = train(data, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            train(data, tmp_path / "cut", *flags)
    assert train(data, tmp_path / "cut", *flags, "--workers", "2")[-1]["loss"] == log[-1]["loss"]
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_a_checkpoint_from_before_the_flag_is_one_of_pil(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "old")
    saved = checkpoint.load(tmp_path / "old/checkpoint.pth")
    del saved["args"]["aug_backend"]
    checkpoint.save(tmp_path / "old/checkpoint.pth", saved)
    with pytest.raises(UserError, match="--aug-backend was pil, is batch"):
        train(data, tmp_path / "old", *FULL, "--aug_backend", "batch")
    train(data, tmp_path / "old", *FULL, "--aug_backend", "pil")
    assert differing(whole, tmp_path / "old") == []


def test_killed_between_checkpoints_and_resumed_is_bit_identical(data, whole, tmp_path, python):
    script = (
        "import os, signal; from shared_utils.run import Run, cli; from hsa.main_moco import main; log = Run.log\n"
        "def patched(self, *a, **k):\n    log(self, *a, **k)\n"
        "    self.step == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.log = patched; cli(main)"
    )
    command = [python, "-c", script, *SMALL, "--data_dir", str(data), "--output-dir", str(tmp_path), *FULL]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 4
    train(data, tmp_path, *FULL)
    assert differing(whole, tmp_path) == []
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize("part", ["nothing", "neighbours", "queue", "optimizer"])
def test_a_checkpoint_without_a_part_would_not_be_identical(part, data, whole, tmp_path, monkeypatch):
    """The negative test: lose the neighbours, the pointer of the queue or the momentum and the end differs."""
    with monkeypatch.context() as patch:
        stop_at(7, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            train(data, tmp_path, *FULL)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    if part == "neighbours":
        saved["neighbours"]["index"].add_(1).remainder_(24)
    elif part == "queue":
        saved["state_dict"]["module.queue_ptr"].add_(8).remainder_(24)
    elif part == "optimizer":
        saved["optimizer"]["state"] = {}
    checkpoint.save(tmp_path / "checkpoint.pth", saved)
    train(data, tmp_path, *FULL)
    assert (differing(whole, tmp_path) == []) == (part == "nothing")


def test_resume_with_other_flags_or_images_is_refused(data, whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    with pytest.raises(UserError, match=r"--init-lr was 0.05, is 0.01; --moco-t was 0.2, is 0.1.*--overwrite"):
        train(data, out, *FULL, "--init_lr", "0.01", "--moco_t", "0.1")
    before = rows(out)
    train(data, out, *FULL, "--log-every", "2")  # a runtime flag; and the run is complete
    assert rows(out) == before
    images = tmp_path / "images"
    shutil.copytree(data, images)
    (images / "train/class0/00.png").rename(images / "train/class0/0a.png")
    saved = checkpoint.load(out / "checkpoint.pth")
    saved["args"]["data_dir"] = str(images)
    checkpoint.save(out / "checkpoint.pth", saved)
    with pytest.raises(UserError, match="saved on other data"):
        train(images, out, *FULL)
    del saved["data"]  # as in an older file
    checkpoint.save(out / "checkpoint.pth", saved)
    with pytest.raises(UserError, match="neighbours are of other images, or of another order"):
        train(images, out, *FULL)


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr("hsa.main_moco.learning_rate", lambda args, epoch: 0.05 if epoch < 1 else float("inf"))
    with pytest.raises(Diverged, match=r"step \d: the loss is nan"):
        train(data, tmp_path, "--end_epoch", "3")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 3


# --- processes and bad input -----------------------------------------------------------------------------------------


def test_two_processes_of_two_splits_equal_one_with_four(data, tmp_path, python):
    """Of 25 images one process has a row of features more than the other."""
    images = tmp_path / "images"
    shutil.copytree(data, images)
    extra = Image.fromarray(np.random.default_rng(1).integers(0, 255, (20, 20, 3)).astype(np.uint8))
    extra.save(images / "train/class2/99.png")
    flags = [*SMALL, "--data_dir", str(images), "--init_lr", "0.002", "--mode", "paper", "--crops", "1"]
    # Crops of 32 pixels: of 14, the last maps have one pixel, and batch norm over two values makes 1e-7 to 1e-3.
    flags += ["--img_size", "32", "--crop_size", "32", "--end_epoch", "2"]
    assert main([*flags, "--bn_splits", "4", "--output-dir", str(tmp_path / "one")]) == 0
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "hsa.main_moco", *flags, "--bn_splits", "2", "--output-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    assert two["progress"]["world"] == 2 and len(two["rng"]) == 2
    assert torch.equal(one["neighbours"]["index"], two["neighbours"]["index"])
    assert one["neighbours"]["index"].shape == (25, 3)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for key, value in one["state_dict"].items():
        # batch-norm buffers are those of the first process there, and the mean over the splits here
        if "running" not in key:
            torch.testing.assert_close(value, two["state_dict"][key], rtol=0, atol=1e-4)
    assert int(two["state_dict"]["module.queue_ptr"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", r"nowhere/train: no such folder; expected .*train/CLASS"),
        ("--moco_k 100", r"--moco_k 100 does not divide by the global batch of 8; take --moco_k 96"),
        ("--batch_size 9", r"--batch_size 9 does not divide over 1 processes x 2 --bn_splits"),
        ("--batch_size 8 --bn_splits 8", r"at least 2 images a share"),
        (
            "--batch_size 4096 --moco_k 4096",
            r"^--batch_size 4096: a step takes 4096 images, the data has 24; give --batch_size 16 or",
        ),
        ("--clus_pos_num 24", r"--clus_pos_num 24 needs more than 24 images, the data has 24"),
        ("--per_class 1", r"needs more than 3 images, the data has 3"),
        ("--lam 0.5,0.6", r"--lam \[0.5, 0.6\]: must be two weights that sum to 1"),
        ("--mode moco --mix cutmix", r"--mode moco has no neighbours and no mixing; leave --mix cutmix away"),
        ("--mode moco --neighbours random --crops 2", r"leave --neighbours, --crops away"),
        ("--moco_t 0", r"--moco_t, --init_lr and --alpha must be above 0"),
        ("--moco_m 1.5", r"--moco_m must lie in 0..1"),
        ("--end_epoch -1", r"--end_epoch -1: must not be negative"),
        ("--inter_weight -1", r"--inter_weight -1: must not be negative"),
        ("--output-dir /dev/null/x", r"/dev/null/x: cannot write here"),
    ],
)
def test_bad_flags_are_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(data, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_class_and_a_broken_file_are_named(data, tmp_path):
    images = tmp_path / "data"
    shutil.copytree(data, images)
    (images / "train/empty").mkdir()
    with pytest.raises(UserError, match="empty: no image"):
        train(images, tmp_path / "out")
    (images / "train/empty").rmdir()
    broken = images / "train/class1/09.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=f"^{broken}: not a readable image") as error:
        train(images, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_command_line_on_mini_data_and_without_data(tmp_path, python):
    command = [python, "-m", "hsa.main_moco", *SMALL, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--data_dir", str(mini.ensure("images")), "--per-class", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("40 images of 10 classes", "expected initial loss", "estimated time"):
        assert line in done.stdout
    (command,) = re.findall("evaluate: python -m (.*)", done.stdout)  # as it is printed, for this run's network
    module, *flags = shlex.split(command)
    assert module == "hsa.main_knn"
    assert main_knn.main([*flags, "--output-dir", str(tmp_path / "knn"), "--workers", "0", "--threads", "1"]) == 0
    result = json.loads((tmp_path / "knn/result.json").read_text())
    assert 0 <= result["knn"] <= 100 and result["pretrained"] == str(tmp_path / "out/checkpoint.pth")
    command = [python, "-m", "hsa.main_moco", "--data_dir", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere/train: no such folder") and done.stderr.count("\n") == 1
