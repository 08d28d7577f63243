"""Evaluation of kscl: linear probe, neighbours of pooled and projected features, export; and the table of the arms."""

import csv
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from kscl import main_knn, main_lincls
from kscl.arch import build, mlp_head
from kscl.lab import arms, export_detection
from shared_utils import UserError, checkpoint, evaluation, probe
from shared_utils.augment import plain
from shared_utils.data import ImageList, image_folder
from shared_utils.lab import mini, results
from shared_utils.neighbours import neighbours
from shared_utils.run import Run

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--img_size 32 --workers 0 --threads 1".split()
SMALL_TRAIN = [*SMALL, *"--batch_size 16 --log-every 1".split()]
PROBE = "--end_epoch 2 --init_lr 1 --schedule 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The mini images, fewer of them."""
    root, full = tmp_path_factory.mktemp("images"), mini.ensure("images")
    for split, count in (("train", 8), ("val", 6)):
        for folder in sorted((full / split).iterdir())[:6]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


def pretrained(path: Path, arch: str = "resnet10", width: int = 8, stem: str = "cifar_pool") -> Path:
    """A checkpoint as `kscl.main_kscl` writes it, head and queue included."""
    torch.manual_seed(3)
    net = build(arch, width, stem)
    net.fc = mlp_head(net.num_features, 16)
    with torch.no_grad():
        for _ in range(10 if width < 64 else 2):
            net(torch.randn(16, 3, 32, 32))
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.encoder_k.{k}": v + 1 for k, v in net.state_dict().items()}
    state |= {"module.queue": torch.randn(3, 16, 32), "module.queue_rank": torch.ones(32, dtype=torch.int32)}
    checkpoint.save(path, {"state_dict": state, "args": {"arch": arch, "width": width, "stem": stem}})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint.pth")


def call(module, data: Path, weights: object, out: Path, *extra: str) -> dict:
    common = SMALL if module is main_knn else SMALL_TRAIN
    flags = [*common, "--data_dir", str(data), "--pretrained", str(weights), "--output-dir", str(out), *extra]
    assert module.main(flags) == 0
    return json.loads((out / "result.json").read_text())


def stacked(images: ImageList) -> torch.Tensor:
    return torch.stack([images[i][0] for i in range(len(images))])


# --- linear probe ----------------------------------------------------------------------------------------------------


def test_blocks_are_probed_at_once_as_each_alone(data, weights, tmp_path):
    """The losses are summed, so a classifier does not see the other; and validation features may be kept or not."""
    both = call(main_lincls, data, weights, tmp_path / "both", *PROBE, "--selected_feat_id", "layer3,last")
    assert set(both["blocks"]) == {"4", "5"} and both["linear"] == both["blocks"]["5"]["best"]
    saved = checkpoint.load(tmp_path / "both" / "checkpoint.pth")["state_dict"]
    names = [f"module.classifiers.{i}.classifier.LinearClassifier.{k}" for i in (0, 1) for k in ("weight", "bias")]
    assert sorted(saved) == sorted(names)
    assert saved[names[0]].shape == (6, 32 * 16) and saved[names[2]].shape == (6, 64)  # layer3 is 4 x 4 here
    flags = ["--selected_feat_id", "layer3", "--recompute_val"]
    alone = call(main_lincls, data, weights, tmp_path / "alone", *PROBE, *flags)
    assert alone["blocks"] == {"4": both["blocks"]["4"]}
    only = checkpoint.load(tmp_path / "alone" / "checkpoint.pth")["state_dict"]
    torch.testing.assert_close(only[names[0]], saved[names[0]])  # the first that is drawn in both runs


