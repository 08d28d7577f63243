"""The training scripts of mra: arms and tasks, exact resume, two processes, bad input, occlusion, the picture."""

import argparse
import copy
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mra import (
    data,
    engine,
    eval_occlusion,
    main_fewshot,
    main_fixmatch,
    main_pretrain,
    main_supervised,
    nets,
    transforms,
    visualize,
)
from mra.models_mae import MAE, Size
from mra.mra import MRA
from shared_utils import UserError, checkpoint
from shared_utils.data import EpochSampler
from shared_utils.evaluation import ArrayImages
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing

ROOT = Path(__file__).resolve().parents[1]
COMMON = "--input_size 16 --workers 0 --threads 1 --log-every 1".split()
PRE = ["--model", "mae_tiny_patch4", *"--enc_dim 16 --enc_depth 2 --enc_heads 2 --dec_dim 8 --dec_heads 2".split()]
PRE += "--batch_size 8 --epochs 2 --warmup_epochs 1 --lr 0.003 --ckpt_freq 1".split()
SUP = "--arch resnet8 --width 4 --crop padded --batch_size 8 --epochs 2 --lr 0.05 --wd 5e-4".split()
FIX = "--arch resnet8 --width 4 --per_class 4 --batch_size 4 --mu 2 --iterations 6 --epoch_steps 3 --lr 0.05".split()
FIX += "--threshold 0.3 --ema 0.9".split()
FEW = "--arch resnet8 --width 4 --crop padded --batch_size 8 --epochs 1 --lr 0.05".split()
FEW += "--decay cos --n_way 2 --n_query 3 --episodes 20".split()
SCRIPTS = {"pretrain": main_pretrain, "supervised": main_supervised, "fixmatch": main_fixmatch, "fewshot": main_fewshot}
FLAGS = {"pretrain": PRE, "supervised": SUP, "fixmatch": FIX, "fewshot": FEW}


