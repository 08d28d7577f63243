"""Evaluation of bingo's students: linear probe, few labels, export; through the command line."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from bingo import main_lincls, main_semi
from bingo.arch import build, mlp_head
from bingo.lab import export_detection
from shared_utils import UserError, checkpoint, evaluation, probe
from shared_utils.augment import plain
from shared_utils.data import EpochSampler, ImageList, image_folder
from shared_utils.evaluation import topk
from shared_utils.lab import mini
from shared_utils.run import Run

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--img_size 32 --workers 0 --threads 1".split()
SMALL_TRAIN = [*SMALL, *"--batch_size 16 --log-every 1".split()]


def some_images(root: Path, classes: int = 6, train: int = 16, val: int = 8) -> Path:
    """The mini images, fewer of them."""
    full = mini.ensure("images")
    for split, count in (("train", train), ("val", val)):
        for folder in sorted((full / split).iterdir())[:classes]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return some_images(tmp_path_factory.mktemp("images"))


def student(path: Path, arch: str = "resnet10", width: int = 8, stem: str = "cifar_pool") -> Path:
    """A checkpoint as `bingo.main_moco` writes it, with batch-norm statistics of the data's scale."""
    torch.manual_seed(3)
    net = build(arch, width, stem)
    net.fc = mlp_head(net.num_features, 16, 32)
    with torch.no_grad():
        for _ in range(30 if width < 64 else 1):  # of the whole network only names and values are looked at
            net(torch.randn(16, 3, 32, 32))
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.encoder_k.{k}": v for k, v in build("resnet18", 8).state_dict().items()}
    state["module.queue"] = torch.randn(16, 32)
    args = {"s_arch": arch, "s_width": width, "s_stem": stem, "t_arch": "resnet18", "arch": None}
    checkpoint.save(path, {"state_dict": state, "args": args, "epoch": 1})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return student(tmp_path_factory.mktemp("student") / "checkpoint.pth")


def stacked(images: ImageList) -> torch.Tensor:
    return torch.stack([images[i][0] for i in range(len(images))])


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def lincls(data: Path, weights: Path, out: Path, *extra: str) -> dict:
    flags = [*SMALL_TRAIN, "--data_dir", str(data), "--pretrained", str(weights), "--output-dir", str(out), *extra]
    assert main_lincls.main(flags) == 0
    return result(out)


PROBE = "--end_epoch 2 --init_lr 1 --schedule 1".split()


# ------------------------------------------------------------------------------------------------------ linear probe
def test_cached_validation_gives_the_numbers_of_a_pass_an_epoch(data, weights, tmp_path):
    cached = lincls(data, weights, tmp_path / "a", *PROBE, "--selected_feat_id", "layer2,last")
    again = lincls(data, weights, tmp_path / "b", *PROBE, "--selected_feat_id", "layer2,last", "--recompute_val")
    assert cached == again
    assert set(cached["blocks"]) == {"3", "5"} and cached["linear"] == cached["blocks"]["5"]["best"]
    assert 0 <= cached["linear_last"] <= cached["linear"] <= 100 and cached["linear_top5"] >= cached["linear"]
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pth") for x in "ab")
    assert a["scores"] == b["scores"] and len(a["scores"]["history"]) == 2
    key = "module.classifiers.0.classifier.LinearClassifier.weight"
    assert a["state_dict"][key].shape == (6, 16 * 7 * 7)  # layer2: 16 channels, 8 x 8 pooled to 7 x 7
    assert torch.equal(a["state_dict"][key], b["state_dict"][key])
    assert set(checkpoint.load(tmp_path / "a" / "best.pth")["state_dict"]) == set(a["state_dict"])


def test_recomputed_validation_keeps_no_features(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "collect", None)
    evaluate, seen = main_lincls.evaluate, []

    def noted(probes, batches, *args):
        batches = list(batches)
        seen.extend(len(feats[0]) for feats, _ in batches)
        return evaluate(probes, batches, *args)

    monkeypatch.setattr(main_lincls, "evaluate", noted)
    lincls(data, weights, tmp_path, *PROBE, "--recompute_val")
    assert seen == [16, 16, 16] * 2