def test_the_last_smaller_batch_is_kept_or_left_out(data, weights, tmp_path):
    images = len([x for x in (data / "train").rglob("*") if x.is_file()])
    assert images % 20 >= 2
    for name, extra, steps in (("kept", [], images // 20 + 1), ("dropped", ["--drop_last"], images // 20)):
        call(
            main_lincls,
            data,
            weights,
            tmp_path / name,
            "--end_epoch",
            "1",
            "--batch_size",
            "20",
            "--cached_train",
            *extra,
        )
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == steps


def test_the_probe_scores_what_its_classifier_predicts(data, weights, tmp_path):
    found = call(main_lincls, data, weights, tmp_path, *PROBE, "--cached_train")
    net = build("resnet10", 8, "cifar_pool")
    checkpoint.load_strict(net, checkpoint.read_weights(weights), drop=("fc.*",))
    net.fc = nn.Linear(64, 6)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    net.fc.load_state_dict({k.split(".")[-1]: v for k, v in saved.items()})
    val = image_folder(data / "val", plain(32))
    with torch.no_grad():
        right = (net.eval()(stacked(val)).argmax(1) == val.labels).double().mean()
    assert found["linear_last"] == pytest.approx(100 * float(right))


def test_features_that_do_not_fit_in_memory(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "available_memory", lambda: 2 * 4 * 36 * 64 - 1)
    with pytest.raises(UserError, match="features of 36 images, 64 values each, .* give --recompute_val"):
        call(main_lincls, data, weights, tmp_path / "a", *PROBE)
    assert not (tmp_path / "a").exists()


def test_ids_pooling_and_schedule():
    net = build("resnet50", 8)
    sizes = {n: probe.pooled_size(n, net) for n in (1, 4, 8, 13, 14, 15, 16, 17)}
    assert sizes == {1: 14, 4: 14, 8: 7, 13: 7, 14: 7, 15: 7, 16: 7, 17: 1}
    args = main_lincls.get_parser().parse_args(["--pretrained", "x"])
    assert main_lincls.block_ids(args.selected_feat_id, net) == [17]
    assert [main_lincls.learning_rate(args, e) for e in (0, 59, 60, 80, 99)] == pytest.approx([30, 30, 3, 0.3, 0.3])
    assert (args.end_epoch, args.batch_size, args.wd, args.momentum) == (100, 256, 0, 0.9)
    maps = build("resnet50", 8).eval().maps(torch.randn(1, 3, 64, 64), range(18))
    assert [m.shape[1] for m in maps.values()] == [8] * 2 + [32] * 3 + [64] * 4 + [128] * 6 + [256] * 3


def test_the_probe_stopped_and_resumed_is_bit_identical(data, weights, tmp_path, monkeypatch):
    flags, log = [*PROBE, "--cached_train"], Run.log
    whole = call(main_lincls, data, weights, tmp_path / "whole", *flags)

    def stopping(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stopping)
        with pytest.raises(SystemExit):
            call(main_lincls, data, weights, tmp_path / "cut", *flags)
    assert call(main_lincls, data, weights, tmp_path / "cut", *flags) == whole
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pth")["state_dict"] for x in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", "nowhere/train: no such folder"),
        ("--pretrained {tmp}/none.pth", "none.pth: no such checkpoint"),
        ("--arch resnet18", "taken as resnet18, width 8.*missing"),
        ("--selected_feat_id 6", "--selected_feat_id 6: no such block; choose from 0 to 5, layer1"),
        ("--end_epoch 0", "--end_epoch 0: must be at least 1"),
    ],
)
def test_bad_input(flags, message, data, weights, tmp_path):
    with pytest.raises(UserError, match=message):
        call(main_lincls, data, weights, tmp_path / "out", *PROBE, *flags.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists()


def test_a_command_line_error_is_one_line_and_exit_code_2(data, tmp_path, python):
    flags = ["--pretrained", str(tmp_path / "no.pth"), "--data_dir", str(data), "--device", "cpu"]
    command = [python, "-m", "kscl.main_knn", *SMALL, *flags, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path}/no.pth: no such checkpoint file; train it first (README, Run), or give another path"
    ]


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["backbone", "projected"])
def test_neighbours_vote_in_the_query_encoders_space(kind, data, weights, tmp_path):
    net = build("resnet10", 8, "cifar_pool")
    net.fc = mlp_head(64, 16)
    checkpoint.load_strict(net, checkpoint.read_weights(weights))
    images, val = (image_folder(data / split, plain(32)) for split in ("train", "val"))
    with torch.no_grad():
        bank, queries = (F.normalize(net.eval()(stacked(x), kind == "backbone"), dim=1) for x in (images, val))
    found = call(main_knn, data, weights, tmp_path, "--features", kind, "--k", "30", "--tau", "0.2")
    assert found["features"] == kind
    for name, k, tau in (("knn200", 30, 0.2), ("knn", 20, 0.07)):
        sim, index = (queries @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(val), 6).scatter_add_(1, images.labels[index], (sim / tau).exp())
        assert found[name] == pytest.approx(100 * float((votes.argmax(1) == val.labels).double().mean()))
    nearest = neighbours(bank, 5, torch.device("cpu"))
    same = (images.labels[nearest] == images.labels[:, None]).double().mean()
    assert found["purity"] == pytest.approx(100 * float(same))


def test_projected_features_need_a_head(data, tmp_path):
    net = build("resnet10", 8, "cifar_pool")
    checkpoint.save(tmp_path / "bare.pth", {"state_dict": net.state_dict(), "args": {"arch": "resnet10", "width": 8}})
    for weights in (tmp_path / "bare.pth", "none"):
        with pytest.raises(UserError, match="--features projected: .* has no projection head"):
            call(main_knn, data, weights, tmp_path / "out", "--features", "projected")


# --- export ----------------------------------------------------------------------------------------------------------


