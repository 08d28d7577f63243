"""The pretraining script of sage: arms, what an update does, exact resume, two processes, bad input."""

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
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from sage import arch
from sage.builder import SaGe
from sage.data import Views, drawn, training_images
from sage.gallery import Gallery
from sage.lars import LARS
from sage.schedule import learning_rate, target_momentum
from sage.train import get_parser, main
from shared_utils import UserError, checkpoint, feed
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--img_size 16 --arch resnet10 --width 4 --stem cifar_pool --hid_channels 16 --out_channels 8 --imgs_per_gpu 4 "
    "--update_interval 2 --base_momentum 0.9 --lr 1 --warmup_iters 1 --decoder_lr 1e-3 --workers 0 --threads 1 "
    "--log-every 1 --total_epochs 1 --cache --gallery 2 --stages 3"
).split()
RANDOM = ["--evaluator", "random"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes of eight noisy images: three updates of two micro-batches of four an epoch."""
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
    ("arm", "terms"),
    [
        ("--mode byol", set()),
        ("--mode byol --update_interval 1 --amp bf16 --lars_release_groups", set()),
        ("--mode pixel", {"loss_mse"}),
        ("--evaluator random", {"loss_mse", "loss_f1", "loss_f7", "loss_f14", "loss_f28"}),
        ("--evaluator random --evaluator_bn batch --w_pix 0 --w_f7 0 --w_f14 0 --w_f28 0", {"loss_f1"}),
        ("--evaluator random --gen_target other --stem_bn sync --evaluator_norm imagenet --w_f1 0 --w_f7 0",
         {"loss_mse", "loss_f14", "loss_f28"}),
        ("--mode pixel --gen_target clean --decoder_lr_policy cosine --img_size 20", {"loss_mse"}),
    ],
)  # fmt: skip
def test_every_arm_trains(arm, terms, data, tmp_path):
    log = train(data, tmp_path, *arm.split())
    assert len(log) == (6 if "interval 1" in arm else 3)
    # the release's scalar names
    assert {k for k in log[0] if k.startswith("loss_")} == terms
    assert log[0].keys() >= {"step", "epoch", "loss", "loss1", "lr", "feat/std", "train/loss", "target_momentum"}
    assert log[0]["loss"] == pytest.approx(log[0]["loss1"] + sum(log[0][term] for term in terms), abs=1e-4)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    heads = {".".join(key.split(".")[: 2 if key[0] in "oth" else 1]) for key in saved["state_dict"]}
    expected = {"online_net.0", "online_net.1", "target_net.0", "target_net.1", "head.predictor"}
    expected |= {"decoder"} if terms else set()
    assert heads == expected | ({"r_function"} if "evaluator" in arm else set())
    assert ("optimizer_decoder" in saved) == ("gallery" in saved) == bool(terms)
    config = json.loads((tmp_path / "config.json").read_text())["flags"]
    assert config["momentum"] == 0.9 and config["w_pix"] == (0.1 if "loss_mse" in terms else 0.0)


def test_defaults_are_the_release_s():
    args = get_parser().parse_args([])
    expected = {
        "arch": "resnet50", "width": 64, "stem": "imagenet", "img_size": 224, "hid_channels": 4096, "out_channels": 256,
        "imgs_per_gpu": 64, "update_interval": 2, "total_epochs": 300, "base_momentum": 0.99, "lr": 4.8,
        "momentum": 0.9, "weight_decay": 1e-6, "eta": 0.001, "warmup_iters": 10, "warmup_ratio": 1e-4,
        "decoder_lr": 0.048, "decoder_lr_policy": "const", "gen_target": "self", "evaluator_bn": "frozen",
        "mode": "sage", "seed": 0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_an_evaluator_of_another_run(data, tmp_path, capsys):
    train(data, tmp_path / "byol", "--mode", "byol", "--hid_channels", "24", "--width", "8")
    file = tmp_path / "byol/checkpoint.pth"
    (again,) = re.findall("train SaGe with it: python -m sage.train (.*)", capsys.readouterr().out)
    asked = get_parser().parse_args(shlex.split(again))
    assert (asked.mode, asked.evaluator, asked.width, asked.w_f1) == ("sage", str(file), 8, None)
    assert asked.output_dir != tmp_path / "byol"
    train(data, tmp_path / "sage", "--evaluator", str(file), "--total_epochs", "2")  # its own, other widths
    byol, sage = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("byol", "sage"))
    frozen = {k.removeprefix("r_function."): v for k, v in sage.items() if k.startswith("r_function.")}
    assert len(frozen) > 50 and all(torch.equal(v, byol[f"online_net.{k}"]) for k, v in frozen.items())
    flags = json.loads((tmp_path / "sage/config.json").read_text())["flags"]
    assert len(flags["evaluator_sha256"]) == 16
    saved = checkpoint.load(file)
    del saved["state_dict"]["online_net.1.fc1.bias"]
    checkpoint.save(file, saved)
    with pytest.raises(UserError, match=r"--evaluator .*: the weights do not fit Evaluator: 1 missing \(1.fc1.bias\)"):
        train(data, tmp_path / "other", "--evaluator", str(file))


# --- an update -------------------------------------------------------------------------------------------------------


class Spy:
    """State after every update, gradients that an optimiser saw, rates and momenta."""

    def __init__(self, monkeypatch):
        self.states: list[dict] = []
        self.rates: list[float] = []
        self.momenta: list[float] = []
        self.partition: list[set[int]] = []
        self.model: SaGe | None = None
        lars, adam, ema = LARS.step, torch.optim.Adam.step, SaGe.momentum_update

        def stepped(optimizer, *args):
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.partition.append({id(p) for g in optimizer.param_groups for p in g["params"]})
            return (lars if isinstance(optimizer, LARS) else adam)(optimizer, *args)

        def updated(model, m):
            self.momenta.append(m)
            self.model = model
            before = {k: v.clone() for k, v in model.state_dict().items()}
            ema(model, m)
            self.states.append({"before": before, "after": {k: v.clone() for k, v in model.state_dict().items()}})

        monkeypatch.setattr(LARS, "step", stepped)
        monkeypatch.setattr(torch.optim.Adam, "step", stepped)
        monkeypatch.setattr(SaGe, "momentum_update", updated)


def test_an_update_in_the_order_of_the_release(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(data, tmp_path, *RANDOM, "--total_epochs", "2")
    assert len(spy.momenta) == 6 and len(spy.rates) == 12  # six updates of two iterations, both optimisers each time
    at = [2 * u + 1 for u in range(6)]  # the iterations that update
    assert spy.momenta == [target_momentum(0.9, k, 12) for k in at]
    assert spy.rates[0::2] == [learning_rate(1.0, k, 6, 2, 1) for k in at]
    assert spy.rates[1::2] == [learning_rate(1e-3, k, 6, 2, 1, policy="const") for k in at]
    lars, adam = spy.partition[0], spy.partition[1]
    names = {id(p): name for name, p in spy.model.named_parameters()}
    assert {names[i].split(".")[0] for i in lars} == {"online_net", "head"} and not lars & adam
    assert {names[i].split(".")[0] for i in adam} == {"decoder"}
    assert {name for i, name in names.items() if i not in lars | adam} == {
        name for name, p in spy.model.named_parameters() if not p.requires_grad
    }
    assert {name.split(".")[0] for i, name in names.items() if i not in lars | adam} == {"target_net", "r_function"}
    for state, m in zip(spy.states, spy.momenta):  # after the update, of the new weights
        for key, new in state["after"].items():
            if key.startswith("target_net") and not key.endswith(
                ("running_mean", "running_var", "num_batches_tracked")
            ):
                online = state["before"][key.replace("target_net", "online_net")]
                torch.testing.assert_close(new, m * state["before"][key] + (1 - m) * online)
    first, last = spy.states[0]["after"], spy.states[-1]["after"]
    for part in ("online_net.0.conv1.weight", "head.predictor.fc1.weight", "decoder.final.bias"):
        assert not torch.equal(first[part], last[part])
    assert all(torch.equal(v, last[k]) for k, v in first.items() if k.startswith("r_function"))
    assert int(last["online_net.0.bn1.num_batches_tracked"]) == 6 * 2 * 2  # updates, micro-batches, views


def test_accumulated_gradients_are_the_mean_of_the_micro_batches(data, tmp_path, monkeypatch):
    """One update of two micro-batches, by hand."""
    seen: dict = {}
    forward, step = SaGe.forward, LARS.step

    def noted(model, x1, x2, targets=None):
        if "start" not in seen:
            seen["start"] = copy.deepcopy(model)
        seen.setdefault("views", []).append((x1.clone(), x2.clone()))
        return forward(model, x1, x2, targets)

    def stepped(optimizer, *args):
        seen.setdefault("grads", [p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return step(optimizer, *args)

    monkeypatch.setattr(SaGe, "forward", noted)
    monkeypatch.setattr(LARS, "step", stepped)
    train(data, tmp_path, "--mode", "pixel")
    model = seen["start"]
    for x1, x2 in seen["views"][:2]:
        (torch.stack(list(forward(model, x1, x2)[0].values())).sum() / 2).backward()
    trained = [*model.online_net.parameters(), *model.head.parameters()]
    wanted = [p.grad for p in trained if p.dim() > 1] + [p.grad for p in trained if p.dim() == 1]
    assert len(wanted) == len(seen["grads"]) and all(torch.equal(a, b) for a, b in zip(wanted, seen["grads"]))


def test_pictures_of_what_was_recovered(data, tmp_path, monkeypatch):
    drawn = []
    picture = Gallery.picture

    def noted(gallery):
        drawn.append((len(gallery.stages), picture(gallery)))
        return drawn[-1][1]

    monkeypatch.setattr(Gallery, "picture", noted)
    train(data, tmp_path, "--mode", "pixel", "--total_epochs", "2")
    assert [count for count, _ in drawn] == [1, 2, 3]
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["gallery"]["stages"]
    assert [stage["step"] for stage in saved] == [1, 3, 6]  # successive stages: first, middle, last update
    for stage in saved:
        assert (
            stage["images"].shape == (4, 3, 16, 16)
            and stage["error"].shape == (4,)
            and stage["right"].dtype == torch.bool
        )
    assert drawn[-1][1].shape == (3, 4 * (64 + 18), 4 * (64 + 4))  # a row a view; input and three stages
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Images("recovered/input_and_stages")] == [1, 3, 6]
    assert {"train/loss1", "train/loss_mse", "train/loss", "train/lr"} <= set(events.Tags()["scalars"])


def test_the_gallery_s_error_is_that_of_the_picture_shown():
    torch.manual_seed(0)
    views = {name: torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8) for name in ("x1", "x2")}
    model = SaGe(arch.build("resnet10", 4, "cifar_pool"), 16, 8)
    model.add_generation(arch.decoder_for("resnet10", 4, "cifar_pool", 16), None, {"w_pix": 0.1}).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gallery = Gallery(views, 10, 5)
    assert gallery.inputs[2].equal(views["x1"][1]) and gallery.inputs[3].equal(views["x2"][1])
    assert sorted(gallery.when) == [1, 2, 5, 8, 10]
    gallery.add(model, torch.device("cpu"), 1)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    stage = gallery.stages[0]
    shown = stage["images"].float() / 127.5 - 1
    wanted = (shown - (gallery.inputs.float() / 127.5 - 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(stage["error"], wanted, rtol=0.02, atol=0.005)


# --- resume ----------------------------------------------------------------------------------------------------------


def stop_at(step: int, how, monkeypatch) -> None:
    """Let `how()` happen inside the update with this number."""
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            how()

    monkeypatch.setattr(Run, "log", patched)


FULL = [*RANDOM, "--evaluator_bn", "batch", "--total_epochs", "3", "--save-every", "2"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Three epochs (nine updates) without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train(data, out, *FULL)
    return out


def interrupt(step: int, data: Path, out: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit) as stopped:
            train(data, out, *FULL)
    assert stopped.value.code == 143
    assert checkpoint.load(out / "checkpoint.pth")["progress"]["step"] == step + 1


@pytest.mark.parametrize("step", [3, 5])  # inside epoch 1 and at its end
def test_terminated_and_resumed_is_bit_identical(step, data, whole, tmp_path, monkeypatch):
    interrupt(step, data, tmp_path, monkeypatch)
    log = train(data, tmp_path, *FULL, "--workers", "1")  # more workers change nothing
    assert differing(whole, tmp_path) == []
    keys = ("step", "loss", "lr", "loss1", "loss_f1", "target_momentum", "feat/std")
    assert [[r[k] for k in keys] for r in log] == [[r[k] for k in keys] for r in rows(whole)]


def test_killed_between_checkpoints_and_resumed_is_bit_identical(data, whole, tmp_path, python):
    script = (
        "import os, signal; from shared_utils.run import Run, cli; from sage.train import main; log = Run.log\n"
        "def patched(self, *a, **k):\n    log(self, *a, **k)\n"
        "    self.step == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.log = patched; cli(main)"
    )
    command = [python, "-c", script, *SMALL, "--data_dir", str(data), "--output-dir", str(tmp_path), *FULL]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 4
    train(data, tmp_path, *FULL)
    assert differing(whole, tmp_path) == []
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))


@pytest.mark.parametrize("part", ["nothing", "optimizer", "optimizer_decoder", "target", "evaluator"])
def test_a_checkpoint_without_a_part_would_not_be_identical(part, data, whole, tmp_path, monkeypatch):
    """The negative test: lose a momentum, Adam's moments (as the release does), the target or the evaluator's drift."""
    interrupt(4, data, tmp_path, monkeypatch)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    if part.startswith("optimizer"):
        saved[part]["state"] = {}
    elif part != "nothing":
        name = {"target": "target_net.0.conv1.weight", "evaluator": "r_function.0.bn1.running_mean"}[part]
        saved["state_dict"][name].add_(0.1)
    checkpoint.save(tmp_path / "checkpoint.pth", saved)
    train(data, tmp_path, *FULL)
    assert (differing(whole, tmp_path) == []) == (part == "nothing")


def test_resume_with_other_flags_is_refused(data, whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    with pytest.raises(UserError, match=r"--update-interval was 2, is 1; --w-f1 was 0.1, is 0.2.*--overwrite"):
        train(data, out, *FULL, "--w_f1", "0.2", "--update_interval", "1")
    before = rows(out)
    train(data, out, *FULL, "--log-every", "2")  # a runtime flag; and the run is complete
    assert rows(out) == before


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    rate = lambda args, k, per_epoch: (1.0 if k < per_epoch else float("inf"), 1e-3)  # noqa: E731
    monkeypatch.setattr("sage.train.learning_rates", rate)
    with pytest.raises(Diverged, match=r"step \d: the loss is nan"):
        train(data, tmp_path, "--mode", "byol", "--total_epochs", "3")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 3


# --- backends of the loader ------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_workers(data):
    images = training_images(data)
    for backend in ("pil", "batch"):
        made = []
        for workers in (0, 2):
            loader = DataLoader(
                feed.keyed(Views(images, 16, True), 3, backend),
                batch_sampler=[[(1, i) for i in rows] for rows in ((5, 2, 9), (0, 23, 7))],
                num_workers=workers,
                collate_fn=feed.Batched.collate_fn if backend == "batch" else None,
            )
            made.append(list(loader))
        for one, two in zip(*made, strict=True):
            assert list(one) == ["x1", "x2", "clean"]
            for name, views in one.items():
                assert views.dtype == torch.uint8 and views.shape == (3, 3, 16, 16) and views.equal(two[name])
            assert not one["x1"].equal(one["x2"])
        again = drawn(Views(images, 16, True), [2, 5], 3, backend)
        assert again["x1"].shape == (2, 3, 16, 16) and not again["x1"].equal(made[0][0]["x1"][[1, 0]])  # epoch 0
        clean = made[0][0]["clean"].float()
        expected = torch.stack([as_bytes(images, i, 16) for i in (5, 2, 9)]).float()
        assert (clean - expected).abs().max() <= (0 if backend == "pil" else 1)


def as_bytes(images, index, size):
    steps = T.Compose([T.Resize(size), T.CenterCrop(size), T.PILToTensor()])
    return steps(images.image(index))


def test_the_batch_of_the_device_is_that_of_the_cpu(data):
    """Images in one array, augmented there: equal but for the arithmetic of the resize and of hue."""
    views = Views(training_images(data, cache=True), 16)
    keys = [(2, i) for i in range(24)]
    images, source = views.images, feed.Source(views.images)
    there = feed.Source(images, torch.device("cpu"))
    assert there.on_device and not source.on_device
    one, two = (views.batch(feed.Batch(0, keys, s)) for s in (source, there))
    for name in one:
        assert two[name].dtype == torch.uint8
        off = (one[name].float() - two[name].float()).abs()
        assert off.mean() < 2 and (one[name].float().std() > 10)


def test_an_older_checkpoint_goes_on_with_pil(whole, data, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(whole, out)
    saved = checkpoint.load(out / "checkpoint.pth")
    assert saved["args"].pop("aug_backend") == "batch"
    checkpoint.save(out / "checkpoint.pth", saved)
    with pytest.raises(UserError, match="--aug-backend was pil, is batch"):
        train(data, out, *FULL)
    train(data, out, *FULL, "--aug_backend", "pil")


# --- processes and bad input -----------------------------------------------------------------------------------------


def test_two_processes_equal_one(data, tmp_path, python):
    """Losses, gradients and networks of one update; batch norm is over both processes.

    A second update would not agree so closely: what rounding leaves meets the kinks of ReLU and max pooling.
    """
    flags = [*SMALL, "--data_dir", str(data), *RANDOM]
    flags += "--stem_bn sync --img_size 32 --warmup_iters 0 --per_class 3".split()
    one = [*flags, "--imgs_per_gpu", "8", "--update_interval", "1", "--output-dir", str(tmp_path / "one")]
    assert main(one) == 0
    command = [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sage.train",
    ]
    command += [*flags, "--imgs_per_gpu", "4", "--update_interval", "1", "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    assert b["progress"]["world"] == 2 and len(b["rng"]) == 2
    for x, y in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in ("loss", "loss1", "loss_mse", "loss_f1", "loss_f28"):
            assert x[key] == pytest.approx(y[key], rel=1e-4)
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(value, b["state_dict"][key], rtol=1e-2, atol=3e-3)
    for name, moment in (("optimizer", "momentum_buffer"), ("optimizer_decoder", "exp_avg")):  # gradients
        for number, state in a[name]["state"].items():
            own, other = state[moment], b[name]["state"][number][moment]
            assert (own - other).norm() < 1e-3 * own.norm() + 1e-5, (name, number)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere --mode byol", r"nowhere/train: no such folder; expected .*train/CLASS"),
        ("", r"the terms of the evaluator need --evaluator CHECKPOINT \(bash sage/run_evaluator.sh trains one\)"),
        ("--evaluator {tmp}/none.pth", r"none.pth: no such checkpoint file"),
        ("--mode byol --evaluator random", r"--evaluator random: no term of the loss uses it"),
        ("--mode byol --imgs_per_gpu 1", r"at least 2 images a process"),
        (
            "--mode byol --imgs_per_gpu 64",
            r"^--imgs_per_gpu 64: a step takes 128 images, the data has 24; give --imgs_per_gpu 8 or",
        ),
        ("--mode pixel --img_size 8", r"--img_size 8: resnet10 with stem cifar_pool halves the side 4 times, give 16"),
        ("--mode pixel --decoder_width 20", r"--decoder_width 20: must be a multiple of 16"),
        ("--mode byol --base_momentum 1.5", r"--base_momentum must lie in 0..1"),
        ("--mode byol --total_epochs -1", r"--total_epochs -1: must not be negative"),
        ("--mode pixel --w_pix -1", r"--w_pix -1: must not be negative"),
        ("--mode byol --lr 0", r"--lr 0.0: must be above 0"),
        ("--mode byol --list_file {tmp}/none.txt", r"none.txt: no such file; expected a list"),
        ("--mode byol --output-dir /dev/null/x", r"/dev/null/x: cannot write here"),
    ],
)
def test_bad_flags_are_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(data, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_list_of_images(data, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"class0/{i:02d}.png\n" for i in range(8)))
    assert len(train(data, tmp_path / "out", "--mode", "byol", "--list_file", str(tmp_path / "list.txt"))) == 1
    (tmp_path / "list.txt").write_text("class0/99.png\n")
    with pytest.raises(UserError, match="99.png does not exist"):
        train(data, tmp_path / "bad", "--mode", "byol", "--list_file", str(tmp_path / "list.txt"))


def test_own_images_need_no_classes(data, tmp_path, capsys):
    (own := tmp_path / "my photos").mkdir()
    for i, path in enumerate(sorted(data.rglob("*.png"))):
        size = (20 + i % 3, 24)
        Image.open(path).resize(size).save(own / f"no {i:02d}{'.PNG' if i % 2 else '.jpg'}")
    log = train(own, tmp_path / "flat", "--mode", "byol")  # images of several sizes
    assert len(log) == 3
    told = capsys.readouterr().out
    assert f"{own}: 24 images" in told and "python -m sage.lab.export --pretrained" in told
    with pytest.raises(UserError, match="--per_class 2: the images of .* lie in no class folders"):
        train(own, tmp_path / "b", "--mode", "byol", "--per_class", "2")
    assert len(train(data / "train", tmp_path / "classes", "--mode", "byol")) == 3  # class folders without train/


def test_the_command_line_on_mini_data_and_without_an_evaluator(tmp_path, python):
    command = [python, "-m", "sage.train", *SMALL, "--data_dir", str(mini.ensure("images")), "--per-class", "4"]
    done = subprocess.run(
        [*command, *RANDOM, "--output-dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("40 images", "8 = 1 processes x 4 x 2 accumulated", "expected initial loss", "estimated time",
                 "0.1 x loss_f1", "python -m sage.main_knn"):  # fmt: skip
        assert line in done.stdout
    done = subprocess.run([*command, "--output-dir", str(tmp_path / "b")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the terms of the evaluator") and done.stderr.count("\n") == 1