def test_features_that_do_not_fit_in_memory(data, weights, tmp_path, monkeypatch):
    train, val = 4 * 96 * 64, 4 * 48 * 64
    memory = lambda bytes: monkeypatch.setattr(evaluation, "available_memory", lambda: bytes)  # noqa: E731
    memory(2 * (train + val) - 1)
    with pytest.raises(UserError, match="features of 48 images, 64 values each, .* give --recompute_val"):
        lincls(data, weights, tmp_path / "a", *PROBE, "--cached_train")
    lincls(data, weights, tmp_path / "b", *PROBE, "--cached_train", "--recompute_val", "--end_epoch", "1")
    memory(2 * train - 1)
    with pytest.raises(UserError, match="features of 96 images, 64 values each, .* leave --cached_train away"):
        lincls(data, weights, tmp_path / "a", *PROBE, "--cached_train", "--recompute_val")
    memory(2 * val - 1)
    with pytest.raises(UserError, match="give --recompute_val"):
        lincls(data, weights, tmp_path / "a", *PROBE)
    assert not (tmp_path / "a").exists()


def test_hits_are_counted_where_a_line_is_written_alone(data, weights, tmp_path, monkeypatch):
    counted = []

    def noted(logits, labels):
        counted.append(len(labels))
        return topk(logits, labels)

    for module in (main_lincls, probe):
        monkeypatch.setattr(module, "topk", noted)
    lincls(data, weights, tmp_path, *PROBE, "--end_epoch", "1", "--log-every", "4")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], "acc1_5" in row, "val/top1_5" in row) for row in lines] == [
        (1, True, False), (4, True, False), (6, True, True)
    ]  # fmt: skip
    assert len(counted) == (3 + 3)  # three lines, three batches of validation


def test_probe_is_that_of_an_independent_loop(data, tmp_path):
    """torchvision's network, its pooled output, one linear layer and plain SGD on the same batches, the last one too.

    The rate is one that lowers the loss: above it rounding grows from step to step.
    """
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 3, 32, 32))
    checkpoint.save(tmp_path / "tv.pth", net.state_dict())
    found = lincls(
        data,
        tmp_path / "tv.pth",
        tmp_path / "run",
        *PROBE,
        *"--init_lr 0.02 --min_lr 0.01".split(),
        *"--cached_train --decay_method cos --wd 0.01 --batch_size 20 --aug_backend pil".split(),
    )
    net.fc = nn.Identity()
    net.eval()
    train, val = (image_folder(data / split, plain(32, "pil")) for split in ("train", "val"))
    with torch.no_grad():
        feats, queries = (net(stacked(images)) for images in (train, val))
    weight = checkpoint.load(tmp_path / "run" / "checkpoint.pth")["state_dict"]
    layer = nn.Linear(512, 6)
    # initial weights of the run: the same command with a learning rate that moves nothing
    frozen = tmp_path / "frozen"
    lincls(data, tmp_path / "tv.pth", frozen, "--end_epoch", "1", "--init_lr", "1e-30", "--cached_train")
    start = checkpoint.load(frozen / "checkpoint.pth")["state_dict"]
    name = "module.classifiers.0.classifier.LinearClassifier."
    w, b = start[f"{name}weight"].double(), start[f"{name}bias"].double()
    assert abs(float(w.std()) - 0.01) < 5e-4 and float(b.abs().max()) < 1e-20
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
    sgd = torch.optim.SGD(layer.parameters(), 1, momentum=0.9, weight_decay=0.01)
    for epoch, rate in enumerate((0.02, 0.015)):  # min + (init - min) (1 + cos(pi e / 2)) / 2
        sgd.param_groups[0]["lr"] = rate
        order = [i for batch in EpochSampler(len(train), 1, 0).at(epoch) for _, i in batch]
        for rows in torch.tensor(order).split(20):  # four of 20 and the last 16
            sgd.zero_grad()
            F.cross_entropy(layer(feats[rows]), train.labels[rows]).backward()
            sgd.step()
    torch.testing.assert_close(weight[f"{name}weight"], layer.weight.detach(), rtol=1e-4, atol=1e-6)
    right = (layer(queries).argmax(1) == val.labels).double().mean()
    assert abs(found["linear_last"] - 100 * float(right)) < 2.1  # one image of 48 near a tie