def draw(root: Path, split: str, names: list[str], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for y, name in enumerate(names):
        for i in range(count):
            noise = rng.integers(0, 120, (16, 16, 3)) + 100 * np.eye(3, dtype=np.int64)[y % 3]
            file = root / split / name / f"{i:02d}.png"
            mask = root / "masks" / split / name / f"{i:02d}.png"
            for path, array in ((file, noise.astype(np.uint8)), (mask, np.pad(np.full((8, 8), 255, np.uint8), 4))):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw(root, "train", ["a", "b", "c"], 8, 0)
    draw(root, "val", ["a", "b", "c"], 4, 1)
    return root


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("novel")
    for i, split in enumerate(("train", "val", "test")):
        draw(root, split, [f"{split}{c}" for c in range(3)], 8, i)
    return root


@pytest.fixture(scope="module")
def mae(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mae")
    train("pretrain", images, out)
    return out / "checkpoint.pth"


def train(job: str, data: Path, out: Path, *extra: str) -> list[dict]:
    argv = [*COMMON, *FLAGS[job], "--data_path", str(data), "--output-dir", str(out), *extra]
    assert SCRIPTS[job].main(argv) == 0
    return rows(out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


# --- pretraining ------------------------------------------------------------------------------------------------------


def test_the_last_smaller_batch_is_kept_or_left_out(images: Path, tmp_path: Path) -> None:
    for name, extra, steps in (("kept", [], 3), ("dropped", ["--drop_last"], 2)):  # 24 images
        lines = train("supervised", images, tmp_path / name, "--epochs", "1", "--batch_size", "10", *extra)
        assert lines[-1]["step"] == steps


def test_pretraining_leaves_what_mae_leaves(images: Path, mae: Path) -> None:
    log = rows(mae.parent)
    assert len(log) == 6 and log[0].keys() >= {"step", "epoch", "loss", "lr", "data_wait"}
    rates = [0, 1 / 3, 2 / 3, 1, (1 + np.cos(np.pi / 3)) / 2, (1 + np.cos(2 * np.pi / 3)) / 2]  # by step, not by epoch
    assert [row["lr"] for row in log] == pytest.approx([0.003 * rate for rate in rates], rel=1e-4)
    assert result(mae.parent)["loss"] == pytest.approx(log[-1]["loss"], abs=1e-6)
    kept = checkpoint.load(mae.parent / "checkpoint-1.pth")
    assert set(kept) == {"model", "epoch", "args"} and kept["epoch"] == 1
    assert torch.equal(kept["model"]["cls_token"], checkpoint.load(mae)["model"]["cls_token"])


def test_learning_rate_and_decay_of_mae() -> None:
    args = main_pretrain.get_parser().parse_args([])
    expected = {"batch_size": 64, "epochs": 400, "accum_iter": 1, "mask_ratio": 0.75, "weight_decay": 0.05, "lr": None,
                "blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 40, "norm_pix_loss": False, "input_size": 224,
                "model": "mae_mini_patch16"}  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
    args.lr = 1.0
    assert [main_pretrain.learning_rate(args, e) for e in (0, 20, 40, 220, 400)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    free, decayed = main_pretrain.groups(MAE(16, Size(4, (16, 1, 2), (8, 1, 2))), 0.05)
    assert free["weight_decay"] == 0 and all(p.ndim <= 1 for p in free["params"]) and decayed["weight_decay"] == 0.05
    assert sum(p.ndim == 3 for p in decayed["params"]) == 2  # class and mask token; positions are not trained


def test_accumulated_passes_are_one_batch(images: Path, tmp_path: Path) -> None:
    train("pretrain", images, tmp_path / "one", "--batch_size", "8")
    train("pretrain", images, tmp_path / "two", "--batch_size", "4", "--accum_iter", "2")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["lr"] == b["lr"]


def test_crops_on_the_device(images: Path, tmp_path: Path) -> None:
    log = train("pretrain", images, tmp_path / "a", "--resident", "--norm_pix_loss")
    assert len(log) == 6
    g = torch.Generator().manual_seed(0)
    theta = data.crop_matrices(2000, 0.2, g)
    w, h = theta[:, 0, 0].abs(), theta[:, 1, 1]
    assert (w * h).min() > 0.19 and w.max() <= 1 and 0.45 < (theta[:, 0, 0] < 0).float().mean() < 0.55
    assert ((theta[:, 0, 2].abs() + w) <= 1 + 1e-6).all() and ((theta[:, 1, 2].abs() + h) <= 1 + 1e-6).all()
    grid = F.affine_grid(torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]), [1, 3, 4, 4], align_corners=False)
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(F.grid_sample(x, grid, "bicubic", align_corners=False), x.flip(3), rtol=0, atol=1e-5)


# --- supervised arms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm",
    [
        "", "--mra_prob 0.5", "--mask_strategy random", "--mask_strategy attn_inverse --attn_source last_attn",
        "--compose erase --mix cutmix --head_lr_mult 10", "--compose full --mix mixup",
        "--mean_std half --mix cutout --policy randaugment",
        "--amp bf16 --eval_every 0", "--imbalance 4 --preset longtail_cifar --batch_size 4",
    ],
)  # fmt: skip
def test_every_arm_trains(arm: str, images: Path, mae: Path, tmp_path: Path) -> None:
    before = mae.read_bytes()
    log = train("supervised", images, tmp_path, "--mae_ckpt", str(mae), *arm.split())
    assert all(np.isfinite(row["loss"]) for row in log) and 0 <= log[0]["mra/entropy"] <= 1.001
    found = result(tmp_path)
    assert 0 <= found["top1"] <= 100 and found["test"] == "val" and len(found["mae_md5"]) == 32
    assert ("few" in found) == ("imbalance" in arm)
    assert mae.read_bytes() == before
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert not any("mae" in key or "decoder" in key for key in saved["state_dict"])
    assert len(saved["info"]["history"]) == (1 if "eval_every 0" in arm else 2)
    body, head = (group["lr"] for group in saved["optimizer"]["param_groups"])
    assert head == pytest.approx(body * (10 if "head_lr_mult" in arm else 1)) and body > 0


def test_probability_0_is_the_baseline_to_the_bit(images: Path, mae: Path, tmp_path: Path) -> None:
    train("supervised", images, tmp_path / "base")
    for name, flags in (("never", ["--mra_prob", "0"]), ("nothing", ["--mask_ratio", "0"])):
        train("supervised", images, tmp_path / name, "--mae_ckpt", str(mae), *flags)
        assert differing(tmp_path / "base", tmp_path / name, 40) == []
    train("supervised", images, tmp_path / "mra", "--mae_ckpt", str(mae))
    assert differing(tmp_path / "base", tmp_path / "mra", 40) != []


def test_what_a_step_sees(images: Path, mae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MRA gets the crops, the classifier MRA's images with the labels of the crops; tests see clean images."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    call = MRA.__call__

    def spy(self, x, noise, use):
        out = call(self, x, noise, use)
        seen.append((x.clone(), out.clone()))
        return out

    fed: list[torch.Tensor] = []
    forward = nets.Classifier.forward

    def feed(self, x):
        fed.append(x.clone())
        return forward(self, x)

    answers: list[torch.Tensor] = []
    loss = F.cross_entropy

    def ask(logits, y):
        answers.append(y)
        return loss(logits, y)

    monkeypatch.setattr(engine.F, "cross_entropy", ask)
    monkeypatch.setattr(MRA, "__call__", spy)
    monkeypatch.setattr(engine, "estimate", lambda *_: "")
    monkeypatch.setattr(nets.Classifier, "forward", feed)
    train("supervised", images, tmp_path, "--mae_ckpt", str(mae), "--epochs", "1")
    assert len(seen) == 3 and all(torch.equal(out, x) for (_, out), x in zip(seen, fed))
    assert all(not torch.equal(x, out) for x, out in seen)
    train_set = data.image_folder(images / "train").labels
    order = [[i for _, i in batch] for batch in EpochSampler(24, 8, 0).at(0)]
    assert [y.tolist() for y in answers] == [train_set[rows].tolist() for rows in order]
    assert len(fed) == 4 and fed[3].shape[0] == 12  # the test's batch never went through MRA


def test_cutout_and_mixing() -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 3, 12, 12)
    hidden = engine.cutout(x, 6)[:, 0] == 0
    assert hidden.sum((1, 2)).max() == 36 and hidden.sum((1, 2)).min() < 36 and len(hidden.unique(dim=0)) > 50
    assert (hidden.any(1).sum(1) * hidden.any(2).sum(1) == hidden.sum((1, 2))).all()  # one rectangle each
    args = argparse.Namespace(mix="cutmix", mix_prob=1.0, mix_alpha=1.0, cutout_size=0)
    y = torch.tensor([0, 1, 2, 3] * 100)
    ramp = y.float().view(-1, 1, 1, 1).expand(400, 3, 12, 12).contiguous()
    mix, target = engine.mixed(args, ramp, y, 4, (0, 1))
    share = torch.stack([(mix[:, 0] == c).float().mean((1, 2)) for c in range(4)], 1)
    torch.testing.assert_close(target, share, rtol=0, atol=1e-5)
    again = engine.mixed(args, ramp, y, 4, (0, 1))
    assert torch.equal(mix, again[0]) and not torch.equal(mix, engine.mixed(args, ramp, y, 4, (0, 2))[0])
    args.mix_prob = 0.0
    assert engine.mixed(args, ramp, y, 4, (0, 1))[0] is ramp


def test_shot_groups_and_schedules() -> None:
    table, counts = torch.tensor([[5.0, 2, 1], [10, 10, 10]]), torch.tensor([200, 100, 3])
    assert main_supervised.shot_groups(table, counts) == {"many": 50.0, "medium": 20.0, "few": 10.0}
    info = engine.Info(["a"])
    info.history = [{"top1": top1, "epoch": float(epoch)} for epoch, top1 in enumerate((1.0, 3.0, 3.0, 2.0))]
    assert info.result("top1") == {"top1": 2.0, "epoch": 3.0, "top1_best": 3.0, "best_epoch": 1}


def resolved(*flags: str) -> argparse.Namespace:
    args = main_supervised.get_parser().parse_args(list(flags))
    main_supervised.resolve(args)
    return args


def test_cutmix_s_recipe() -> None:
    """clovaai/CutMix-PyTorch: ImageNet with jitter, lighting and Nesterov; half of CIFAR's batches are mixed."""
    args = resolved("--preset", "cutmix", "--batch_size", "64", "--mix", "cutmix", "--input_size", "64")
    assert (args.epochs, args.batch_size, args.lr, args.schedule, args.wd) == (300, 64, 0.1, [75, 150, 225], 1e-4)
    assert [engine.learning_rate(args, e) for e in (0, 75, 224, 225)] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])
    assert (args.color_jitter, args.lighting, args.nesterov, args.mix_prob) == (0.4, 0.1, True, 1.0)
    names = [type(t).__name__ for t in engine.training_transform(args).transforms]
    assert names == ["Compose", "ToTensor", "Jitter", "Lighting", "Normalize"]
    off = resolved("--preset", "cutmix", "--no-nesterov", *"--color_jitter 0 --lighting 0 --input_size 64".split())
    names = [type(t).__name__ for t in engine.training_transform(off).transforms]
    assert not off.nesterov and names == ["Compose", "ToTensor", "Normalize"]
    net = nets.build("resnet8", 3, 4)
    assert engine.optimizer_of(args, net, args.nesterov).defaults["nesterov"] is True
    for preset, mix, expected in (
        ("cifar", "cutmix", 0.5), ("longtail_cifar", "cutmix", 0.5), ("cifar", "mixup", 1.0), ("short", "cutmix", 1.0),
    ):  # fmt: skip
        assert resolved("--preset", preset, "--mix", mix).mix_prob == expected
    assert resolved("--preset", "cifar", "--mix", "cutmix", "--mix_prob", "0.9").mix_prob == 0.9
    y = torch.arange(8) % 4
    x, args = torch.randn(8, 3, 8, 8), resolved("--preset", "cifar", "--mix", "cutmix")
    mixed = [engine.mixed(args, x, y, 4, (0, step))[1].ndim == 2 for step in range(400)]
    assert 0.42 < np.mean(mixed) < 0.58