def test_export(weights, tmp_path, capsys):
    path = pretrained(tmp_path / "w.pth", "resnet50", 64, "imagenet")
    source = {k: v for k, v in checkpoint.read_weights(path).items() if not k.startswith("fc")}
    for kind in ("torchvision", "detectron2"):
        flags = ["--pretrained", str(path), "--format", kind, "--out", str(tmp_path / f"{kind}.pth")]
        assert export_detection.main(flags) == 0
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False" in capsys.readouterr().out
    state = checkpoint.load(tmp_path / "torchvision.pth")
    assert state.keys() == source.keys() and all(torch.equal(state[k], source[k]) for k in source)
    net = torchvision.models.resnet50()
    net.load_state_dict(state | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})
    ours, x = build("resnet50").eval(), torch.randn(1, 3, 64, 64)
    ours.load_state_dict(state)
    net.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, pre_out=True), net.eval()(x), rtol=1e-4, atol=1e-4)
    d2 = checkpoint.load(tmp_path / "detectron2.pth")
    assert d2["__author__"] == "MOCO" and d2["matching_heuristics"] is True and len(d2["model"]) == len(source)
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.bias": "bn1.bias",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.running_mean": "layer1.0.downsample.1.running_mean",
        "res4.5.conv3.norm.running_var": "layer3.5.bn3.running_var",
        "res5.2.conv2.weight": "layer4.2.conv2.weight",
    }
    assert all(torch.equal(d2["model"][a], source[b]) for a, b in pairs.items())
    with pytest.raises(UserError, match="detectron2 has no resnet10 of width 8"):
        export_detection.main(["--pretrained", str(weights), "--out", str(tmp_path / "a.pth")])
    assert not (tmp_path / "a.pth").exists()


# --- arms ------------------------------------------------------------------------------------------------------------

MEASURED = {"moco": [20.0, 22.0, 21.0], "k5": [25.0, 25.5, 26.0], "mean": [24.5, 25.5, 26.5], "abs": [18.0]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Finished runs of four arms, and one without its linear evaluation."""
    root = tmp_path / "small" / "cifar10"
    for arm, scores in MEASURED.items():
        for seed, score in enumerate(scores):
            folder = root / arm / f"seed{seed}"
            for part in ("", "-knn", "-linear"):
                folder.with_name(folder.name + part).mkdir(parents=True)
            knn = {"knn": score + 10, "knn200": score + 5, "few_shot": score, "purity": 30.0 + seed}
            (root / arm / f"seed{seed}-knn" / "result.json").write_text(json.dumps(knn))
            (root / arm / f"seed{seed}-linear" / "result.json").write_text(json.dumps({"linear_last": 45.0 + seed}))
            facts = {"git_commit": "0123456789ab", "git_dirty": False, "hardware": "2 CPU cores", "date": "2026-11-22"}
            (folder / "config.json").write_text(json.dumps(facts))
            checkpoint.save(folder / "checkpoint.pth", {"progress": {"seconds": 120.0}})
            rows = [{"step": n, "loss": 7 - n / 100, "lr": 0.1, "subspace/rank_mean": 2.0} for n in range(10, 500, 10)]
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "k3" / "seed0-knn").mkdir(parents=True)
    (root / "k3" / "seed0-knn" / "result.json").write_text(json.dumps({"knn": 1.0, "few_shot": 1.0, "purity": 1.0}))
    return root


def test_recorded_rows_are_valid_and_follow_the_rule(tree: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "copy" / "kscl"
    folder.mkdir(parents=True)
    rows = [row for row in results.read(ROOT / "kscl")[0] if not row["id"].startswith("small-")]
    with open(folder / "results.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, results.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(arms.ARMS, "home", folder)
    for _ in range(2):
        assert arms.main([str(tree), "--record"]) == 0
    printed = capsys.readouterr().out
    assert "| KSCL, K = 5 (A3) | 3 | 25.50 ± 0.50 | 35.50 ± 0.50 | 30.50 ± 0.50 |" in printed and "K = 3" not in printed
    found, problems = results.read(folder)
    left_out = [row for row in found if row["tier"] == "small" and row["status"].startswith("not run")]
    assert problems == [] and len(found) == len(rows) + 3 * len(arms.ARMS.metrics) + len(left_out)
    assert len(left_out) == len(arms.ARMS.arms) - 3
    by_id = {row["id"]: row for row in found}
    assert by_id["small-cifar10-abs-few_shot"]["status"] == "not run (needs further seeds, one says nothing)"
    assert by_id["small-cifar10-k5-vs-moco-few_shot"]["status"].startswith("not testable at this size (3 seeds")
    assert by_id["small-cifar10-k5-vs-mean-few_shot"]["status"] == "descriptive"
    log = json.loads((folder / "lab/logs/cifar10-k5.json").read_text())
    assert log["2"]["metrics"]["few_shot"] == 26.0 and log["0"]["curve"][-1]["subspace/rank_mean"] == 2.0


def test_every_pair_is_of_known_arms() -> None:
    named = {arm for pair in arms.ARMS.pairs for arm in pair}
    assert named == set(arms.ARMS.arms)
    script = (ROOT / "kscl/run_arms.sh").read_text()
    assert all(f"\n    {arm}) " in script for arm in arms.ARMS.arms)