def test_release_pooling_and_schedule():
    net = build("resnet50", 8)
    sizes = {n: probe.pooled_size(n, net) for n in (1, 4, 8, 12, 13, 14, 15, 16, 17)}
    assert sizes == {1: 14, 4: 14, 8: 7, 12: 7, 13: 7, 14: 7, 15: 7, 16: 7, 17: 1}  # release classifiers/cls_opt.py
    assert main_lincls.block_ids(["14", "last", "layer1"], net) == [14, 17, 4]
    assert main_lincls.block_ids(["last"], build("efficientnet-b0")) == [18]
    args = main_lincls.get_parser().parse_args(["--pretrained", "x"])
    expected = {"init_lr": 30.0, "momentum": 0.9, "wd": 0.0, "batch_size": 256, "end_epoch": 100, "schedule": [60, 80],
                "lr_decay": 0.1, "decay_method": "step", "min_lr": 0.01, "pool_type": "avg"}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert [main_lincls.learning_rate(args, e) for e in (0, 59, 60, 80)] == pytest.approx([30, 30, 3, 0.3])
    args.decay_method, args.end_epoch = "cos", 120
    assert [main_lincls.learning_rate(args, e) for e in (0, 60, 120)] == pytest.approx([30, 15.005, 0.01])
    feats = main_lincls.Features(build("resnet10", 4), [0, 3, 5], "max")(torch.randn(2, 3, 96, 96))
    assert [f.shape[1] for f in feats] == [4 * 14 * 14, 8 * 7 * 7, 32]