def test_the_small_tier_s_recipe_is_what_its_rows_were_measured_with() -> None:
    args = resolved("--crop", "padded")
    assert (args.nesterov, args.padding_mode, args.warmup_epochs, args.decay_bias_norm) == (False, "reflect", 0, True)
    assert (args.color_jitter, args.lighting, args.mix_prob, args.policy) == (0, 0, 1.0, "none")
    groups = engine.optimizer_of(args, nets.build("resnet8", 3, 4)).param_groups
    assert [group["weight_decay"] for group in groups] == [args.wd, args.wd]


def test_the_long_tail_s_recipe() -> None:
    """kaidic/LDAM-DRW, cifar_train.py: five epochs of warm-up, a hundredth from epoch 160, 0.0001 from 180."""
    args = resolved("--preset", "longtail_cifar")
    assert (args.epochs, args.batch_size, args.lr, args.wd, args.padding_mode) == (200, 128, 0.1, 2e-4, "constant")
    rates = [engine.learning_rate(args, e) for e in range(200)]
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert rates[159:161] + rates[179:181] == pytest.approx([0.1, 1e-3, 1e-3, 1e-5])
    assert len(set(np.round(rates, 9))) == 7
    chosen = data.long_tail(torch.arange(50_000) % 10, 10, 100, 0)
    counts = torch.bincount(torch.tensor(chosen) % 10)  # the release's numbers of images
    assert counts.tolist() == [int(5000 * 0.01 ** (c / 9)) for c in range(10)]


@pytest.mark.parametrize(("crop", "dark"), [("constant", True), ("reflect", False)])
def test_padding(crop: str, dark: bool) -> None:
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    torch.manual_seed(0)
    shape = transforms.geometry(16, "padded", padding_mode=crop)
    assert any((np.asarray(shape(white)) == 0).any() for _ in range(20)) == dark


def test_weight_decay_on_biases_and_batch_norm_is_a_flag() -> None:
    net = nets.build("resnet8", 3, 4)
    exempt = {id(q) for q in net.parameters() if q.ndim == 1}
    fixmatch = main_fixmatch.get_parser().parse_args([])
    assert fixmatch.decay_bias_norm is False and fixmatch.bn_momentum == 0.001 and fixmatch.strong == "fixmatch"
    for args, free in ((fixmatch, exempt), (resolved("--no-decay_bias_norm", "--head_lr_mult", "3"), exempt),
                       (resolved(), set())):  # fmt: skip
        groups = engine.optimizer_of(args, net).param_groups
        assert {id(q) for g in groups if not g["weight_decay"] for q in g["params"]} == free
        assert {g["weight_decay"] for g in groups} <= {0.0, args.wd}
        assert sorted(id(q) for g in groups for q in g["params"]) == sorted(id(q) for q in net.parameters())
        heads = {id(q) for g in groups if g["scale"] != 1 for q in g["params"]}
        assert heads == ({id(q) for q in net.fc.parameters()} if args.head_lr_mult != 1 else set())


def test_wrn37_2_is_torchssl_s() -> None:
    """Four stages of four blocks, the first with stride 2; TorchSSL's has 5.93 M parameters, biases with them."""
    net = nets.build("wrn37-2", 10)
    assert round(sum(q.numel() for q in net.parameters()) / 1e6, 2) == 5.93
    blocks = [m for m in net.body if isinstance(m, nets.Wide)]
    assert [m.conv1.stride[0] for m in blocks] == [2, 1, 1, 1] * 4
    assert [m.conv2.out_channels for m in blocks] == [32] * 4 + [64] * 4 + [128] * 4 + [256] * 4
    with torch.no_grad():
        assert net.body(torch.zeros(1, 3, 96, 96)).shape == (1, 256, 6, 6)
    assert [m.conv1.stride[0] for m in nets.build("wrn28-2", 10).body if isinstance(m, nets.Wide)] == [
        1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("arch", [a for a in nets.ARCHS if a not in ("wrn28-8", "wrn28-10", "resnet34", "resnet50")])
def test_networks(arch: str) -> None:
    net = nets.build(arch, 7, 0 if arch in nets.IMAGENET else 4, "cifar").eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert net.features(x).shape == (2, net.num_features)
        assert torch.equal(net(x), net.fc(net.features(x))) and net(x).shape == (2, 7)
    convs = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules())
    depth = {"resnet18": 17, "resnet8": 7, "resnet20": 19, "resnet32": 31, "resnet12": 12, "wrn28-2": 25, "wrn37-2": 33}
    assert convs == depth[arch]


# --- FixMatch and few-shot --------------------------------------------------------------------------------------------


def test_fixmatch_loss_by_hand() -> None:
    labelled, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    weak = torch.tensor([[3.0, 0.0], [0.1, 0.0]], requires_grad=True)
    strong = torch.tensor([[0.0, 1.0], [5.0, 0.0]], requires_grad=True)
    l_x, l_u, mask = main_fixmatch.fixmatch_loss(labelled, y, weak, strong, 0.9)
    assert mask.tolist() == [1, 0]
    assert float(l_x) == pytest.approx(np.log(1 + np.exp(-2)))
    assert float(l_u.detach()) == pytest.approx(np.log(1 + np.exp(1)) / 2)  # over both images
    l_u.backward()
    assert weak.grad is None and strong.grad is not None and strong.grad[1].abs().sum() == 0


def test_what_a_step_of_fixmatch_computes(images, mae, tmp_path, monkeypatch, capsys) -> None:
    """Views, MRA and Cutout, the loss, the moving average, and whom the tests look at, step by step."""
    painted: list[tuple[torch.Tensor, torch.Tensor]] = []
    fed: list[tuple[torch.Tensor, torch.Tensor]] = []
    batches: list = []
    averages: list[main_fixmatch.Ema] = []
    weights: list[list[torch.Tensor]] = []
    tested: list[nn.Module] = []
    call, forward, original, accuracy = MRA.__call__, nets.Classifier.forward, Run.batches, engine.accuracy

    def spy(self, x, noise, use):
        painted.append((x, call(self, x, noise, use)))
        return painted[-1][1]

    def feed(self, x):
        out = forward(self, x)
        if self.training:
            fed.append((x.clone(), out.detach()))
        return out

    def watch(self, *args):
        for epoch, batch in original(self, *args):
            batches.append(batch)
            yield epoch, batch

    class Watched(main_fixmatch.Ema):
        def __init__(self, network, decay):
            super().__init__(network, decay)
            averages.append(self)
            weights.append([q.detach().clone() for q in network.parameters()])

        def update(self, network):
            super().update(network)
            weights.append([q.detach().clone() for q in network.parameters()])

    def test(run, network, *more, **flags):
        tested.append(network)
        return accuracy(run, network, *more, **flags)

    monkeypatch.setattr(MRA, "__call__", spy)
    monkeypatch.setattr(nets.Classifier, "forward", feed)
    monkeypatch.setattr(Run, "batches", watch)
    monkeypatch.setattr(main_fixmatch, "Ema", Watched)
    monkeypatch.setattr(engine, "accuracy", test)
    estimate = engine.estimate  # its own calls of MRA do not count

    def timed(*words):
        found = estimate(*words)
        painted.clear()
        return found

    monkeypatch.setattr(engine, "estimate", timed)
    log = train("fixmatch", images, tmp_path, "--mae_ckpt", str(mae), "--lambda_u", "0.5")
    assert "estimated time: about 1 min for 6 steps" in capsys.readouterr().out
    assert len(painted) == len(fed) == len(batches) == 6
    confident = 0
    for row, (x, out), (views, logits), ((own, y, _), (weak, strong)) in zip(log, painted, fed, batches, strict=True):
        assert torch.equal(x, strong) and not torch.equal(x, out) and len(own) == 4 and len(weak) == len(strong) == 8
        assert torch.equal(views[:4], own) and torch.equal(views[4:12], weak)
        hidden = views[12:] != out  # Cutout's, after MRA
        assert bool((views[12:][hidden] == 0).all()) and bool(hidden.flatten(1).any(1).all())
        confidence, guess = logits[4:12].softmax(1).max(1)
        sure = (confidence >= 0.3).float()
        confident += int(sure.sum())
        loss_u = (F.cross_entropy(logits[12:], guess, reduction="none") * sure).mean()
        assert row["loss"] == pytest.approx(float(F.cross_entropy(logits[:4], y) + 0.5 * loss_u), rel=1e-4)
        assert row["loss/unlabelled"] == pytest.approx(float(loss_u), rel=1e-4)
    assert confident > 8
    assert [row["lr"] for row in log] == pytest.approx(
        [0.05 * np.cos(7 * np.pi * k / (16 * 6)) for k in range(6)], rel=1e-4
    )
    (ema,) = averages
    expected = weights[0]
    for after in weights[1:]:
        expected = [0.9 * mine + 0.1 * new for mine, new in zip(expected, after)]
    assert len(weights) == 7
    for value, want in zip(ema.network.parameters(), expected, strict=True):
        torch.testing.assert_close(value, want)
    assert len(tested) == 2 and all(network is ema.network for network in tested)
    scores = [row["val/top1"] for row in log if "val/top1" in row]
    found = result(tmp_path)
    assert found["top1"] == pytest.approx(scores[1], rel=1e-4) and found["minutes"] >= 0
    assert found["top1_median20"] == pytest.approx(sum(scores) / 2, rel=1e-4)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    key = "body.0.weight"
    assert torch.equal(saved["ema"]["shadow"][key], ema.network.state_dict()[key])
    network, _ = nets.load_run(tmp_path / "checkpoint.pth", torch.device("cpu"))
    assert torch.equal(network.state_dict()[key], saved["ema"]["shadow"][key])