def test_a_touched_backbone_is_noticed(data, weights, tmp_path, monkeypatch):
    evaluate = main_lincls.evaluate

    def touched(*args):
        next(m for m in seen[0].modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(1)
        return evaluate(*args)

    seen: list[nn.Module] = []
    features = main_lincls.Features

    def noted(encoder, *args):
        seen.append(encoder)
        return features(encoder, *args)

    monkeypatch.setattr(main_lincls, "Features", noted)
    monkeypatch.setattr(main_lincls, "evaluate", touched)
    with pytest.raises(RuntimeError, match="bn1.running_mean of the frozen backbone changed"):
        lincls(data, weights, tmp_path, *PROBE)


def stop_at(step: int, monkeypatch) -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


@pytest.mark.parametrize("step", [3, 5, 8])  # inside an epoch, at its last step, in the second
def test_probe_stopped_and_resumed_is_bit_identical(step, data, weights, tmp_path, monkeypatch):
    flags = [*PROBE, "--batch_size", "17"]  # five batches an epoch and a last one of 11
    lincls(data, weights, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(SystemExit):
            lincls(data, weights, tmp_path / "cut", *flags)
    assert lincls(data, weights, tmp_path / "cut", *flags) == result(tmp_path / "whole")
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pth") for x in ("whole", "cut"))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert a["scores"] == b["scores"]


def test_a_probe_of_weights_that_have_changed_is_not_resumed(data, tmp_path):
    path = student(tmp_path / "w.pth")
    lincls(data, path, tmp_path / "run", *PROBE)
    saved = checkpoint.load(path)
    saved["state_dict"]["module.encoder_q.conv1.weight"] += 1
    checkpoint.save(path, saved)
    with pytest.raises(UserError, match="backbone-sha256 was"):
        lincls(data, path, tmp_path / "run", *PROBE)


def test_the_last_smaller_batch_is_kept_or_left_out(data, weights, tmp_path):
    images = len([x for x in (data / "train").rglob("*") if x.is_file()])
    assert images % 20 >= 2
    for name, extra, steps in (("kept", [], images // 20 + 1), ("dropped", ["--drop_last"], images // 20)):
        lincls(data, weights, tmp_path / name, "--end_epoch", "1", "--batch_size", "20", "--cached_train", *extra)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == steps


def test_two_processes_train_the_probe_of_one(data, weights, tmp_path, python):
    probe = [*PROBE, "--batch_size", "20"]  # a last batch of 16
    one = lincls(data, weights, tmp_path / "one", *probe)
    flags = [*SMALL_TRAIN, "--data_dir", str(data), "--pretrained", str(weights), *probe]
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["bingo.main_lincls", *flags, "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pth")["state_dict"] for x in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    assert abs(result(tmp_path / "two")["linear_last"] - one["linear_last"]) < 2.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", "nowhere/train: no such folder"),
        ("--pretrained {tmp}/none.pth", "none.pth: no such checkpoint"),
        ("--pretrained {tmp}/foreign.pth", "foreign.pth, taken as resnet18, width 64, stem imagenet: .*missing"),
        ("--arch resnet18", "taken as resnet18, width 8.*missing"),
        ("--width 16", "mis-shaped"),
        ("--selected_feat_id 6", "--selected_feat_id 6: no such block; choose from 0 to 5, layer1"),
        ("--selected_feat_id 5,last", "names a block twice"),
        ("--nchannels 512", "--nchannels 512: block 5 of resnet10 has 64"),
        ("--end_epoch 0", "--end_epoch 0: must be at least 1"),
        ("--init_lr 0", "--init_lr must be above 0"),
        ("--img_size 0", "--img_size 0"),
        ("--dataset cifar10", "cifar10 not found or damaged"),
        ("--val_dir {tmp}/val", "its classes are not those of .*first difference: digit"),
    ],
)
def test_bad_input(flags, message, data, weights, tmp_path):
    torch.save({"state_dict": {"patch_embed.proj.weight": torch.zeros(2)}}, tmp_path / "foreign.pth")
    classes = sorted(p.name for p in (data / "val").iterdir())
    for name in classes[1:]:
        shutil.copytree(data / "val" / name, tmp_path / "val" / name)
    message = message.replace("digit", classes[0])
    with pytest.raises(UserError, match=message):
        lincls(data, weights, tmp_path / "out", *PROBE, *flags.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists()


def test_command_line_error_is_one_line_and_exit_code_2(data, tmp_path, python):
    command = [python, "-m", "bingo.main_knn", "--pretrained", str(tmp_path / "no.pth")]
    done = subprocess.run(
        [*command, *SMALL, "--data_dir", data, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.strip().splitlines() == [
        f"error: {tmp_path}/no.pth: no such checkpoint file; train it first (README, Run), or give another path"
    ]


# -------------------------------------------------------------------------------------------------------- few labels
def semi(data: Path, weights: object, out: Path, *extra: str) -> dict:
    flags = [*SMALL_TRAIN, "--data_dir", str(data), "--pretrained", str(weights), "--output-dir", str(out)]
    assert main_semi.main([*flags, *extra]) == 0
    return result(out)


def test_few_labels_fine_tune_the_whole_network(data, weights, tmp_path):
    found = semi(data, weights, tmp_path, *"--fraction 0.5 --end_epoch 16 --aug_backend pil".split())
    assert found["labelled"] == 48 and found["of"] == 96
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    net = build("resnet10", 8, "cifar_pool")
    net.fc = nn.Linear(64, 6)
    net.load_state_dict(saved["state_dict"])
    images = image_folder(data / "val", plain(32, "pil"))
    with torch.no_grad():
        logits = net.eval()(stacked(images))
    assert found["semi"] == pytest.approx(100 * float((logits.argmax(1) == images.labels).double().mean()))
    assert found["semi"] <= found["semi_top5"] <= 100
    before = checkpoint.read_weights(weights)
    assert not torch.equal(saved["state_dict"]["conv1.weight"], before["conv1.weight"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert abs(losses[0] - np.log(6)) < 0.3 and np.mean(losses[-9:]) < losses[0] - 0.2
    assert saved["args"]["init_lr"] == 0.01 and saved["args"]["head_lr_mult"] == 20
    groups = saved["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(20 * groups[0]["lr"])


def test_statistics_are_made_the_same_before_the_evaluation(data, weights, tmp_path, monkeypatch):
    """As if another process had sent its own: the number is that of the network that it left."""
    trained = []

    def sent(network):
        trained.append(network.training)
        network.bn1.running_mean.fill_(torch.nan)

    monkeypatch.setattr(main_semi.distributed, "same_buffers", sent)
    monkeypatch.setattr(main_semi, "topk", lambda logits, y, ks=(1, 5): logits.isnan().any().double().expand(len(ks)))
    found = semi(data, weights, tmp_path, "--end_epoch", "1", "--fraction", "0.2")
    assert trained == [True] and found["semi"] == 100 * 3 / 48  # each of three batches counts once


def test_defaults_follow_the_share_of_labels():
    parse = main_semi.get_parser().parse_args
    one, ten = parse(["--pretrained", "x"]), parse(["--pretrained", "x", "--end_epoch", "3"])
    main_semi.resolve(one, 12811, 1281167, 8)
    main_semi.resolve(ten, 128116, 1281167, 8)
    assert (one.end_epoch, one.init_lr, one.head_lr_mult) == (60, 0.02, 100)
    assert (ten.end_epoch, ten.init_lr, ten.head_lr_mult) == (3, 0.01, 20)


def test_too_few_labels(data, weights, tmp_path):
    parse = main_semi.get_parser().parse_args
    args = parse(["--pretrained", "x", "--batch_size", "64"])
    main_semi.resolve(args, 11, 1000, 4)
    assert args.batch_size == 8  # two for each process, the rest waits for another epoch
    for labelled, world in ((1, 1), (3, 4), (7, 4)):
        with pytest.raises(UserError, match=f"{labelled} labelled images are fewer than two for each of {world} proc"):
            main_semi.resolve(parse(["--pretrained", "x", "--batch_size", "64"]), labelled, 1000, world)
    (tmp_path / "one.txt").write_text(next((data / "train").rglob("*.*")).name)
    with pytest.raises(UserError, match="1 labelled images are fewer than two .*raise --fraction"):
        semi(data, weights, tmp_path / "out", "--labels", str(tmp_path / "one.txt"))
    assert not (tmp_path / "out").exists()


def test_lists_of_labelled_images(data, weights, tmp_path):
    names = [sorted(folder.iterdir())[:3] for folder in sorted((data / "train").iterdir())]
    simclr = "\n".join(path.name for group in names for path in group)  # file names alone, as published
    (tmp_path / "names.txt").write_text(simclr + "\n")
    (tmp_path / "paths.txt").write_text("\n".join(f"{p.parent.name}/{p.name}" for g in names for p in g))
    a = semi(data, weights, tmp_path / "a", "--labels", str(tmp_path / "names.txt"), "--end_epoch", "1")
    b = semi(data, weights, tmp_path / "b", "--labels", str(tmp_path / "paths.txt"), "--end_epoch", "1")
    assert a == b and a["labelled"] == 18
    bad = {
        "dragon/dragon_1.jpg": "list.txt, line 1: .*dragon_1.jpg does not exist",
        "dragon_1.jpg": "list.txt, line 1: no training image is named dragon_1.jpg",
        f"{names[0][0].parent.name}/{names[0][0].name} 3": "list.txt, line 1: label 3, but its folder is class 0",
        "": "the list is empty",
    }
    for line, message in bad.items():
        (tmp_path / "list.txt").write_text(line + "\n")
        with pytest.raises(UserError, match=message):
            semi(data, weights, tmp_path / "c", "--labels", str(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="--fraction 0.0"):
        semi(data, weights, tmp_path / "c", "--fraction", "0")


def test_fine_tuning_stopped_and_resumed_is_bit_identical(data, weights, tmp_path, monkeypatch):
    flags = "--fraction 0.5 --end_epoch 2".split()
    whole = semi(data, weights, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(SystemExit):
            semi(data, weights, tmp_path / "cut", *flags)
    assert semi(data, weights, tmp_path / "cut", *flags) == whole
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pth")["state_dict"] for x in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------ export
def to_torchvision(key: str) -> str:
    """detectron2's names back to torchvision's, written independently of the export."""
    parts = key.removeprefix("stem.").split(".")
    if parts[0].startswith("res"):
        parts[0] = f"layer{int(parts[0][3:]) - 1}"
    if "shortcut" in parts:
        at = parts.index("shortcut")
        parts[at : at + 1 + (parts[at + 1] == "norm")] = ["downsample", "1" if parts[at + 1] == "norm" else "0"]
    elif "norm" in parts:
        at = parts.index("norm")
        parts[at - 1 : at + 1] = [parts[at - 1].replace("conv", "bn")]
    return ".".join(parts)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_export_round_trip(arch, tmp_path, capsys):
    path = student(tmp_path / "w.pth", arch, 64, "imagenet")
    source = checkpoint.read_weights(path)
    for kind in ("torchvision", "detectron2"):
        flags = ["--pretrained", str(path), "--format", kind, "--out", str(tmp_path / f"{kind}.pth")]
        assert export_detection.main(flags) == 0
    said = capsys.readouterr().out
    assert (f"DEPTH {arch[6:]}" in said) and ("RES2_OUT_CHANNELS 64" in said) == (arch == "resnet18")
    plain_state = checkpoint.load(tmp_path / "torchvision.pth")
    d2 = checkpoint.load(tmp_path / "detectron2.pth")  # tensors and plain containers alone
    assert d2["__author__"] == "MOCO" and d2["matching_heuristics"] is True
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var", "res2.0.conv1.norm.bias", "res5.1.conv2.weight",
            "res3.0.shortcut.weight", "res3.0.shortcut.norm.weight"} <= set(d2["model"])  # fmt: skip
    back = {to_torchvision(k): v for k, v in d2["model"].items()}
    expected = {k: v for k, v in source.items() if not k.startswith("fc.")}
    for state in (plain_state, back):
        assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)
    net = getattr(torchvision.models, arch)()
    net.load_state_dict(plain_state | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})


def test_export_refuses_what_detectron2_lacks(weights, tmp_path):
    with pytest.raises(UserError, match="detectron2 has no resnet10 of width 8"):
        export_detection.main(["--pretrained", str(weights), "--out", str(tmp_path / "a.pth")])
    with pytest.raises(UserError, match="must end in .pth"):
        export_detection.main(["--pretrained", str(weights), "--out", str(tmp_path / "a.pkl")])
    with pytest.raises(UserError, match="nothing to export"):
        export_detection.main(["--pretrained", "none", "--out", str(tmp_path / "a.pth")])
    assert not list(tmp_path.iterdir())