def test_every_unlabelled_image_is_drawn_as_often_as_any_other() -> None:
    """Epochs of a number of steps that ends within a round: the first images (classes) are not seen more often."""
    sampler = main_fixmatch.Rounds(50, 4, 8, seed=3)  # 32 of 50 images an epoch
    keys = [key for epoch in range(25) for batch in sampler.at(epoch) for key in batch]
    assert len(keys) == len(set(keys)) == 800  # a draw of its own each time
    assert torch.bincount(torch.tensor([i for _, i in keys])).tolist() == [16] * 50
    assert sorted(i for _, i in keys[:50]) == list(range(50)) and [i for _, i in keys[:50]] != [
        i for _, i in keys[50:100]
    ]
    assert len({i for batch in sampler.at(0) for _, i in batch if i >= 32}) > 5
    whole, rest = list(sampler.at(3)), list(sampler.at(3, 5))
    assert rest == whole[5:] and len(sampler) == 3 and sampler.steps_per_epoch == 8
    halves = [list(main_fixmatch.Rounds(50, 2, 8, 3, rank, 2).at(3)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == whole
    few = [key for batch in main_fixmatch.Rounds(3, 8, 3, 0).at(0) for key in batch]  # a batch of several rounds
    assert len(set(few)) == 24 and torch.bincount(torch.tensor([i for _, i in few])).tolist() == [8] * 3


def test_ema_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = main_fixmatch.Ema(net, 0.9)
    old = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1)
        net[1].running_mean.fill_(3)
    ema.update(net)
    torch.testing.assert_close(ema.network[0].weight, old + 0.1)
    assert bool((ema.network[1].running_mean == 3).all())


def test_averaged_weights_are_tested_with_statistics_of_their_own_time() -> None:
    """With a momentum of 1 - ema the statistics serve the averaged weights as well as statistics measured for them.

    With a larger one they are another network's, the last few steps', and the same weights fail.
    """
    torch.manual_seed(1)
    patterns = torch.randn(4, 3, 8, 8)

    def batch(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(4, (n,), generator=generator)
        return patterns[y] + 3 * torch.randn(n, 3, 8, 8, generator=generator), y

    x, y = batch(1000, torch.Generator().manual_seed(99))
    start = nets.build("resnet8", 4, 4)
    found = {}
    for momentum in (0.04, 0.6):
        net, generator = copy.deepcopy(start).train(), torch.Generator().manual_seed(1)
        nets.set_bn_momentum(net, momentum)
        ema = main_fixmatch.Ema(net, 0.96)
        optimizer = torch.optim.SGD(net.parameters(), 0.3, 0.9, nesterov=True)
        for _ in range(100):
            images, labels = batch(16, generator)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            ema.update(net)
        own = copy.deepcopy(ema.network).train()
        nets.set_bn_momentum(own, 1.0)  # those of the next batch alone
        with torch.no_grad():
            own(batch(500, generator)[0])
            for name, network in (("tested", ema.network), ("own", own)):
                right = network.eval()(x).argmax(1) == y
                found[name, momentum] = 100 * float(right.float().mean())
    assert found["own", 0.04] == found["own", 0.6] > 80  # the same weights
    assert found["tested", 0.04] > found["own", 0.04] - 6
    assert found["tested", 0.6] < found["own", 0.04] - 12


def test_batch_norm_of_a_fixmatch_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    update = main_fixmatch.Ema.update

    def watch(self, network):
        seen.extend(
            m.momentum or 0.0 for n in (network, self.network) for m in n.modules() if isinstance(m, nn.BatchNorm2d)
        )
        update(self, network)

    monkeypatch.setattr(main_fixmatch.Ema, "update", watch)
    for flags, expected in (([], 0.001), (["--bn_momentum", "0.25"], 0.25)):
        train("fixmatch", images, tmp_path / str(expected), "--iterations", "1", "--epoch_steps", "1", *flags)
        assert seen and set(seen) == {expected}
        state = checkpoint.load(tmp_path / str(expected) / "checkpoint.pth")
        assert torch.equal(state["ema"]["shadow"]["body.1.running_mean"], state["state_dict"]["body.1.running_mean"])
        seen.clear()


def test_fewshot(novel: Path, mae: Path, tmp_path: Path) -> None:
    base = train("fewshot", novel, tmp_path / "a", "--mae_ckpt", str(mae))
    train("fewshot", novel, tmp_path / "b", "--mae_ckpt", str(mae), "--mra_on_support")
    a, b = result(tmp_path / "a"), result(tmp_path / "b")
    assert len(base) == 3 and {"1shot", "5shot", "1shot_ci", "val_1shot"} <= set(a)
    assert a["1shot"] != b["1shot"] or a["5shot"] != b["5shot"]
    with pytest.raises(UserError, match="checkpoint.pth: of main_fewshot"):
        eval_occlusion.main(["--checkpoint", str(tmp_path / "a/checkpoint.pth"), "--threads", "1"])
    with pytest.raises(UserError, match="--episodes 1: must be at least 2"):
        train("fewshot", novel, tmp_path / "c", "--episodes", "1")
    with pytest.raises(UserError, match="--mra_on_support needs an autoencoder"):
        train("fewshot", novel, tmp_path / "c", "--mra_on_support")
    with pytest.raises(UserError, match="9-way episodes of 4 images a class: the split has 3 classes of 8"):
        train("fewshot", novel, tmp_path / "c", "--n_way", "9")


def test_episodes_and_prototypes_by_loop() -> None:
    labels = torch.arange(4).repeat_interleave(torch.tensor([5, 6, 7, 5]))
    episodes = main_fewshot.draw_episodes(labels, 3, 4, 300, 0)
    assert episodes.shape == (300, 3, 4)
    for e in episodes[:50]:
        assert len(e.unique()) == 12 and all(len(labels[row].unique()) == 1 for row in e)
        assert len(labels[e[:, 0]].unique()) == 3
    assert len(episodes.unique()) == 23  # every image has its turn
    feats = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
    got = main_fewshot.episode_accuracy(feats, feats[None], episodes, 2)
    unit = F.normalize(feats, dim=1)
    for e, value in zip(episodes[:40], got):
        protos = [F.normalize(unit[row[:2]].mean(0), dim=0) for row in e]
        right = [max(range(3), key=lambda k: float(unit[q] @ protos[k])) == w for w in range(3) for q in e[w, 2:]]
        assert float(value) == pytest.approx(sum(right) / 6)


# --- resume, processes, errors ----------------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


LONG = {"pretrain": ["--resident"], "supervised": ["--mask_strategy", "random", "--mra_prob", "0.7", "--mix", "cutmix",
        "--color_jitter", "0.4", "--lighting", "0.1", "--nesterov", "--no-decay_bias_norm", "--warmup_epochs", "1"],
        "fixmatch": ["--mask_strategy", "random", "--strong_batch"], "fewshot": ["--epochs", "2"]}  # fmt: skip


@pytest.mark.parametrize("job", list(SCRIPTS))
def test_terminated_and_resumed_is_bit_identical(job, images, novel, mae, tmp_path, monkeypatch) -> None:
    source = novel if job == "fewshot" else images
    extra = [*LONG[job], *([] if job == "pretrain" else ["--mae_ckpt", str(mae)])]
    whole = train(job, source, tmp_path / "whole", *extra)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(SystemExit) as stopped:
            train(job, source, tmp_path / "cut", *extra)
    assert stopped.value.code == 143
    shutil.copytree(tmp_path / "cut", tmp_path / "spoilt")
    resumed = train(job, source, tmp_path / "cut", *extra, "--workers", "0" if job == "pretrain" else "1")
    assert differing(tmp_path / "whole", tmp_path / "cut", 40) == []
    assert [(r["step"], r["loss"]) for r in resumed] == [(r["step"], r["loss"]) for r in whole]
    saved = checkpoint.load(tmp_path / "spoilt" / "checkpoint.pth")  # the negative test
    saved["optimizer"]["state"] = {}
    checkpoint.save(tmp_path / "spoilt" / "checkpoint.pth", saved)
    train(job, source, tmp_path / "spoilt", *extra)
    assert differing(tmp_path / "whole", tmp_path / "spoilt", 40) != []


def test_another_autoencoder_is_refused_on_resume(images: Path, mae: Path, tmp_path: Path) -> None:
    file = tmp_path / "mae.pth"
    shutil.copy(mae, file)
    train("supervised", images, tmp_path / "out", "--mae_ckpt", str(file))
    saved = checkpoint.load(file)
    saved["model"]["cls_token"].add_(1)
    checkpoint.save(file, saved)
    with pytest.raises(UserError, match="--mae-md5 was"):
        train("supervised", images, tmp_path / "out", "--mae_ckpt", str(file))


def torchrun(python: str, job: str, source: Path, out: Path, *extra: str) -> subprocess.CompletedProcess:
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [f"mra.main_{job}", *COMMON, *FLAGS[job], "--data_path", str(source), "--output-dir", str(out), *extra]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


SAME = ["--mask_strategy", "random", "--sync_bn", "--lr", "0.01"]
LAST_OF_FIVE = ["--mix", "cutout", "--per_class", "7"]  # 21 images: the last batch gives the processes three and two


@pytest.mark.parametrize(
    ("job", "one", "two"),
    [
        ("pretrain", ["--batch_size", "8", "--resident"], ["--batch_size", "4", "--resident"]),
        ("supervised", [*SAME, *LAST_OF_FIVE], [*SAME, *LAST_OF_FIVE]),
        ("fixmatch", SAME, SAME),
        ("fewshot", [*SAME, "--mra_on_support"], [*SAME, "--mra_on_support"]),
    ],
)
def test_two_processes_are_one_on_the_whole_batch(job, one, two, images, novel, mae, tmp_path, python) -> None:
    source = novel if job == "fewshot" else images
    own = [] if job == "pretrain" else ["--mae_ckpt", str(mae)]
    train(job, source, tmp_path / "one", *own, *one)
    done = torchrun(python, job, source, tmp_path / "two", *own, *two)
    assert done.returncode == 0, done.stderr[-2000:]
    logged = ["loss", "acc/train", "mra/entropy", "loss/labelled", "loss/unlabelled", "fixmatch/mask"]
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in set(logged) & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    name = "model" if job == "pretrain" else "state_dict"
    one_state, two_state = (checkpoint.load(tmp_path / n / "checkpoint.pth")[name] for n in ("one", "two"))
    for key, value in one_state.items():
        torch.testing.assert_close(value, two_state[key], rtol=0, atol=2e-3)
    if job == "fewshot":
        first, second = (result(tmp_path / n) for n in ("one", "two"))
        assert first["1shot"] == pytest.approx(second["1shot"], abs=2)


def test_two_processes_resume_to_the_bit(images: Path, mae: Path, tmp_path: Path, python: str) -> None:
    """With batch norm of each process, of which the checkpoint holds process 0's statistics alone."""
    extra = ["--mae_ckpt", str(mae), "--mask_strategy", "random", "--save-every", "4"]
    assert torchrun(python, "fixmatch", images, tmp_path / "whole", *extra).returncode == 0
    stop = tmp_path / "stop.py"  # the module, stopped by a signal after its fourth step
    stop.write_text(
        "import os, runpy, signal, sys\nfrom shared_utils.run import Run\nlog = Run.log\n"
        "def patched(self, *args, **kwargs):\n    log(self, *args, **kwargs)\n"
        "    if self.step == 3 and self.rank == 0:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "Run.log = patched\nrunpy.run_module(sys.argv.pop(1), run_name='__main__')\n"
    )
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(stop)]
    command += ["mra.main_fixmatch", *COMMON, *FIX, "--data_path", str(images), "--output-dir", str(tmp_path / "cut")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *extra], cwd=ROOT, env=env, capture_output=True, text=True)
    assert checkpoint.load(tmp_path / "cut/checkpoint.pth")["progress"]["step"] == 4
    again = torchrun(python, "fixmatch", images, tmp_path / "cut", *extra)
    assert again.returncode == 0 and "at step 4" in again.stdout, again.stderr[-2000:]
    assert differing(tmp_path / "whole", tmp_path / "cut", 40) == []


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        ("pretrain", "--data_path {tmp}/nowhere", r"nowhere: no such folder"),
        ("pretrain", "--mask_ratio 1", r"--mask_ratio must lie between 0 and 1"),
        ("pretrain", "--mask_ratio 0.99", r"--mask_ratio 0.99 keeps all or none of 16 patches"),
        ("pretrain", "--input_size 18", r"18 pixels do not divide into patches of 4"),
        ("pretrain", "--batch_size 64", r"--batch_size 64 x --accum_iter 1 x 1 processes: a step takes 64"),
        ("supervised", "--data_path {tmp}/nowhere", r"nowhere/train: no such folder"),
        ("supervised", "--mae_ckpt {tmp}/nothing.pth", r"nothing.pth: no such checkpoint file"),
        ("supervised", "--per_class 9", r"--per_class 9: class a has 8 images"),
        ("supervised", "--mae_ckpt {mae} --mask_ratio 2", r"--mask_ratio 2.0"),
        ("supervised", "--imbalance 0.5", r"--imbalance 0.5"),
        ("supervised", "--batch_size 1", r"--batch_size 1 does not give"),
        ("supervised", "--arch resnet18 --width 8", r"--width 8: resnet18 has its own"),
        ("supervised", "--tests nosuch", r"nosuch: no such folder"),
        ("supervised", "--dataset cifar10", r"cifar10 not found"),
        ("supervised", "--dataset cub", r"CUB_200_2011/images.txt: no such file"),
        ("supervised", "--dataset aircraft", r"variants.txt: no such file"),
        ("supervised", "--dataset cars", r"cars_meta.mat: no such file"),
        ("supervised", "--dataset stl10", r"stl10 not found"),
        ("supervised", "--train_list {tmp}/a.txt", r"go together"),
        ("supervised", "--mae_ckpt {mae} --mae_heads 3,x", r"--mae_heads 3,x: must be whole numbers"),
        ("supervised", "--mae_ckpt {mae} --mae_heads 3", r"--mae_heads 3: must be two numbers such as 3,3"),
        ("supervised", "--arch resnet12 --width 0 --input_size 8", r"--input_size 8: resnet12 halves an image four"),
        ("fixmatch", "--arch resnet12 --input_size 8", r"--input_size 8: resnet12 halves an image four times"),
        ("fixmatch", "--iterations 7", r"--iterations 7 is no multiple of --epoch_steps 3"),
        ("fixmatch", "--ema 1", r"--ema in 0..1"),
        ("fixmatch", "--strong_batch --strong randaugment", r"--strong_batch has FixMatch's operations alone"),
        ("fixmatch", "--momentum 0", r"--momentum 0.0: Nesterov's must lie"),
        ("fixmatch", "--wd -1", r"--wd -1: must not be negative"),
        ("fixmatch", "--bn_momentum 0", r"--bn_momentum 0.0: must lie above 0"),
        ("supervised", "--nesterov --momentum 0", r"--nesterov needs a --momentum above 0"),
        ("supervised", "--lr_decay 0", r"--lr_decay, --mix_alpha and --head_lr_mult must be above 0"),
        ("supervised", "--color_jitter -1", r"--color_jitter -1: must not be negative"),
        ("supervised", "--momentum -1", r"--momentum -1: must not be negative"),
        ("supervised", "--decay step --schedule a,b", r"--schedule a,b: epochs with commas"),
        ("fewshot", "--data_path {tmp}/nowhere", r"nowhere/train: no such folder"),
        ("supervised", "--output-dir /dev/null/x", r"/dev/null/x: cannot write here"),
    ],
)
def test_bad_input_is_one_line(job, flags, message, images, mae, tmp_path) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(job, images, tmp_path / "out", *flags.format(tmp=tmp_path, mae=mae).split())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("job", ["supervised", "fixmatch"])
def test_another_process_s_infinite_loss_stops_all_alike(job: str, images: Path, tmp_path: Path, monkeypatch) -> None:
    """Else one process tests, where the others stop, and waits for them."""
    all_sum = engine.distributed.all_sum
    monkeypatch.setattr(engine.distributed, "all_sum", lambda x: all_sum(x) * (float("nan") if x.ndim == 0 else 1))
    monkeypatch.setattr(engine, "accuracy", lambda *_, **__: pytest.fail("tested"))
    one_step = ["--batch_size", "24"] if job == "supervised" else ["--epoch_steps", "1"]
    with pytest.raises(Diverged, match="step 0: the loss is nan"):
        train(job, images, tmp_path, *one_step)


def test_a_diverged_run_stops(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "learning_rate", lambda args, epoch: 0.05 if epoch < 1 else float("inf"))
    with pytest.raises(Diverged, match=r"step \d: the loss is"):
        train("supervised", images, tmp_path, "--epochs", "3")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 3


# --- occlusion and the picture ----------------------------------------------------------------------------------------


def test_occlusion_of_known_cells() -> None:
    x, order = torch.ones(2, 3, 8, 8), torch.tensor([[3, 0, 1, 2], [1, 2, 3, 0]])
    out = eval_occlusion.occlude(x, order, 0.5, 4)
    assert (out[0, :, 4:, 4:] == 0).all() and (out[0, :, :4, :4] == 0).all() and out[0].sum() == 96
    assert (out[1, :, :4, 4:] == 0).all() and (out[1, :, 4:, :4] == 0).all()
    assert torch.equal(eval_occlusion.occlude(x, order, 0.0, 4), x)
    assert eval_occlusion.area([80.0] * 10) == pytest.approx(80)
    assert eval_occlusion.area([10.0, 20, 30]) == pytest.approx(20)


def test_the_most_attended_cells_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention is all on the first cell, and so is what a network looks at that is right while it sees it."""
    seen = ArrayImages(np.full((3, 16, 16, 3), 255, np.uint8), [1, 1, 1], ["a", "b"])
    seen.transform = transforms.test_transform(16)
    monkeypatch.setattr(eval_occlusion, "attention_scores", lambda _, tokens, __: -torch.arange(16.0).expand(3, 16))
    args = eval_occlusion.get_parser().parse_args("--checkpoint x --input_size 16 --cell 4".split())

    class Looks(nn.Module):
        def forward(self, x):
            return F.one_hot((x[:, :, :4, :4] != 0).all((1, 2, 3)).long(), 2)

    found = eval_occlusion.curves(Looks(), seen, MAE(16, Size(4, (16, 1, 2), (8, 1, 2))), args, torch.device("cpu"),
                                  transforms.STATS["imagenet"])  # fmt: skip
    assert found["salient"] == [100.0] + [0.0] * 9 and found["nonsalient"] == [100.0] * 10
    assert found["random"][0] == 100 and found["random"][9] < 100


def test_occlusion_and_diagnostics(images: Path, mae: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("supervised", images, run, "--mean_std", "half")
    argv = ["--checkpoint", str(run / "checkpoint.pth"), "--cell", "4", "--threads", "1"]
    assert eval_occlusion.main([*argv, "--mae_ckpt", str(mae), "--batch_size", "5"]) == 0
    found = result(run / "eval" / "occlusion")
    assert found["curves"]["random"][0] == pytest.approx(result(run)["top1"], abs=1e-3)
    assert {len(curve) for curve in found["curves"].values()} == {10} and len(found["curves"]) == 3
    for name, curve in found["curves"].items():
        assert found[f"occlusion_{name}"] == pytest.approx(eval_occlusion.area(curve), abs=1e-2)
    # 9 of 16 patches kept; the object is the 4 patches in the middle, whole ones
    kept, inverse, by_chance = (found[f"kept_{n}"] for n in ("foreground", "inverse", "random"))
    assert all(round(v * 12 * 4 / 100, 6).is_integer() for v in (kept, inverse, by_chance))
    assert found["mse"] > 0 and found["mse_mean"] > 0 and 0 < found["entropy"] <= 1.001 and found["minutes"] >= 0
    assert eval_occlusion.main([*argv, "--images", "4", "--output-dir", str(tmp_path / "few")]) == 0
    few = result(tmp_path / "few")
    assert few["images"] == 4 and set(few["curves"]) == {"random"} and "kept_foreground" not in few
    for name, more in (("all", []), ("more", ["--images", "50"])):  # more than there are: each of them once
        assert eval_occlusion.main([*argv, *more, "--output-dir", str(tmp_path / name)]) == 0
    assert result(tmp_path / "more")["images"] == 12
    assert result(tmp_path / "more")["curves"] == result(tmp_path / "all")["curves"]
    for flags, message in (
        (["--cell", "5"], "--cell 5: must divide"),
        (["--cell", "2", "--mae_ckpt", str(mae)], "--cell 2: must be a multiple of the autoencoder's patch of 4"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--images", "-1"], "--images -1: must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            eval_occlusion.main([*argv, *flags])
    with pytest.raises(UserError, match="not a checkpoint of mra.main_supervised"):
        eval_occlusion.main(["--checkpoint", str(mae)])


def test_diagnostics_by_loop(images: Path, mae: Path) -> None:
    from mra import models_mae

    val = data.image_folder(images / "val")
    val.transform = transforms.test_transform(16)
    loaded = models_mae.load(mae, 16).mae
    args = eval_occlusion.get_parser().parse_args(["--checkpoint", "x", "--input_size", "16", "--batch_size", "7"])
    found = eval_occlusion.diagnose(loaded, val, args, torch.device("cpu"), transforms.STATS["imagenet"])
    kept = total = error = mean_error = 0.0
    for i in range(len(val)):
        x = val[i][0][None]
        parts = MRA(loaded).parts(x, torch.zeros(1, 16))
        for patch in range(16):
            r, c = divmod(patch, 4)
            cut = (slice(None), slice(None), slice(4 * r, 4 * r + 4), slice(4 * c, 4 * c + 4))
            object_pixels = 16.0 if r in (1, 2) and c in (1, 2) else 0.0
            total += object_pixels
            if parts.mask[0, patch] == 0:
                kept += object_pixels
            else:
                error += float((parts.reconstruction[cut] - x[cut]).square().sum())
                mean_error += float((x.mean((2, 3), keepdim=True) - x[cut]).square().sum())
    erased = len(val) * 7 * 48
    assert found["kept_foreground"] == pytest.approx(100 * kept / total)
    assert found["mse"] == pytest.approx(error / erased, rel=1e-4)
    assert found["mse_mean"] == pytest.approx(mean_error / erased, rel=1e-4)


def test_the_picture(images: Path, mae: Path, tmp_path: Path) -> None:
    argv = ["--data_path", str(images / "val"), "--input_size", "16", "--mae_ckpt", str(mae), "--threads", "1"]
    assert visualize.main([*argv, "--count", "4", "--zoom", "1", "--out", str(tmp_path / "a/mra.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "a/mra.png"))
    assert picture.shape == (5 * 18 + 2, 4 * 18 + 2, 3)
    first = np.asarray(Image.open(sorted((images / "val").rglob("*.png"))[0]))
    assert np.abs(picture[2:18, 2:18].astype(int) - first).max() <= 1
    with pytest.raises(UserError, match="--mae_ckpt is missing"):
        visualize.main(["--data_path", str(images)])
    with pytest.raises(UserError, match="--count 8 --zoom 4000: a picture that large"):
        visualize.main([*argv, "--zoom", "4000"])
    with pytest.raises(UserError, match="cannot be written"):
        visualize.main([*argv, "--out", "/dev/null/x.png"])


def test_the_small_tier_is_tested_with_the_attention_that_it_was_trained_with(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "SKIP_ENV": "1", "PYTHON": str(fake), "SET": "texture", "RUNS": str(tmp_path)}
    for script in ("supervised", "occlusion", "fixmatch", "fewshot"):
        for tier in ("small", "mini"):
            command = ["bash", str(ROOT / f"mra/run_{script}.sh"), tier]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("-m mra.")]
            assert lines and all("--attn_source last_attn" in line for line in lines)


@pytest.mark.parametrize(("name", "expected"), [("cifar10", ["--mix_prob 0.5"]), ("texture", [])])
def test_the_small_tier_mixes_half_of_cifar_s_batches(name: str, expected: list[str], tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "SKIP_ENV": "1", "PYTHON": str(fake), "SET": name, "RUNS": str(tmp_path)}
    env |= {"ARMS": "cutmix mixup", "MAE": "a.pth"}
    subprocess.run(["bash", str(ROOT / "mra/run_arms.sh"), "small"], env=env, capture_output=True, check=True)
    logs = tmp_path / "mra/arms/small" / name
    found = re.findall("--mix_prob [0-9.]+", (logs / "cutmix-seed0.log").read_text())
    assert found == expected and "--mix_prob" not in (logs / "mixup-seed0.log").read_text()


def test_the_command_line(tmp_path: Path, python: str) -> None:
    command = [python, "-m", "mra.main_supervised", "--data_path", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
