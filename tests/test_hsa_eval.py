"""Evaluation of hsa: linear probes of two levels, neighbours, few labels with self-training, export."""

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hsa import main_knn, main_lincls, main_semi
from hsa.arch import build, mlp_head
from hsa.lab import export_detection
from shared_utils import UserError, checkpoint, evaluation, probe
from shared_utils.augment import plain
from shared_utils.data import ImageList, image_folder
from shared_utils.evaluation import labelled_indices, topk
from shared_utils.lab import mini
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
    for split, count in (("train", 16), ("val", 8)):
        for folder in sorted((full / split).iterdir())[:6]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


def pretrained(path: Path, arch: str = "resnet10", width: int = 8, stem: str = "cifar_pool", inter="stage") -> Path:
    """A checkpoint as `hsa.main_moco` writes it, heads of both levels included."""
    torch.manual_seed(3)
    net = build(arch, width, stem)
    net.fc = mlp_head(net.num_features, 16)
    net.add_level3(inter, 16)
    with torch.no_grad():
        for _ in range(30 if width < 64 else 1):  # of the whole network only names and values are looked at
            net(torch.randn(16, 3, 32, 32))
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.encoder_k.{k}": v + 1 for k, v in net.state_dict().items()}
    state |= {"module.queue": torch.randn(16, 32), "module.queue_l3": torch.randn(16, 32)}
    checkpoint.save(path, {"state_dict": state, "args": {"arch": arch, "width": width, "stem": stem}})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint.pth")


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def call(module, data: Path, weights: object, out: Path, *extra: str) -> dict:
    common = SMALL if module is main_knn else SMALL_TRAIN
    flags = [*common, "--data_dir", str(data), "--pretrained", str(weights), "--output-dir", str(out), *extra]
    assert module.main(flags) == 0
    return result(out)


def stacked(images: ImageList) -> torch.Tensor:
    return torch.stack([images[i][0] for i in range(len(images))])


def stop_at(step: int, monkeypatch, folder: str = "") -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step and folder in str(self.dir):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


# ------------------------------------------------------------------------------------------------------ linear probe
def test_two_levels_are_probed_at_once_as_each_alone(data, weights, tmp_path):
    """The losses are summed, so a classifier does not see the other."""
    both = call(main_lincls, data, weights, tmp_path / "both", *PROBE)
    assert set(both["blocks"]) == {"4", "5"} and both["linear"] == both["blocks"]["5"]["best"]
    saved = checkpoint.load(tmp_path / "both" / "checkpoint.pth")["state_dict"]
    names = [f"module.classifiers.{i}.classifier.LinearClassifier.{k}" for i in (0, 1) for k in ("weight", "bias")]
    assert sorted(saved) == sorted(names)
    assert saved[names[0]].shape == (6, 32 * 16) and saved[names[2]].shape == (6, 64)  # layer3 is 4 x 4 here
    again = call(main_lincls, data, weights, tmp_path / "val", *PROBE, "--recompute_val")
    assert again == both
    alone = call(main_lincls, data, weights, tmp_path / "alone", *PROBE, "--selected_feat_id", "layer3")
    assert set(alone["blocks"]) == {"4"}
    only = checkpoint.load(tmp_path / "alone" / "checkpoint.pth")["state_dict"]
    torch.testing.assert_close(only[names[0]], saved[names[0]])  # the first that is drawn in both runs


def test_recomputed_validation_keeps_no_features(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "collect", None)
    evaluate, seen = main_lincls.evaluate, []

    def noted(probes, batches, *args):
        batches = list(batches)
        seen.extend(len(feats[0]) for feats, _ in batches)
        return evaluate(probes, batches, *args)

    monkeypatch.setattr(main_lincls, "evaluate", noted)
    call(main_lincls, data, weights, tmp_path, *PROBE, "--recompute_val")
    assert seen == [16, 16, 16] * 2


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


def test_features_that_do_not_fit_in_memory(data, weights, tmp_path, monkeypatch):
    # 32 channels of 4 x 4 and 64
    train, val = 4 * 96 * 576, 4 * 48 * 576
    memory = lambda bytes: monkeypatch.setattr(evaluation, "available_memory", lambda: bytes)  # noqa: E731
    memory(2 * (train + val) - 1)
    with pytest.raises(UserError, match="features of 48 images, 576 values each, .* give --recompute_val"):
        call(main_lincls, data, weights, tmp_path / "a", *PROBE, "--cached_train")
    call(main_lincls, data, weights, tmp_path / "b", *PROBE, "--cached_train", "--recompute_val", "--end_epoch", "1")
    memory(2 * train - 1)
    with pytest.raises(UserError, match="features of 96 images, 576 values each, .* leave --cached_train away"):
        call(main_lincls, data, weights, tmp_path / "a", *PROBE, "--cached_train", "--recompute_val")
    memory(2 * val - 1)
    with pytest.raises(UserError, match="give --recompute_val"):
        call(main_lincls, data, weights, tmp_path / "a", *PROBE)
    assert not (tmp_path / "a").exists()


def test_hits_are_counted_where_a_line_is_written_alone(data, weights, tmp_path, monkeypatch):
    counted = []

    def noted(logits, labels):
        counted.append(len(labels))
        return topk(logits, labels)

    for module in (main_lincls, probe):
        monkeypatch.setattr(module, "topk", noted)
    call(main_lincls, data, weights, tmp_path, *PROBE, "--end_epoch", "1", "--log-every", "4")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], "acc1_4" in row, "val/top1_4" in row) for row in lines] == [
        (1, True, False), (4, True, False), (6, True, True)
    ]  # fmt: skip
    assert len(counted) == 2 * (3 + 3)  # three lines, three batches of validation


def test_release_ids_pooling_and_schedule():
    net = build("resnet50", 8)
    sizes = {n: probe.pooled_size(n, net) for n in (1, 4, 8, 12, 13, 14, 15, 16, 17)}
    assert sizes == {1: 14, 4: 14, 8: 7, 12: 7, 13: 7, 14: 7, 15: 7, 16: 7, 17: 1}  # release classifiers/cls_opt.py
    args = main_lincls.get_parser().parse_args(["--pretrained", "x"])
    assert main_lincls.block_ids(args.selected_feat_id, net) == [14, 17]
    assert [main_lincls.learning_rate(args, e) for e in (0, 59, 60, 80, 99)] == pytest.approx([30, 30, 3, 0.3, 0.3])
    assert (args.end_epoch, args.batch_size, args.wd, args.momentum) == (100, 256, 0, 0.9)
    feats = main_lincls.Features(net, [14, 17], "avg")(torch.randn(1, 3, 224, 224))
    assert [f.shape[1] for f in feats] == [128 * 7 * 7, 256]


def test_probe_stopped_and_resumed_is_bit_identical(data, weights, tmp_path, monkeypatch):
    flags = [*PROBE, "--cached_train"]
    whole = call(main_lincls, data, weights, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(7, patch)
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
        ("--pretrained {tmp}/foreign.pth", "foreign.pth, taken as resnet50, width 64, stem imagenet: .*missing"),
        ("--arch resnet18", "taken as resnet18, width 8.*missing"),
        ("--selected_feat_id 6", "--selected_feat_id 6: no such block; choose from 0 to 5, layer1"),
        ("--end_epoch 0", "--end_epoch 0: must be at least 1"),
    ],
)
def test_bad_input(flags, message, data, weights, tmp_path):
    torch.save({"state_dict": {"patch_embed.proj.weight": torch.zeros(2)}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=message):
        call(main_lincls, data, weights, tmp_path / "out", *PROBE, *flags.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists()


def test_command_line_error_is_one_line_and_exit_code_2(data, tmp_path, python):
    flags = ["--pretrained", str(tmp_path / "no.pth"), "--data_dir", str(data), "--device", "cpu"]
    command = [python, "-m", "hsa.main_semi", *SMALL, *flags, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path}/no.pth: no such checkpoint file; train it first (README, Run), or give another path"
    ]


# -------------------------------------------------------------------------------------------------------- neighbours
def test_neighbours_are_those_of_the_query_encoders_pooled_vector(data, weights, tmp_path):
    net = build("resnet10", 8, "cifar_pool")
    checkpoint.load_strict(net, checkpoint.read_weights(weights), drop=("fc*", "stage3*"))
    images, val = (image_folder(data / split, plain(32, "pil")) for split in ("train", "val"))
    with torch.no_grad():
        bank, queries = (F.normalize(net.eval()(stacked(x), pre_out=True), dim=1) for x in (images, val))
    nearest = neighbours(bank, 5, torch.device("cpu"))
    np.save(tmp_path / "own.npy", nearest.numpy())
    found = call(main_knn, data, weights, tmp_path, "--bags", str(tmp_path / "own.npy"), "--aug_backend", "pil")
    assert found["overlap"] == 100
    assert found["purity"] == pytest.approx(
        100 * float((images.labels[nearest] == images.labels[:, None]).double().mean())
    )
    s = (bank @ bank.T).double()
    off = ~torch.eye(len(s), dtype=torch.bool)
    assert found["bag_gap"] == pytest.approx(float(s.gather(1, nearest).mean() - s[off].mean()), abs=1e-5)
    sim, index = (queries @ bank.T).topk(20, dim=1)
    votes = torch.zeros(len(val), 6).scatter_add_(1, images.labels[index], (sim / 0.07).exp())
    assert found["knn"] == pytest.approx(100 * float((votes.argmax(1) == val.labels).double().mean()))
    for wrong in (nearest[:-1], nearest + len(images), nearest.float()):
        np.save(tmp_path / "wrong.npy", wrong.numpy())
        with pytest.raises(UserError, match="wrong.npy: "):
            call(main_knn, data, weights, tmp_path, "--bags", str(tmp_path / "wrong.npy"))
    header = bytearray((tmp_path / "own.npy").read_bytes())
    header[header.index(b")")] ^= 8  # the shape's bracket: numpy raises what its tokeniser raises
    (tmp_path / "wrong.npy").write_bytes(header)
    with pytest.raises(UserError, match="wrong.npy: not a readable .npy array"):
        call(main_knn, data, weights, tmp_path, "--bags", str(tmp_path / "wrong.npy"))
    with pytest.raises(UserError, match="no such file"):
        call(main_knn, data, weights, tmp_path, "--bags", str(tmp_path / "none.npy"))


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.count = max(self.count, out.numel())
        return out


def test_scores_of_bags_do_not_copy_the_features(monkeypatch):
    monkeypatch.setattr(main_knn, "CHUNK", 64)
    z = F.normalize(torch.randn(1000, 24), dim=1)
    with Largest() as largest:
        main_knn.mean_cosine(z)
        main_knn.bag_scores(z, torch.randint(1000, (1000, 3)), None)
        main_knn.bag_scores(z, torch.arange(1000) % 5, None)
    assert 64 * 24 <= largest.count <= 3000  # a chunk; the bags themselves


# -------------------------------------------------------------------------------------------------------- few labels
def test_entropy_is_in_bits_and_the_threshold_keeps_the_sure():
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0]])
    logits = (p + 1e-30).log()
    torch.testing.assert_close(
        main_semi.entropy_bits(logits),
        torch.tensor([2, 0, 1, -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)], dtype=torch.float64),
    )
    sure = torch.stack([main_semi.entropy_bits(logits), logits.flip(1).argmax(1).double()], 1)
    rows, labels = main_semi.pseudo_labels(sure, 0.99)
    assert rows.tolist() == [1, 3] and labels.tolist() == [3, 3] and labels.dtype == torch.int64
    assert main_semi.pseudo_labels(sure, 1.001)[0].tolist() == [1, 2, 3]
    assert len(main_semi.pseudo_labels(sure[:1], 1.0)[0]) == 0


FEW = "--fraction 0.25 --end_epoch 3 --init_lr 0.02".split()


def test_self_training_uses_predictions_and_the_pretrained_network(data, weights, tmp_path, monkeypatch):
    seen: list[tuple[dict, list]] = []
    finetune = main_semi.finetune

    def noted(run, network, images, facts):
        seen.append(
            ({k: v.clone() for k, v in network.state_dict().items()}, list(zip(images.paths(), images.labels.tolist())))
        )
        finetune(run, network, images, facts)

    gather_rows, exchanged = main_semi.gather_rows, []

    def gathered(rows, count, device):
        exchanged.append(tuple(rows.shape))
        return gather_rows(rows, count, device)

    monkeypatch.setattr(main_semi, "finetune", noted)
    monkeypatch.setattr(main_semi, "gather_rows", gathered)
    found = call(main_semi, data, weights, tmp_path, *FEW, "--threshold", "2.5")
    (first, labelled), (second, both) = seen
    assert all(torch.equal(first[k], second[k]) for k in first)  # anew from the pretrained weights, same classifier
    assert len(labelled) == 24 == found["labelled"] and set(labelled) <= set(both)
    assert len(both) == 24 + found["pseudo_labelled"] > 24
    assert exchanged == [(72, 2)]  # of an unlabelled image its entropy and class, not its logits
    # the pseudo-labels are the fine-tuned network's own predictions on images whose labels were not given
    net = build("resnet10", 8, "cifar_pool")
    net.fc = nn.Linear(64, 6)
    net.load_state_dict(checkpoint.load(tmp_path / "finetune" / "checkpoint.pth")["state_dict"])
    images = image_folder(data / "train", plain(32))
    with torch.no_grad():
        logits = net.eval()(stacked(images))
    bits = main_semi.entropy_bits(logits)
    given = {path for path, _ in labelled}
    expected = {
        (path, int(logits[i].argmax())) for i, path in enumerate(images.paths()) if path not in given and bits[i] <= 2.5
    }
    assert set(both) - set(labelled) == expected
    truth = dict(zip(images.paths(), images.labels.tolist()))
    assert found["pseudo_right"] == pytest.approx(100 * np.mean([truth[p] == y for p, y in expected]))
    assert {"semi", "semi_top5", "semi_self", "semi_self_top5"} <= set(found)
    val = image_folder(data / "val", plain(32))
    with torch.no_grad():
        right = (net(stacked(val)).argmax(1) == val.labels).double().mean()
    assert found["semi"] == pytest.approx(100 * float(right))


@pytest.mark.parametrize("stage", ["finetune", "selftrain"])
def test_either_training_stopped_and_resumed_is_bit_identical(stage, data, weights, tmp_path, monkeypatch):
    flags = [*FEW, "--threshold", "2.5"]
    whole = call(main_semi, data, weights, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(1, patch, stage)
        with pytest.raises(SystemExit):
            call(main_semi, data, weights, tmp_path / "cut", *flags)
    assert not (tmp_path / "cut" / "result.json").exists()
    with monkeypatch.context() as patch:
        if stage == "selftrain":  # goes on with the pseudo-labels of before
            patch.setattr(main_semi, "sureness", None)
        assert call(main_semi, data, weights, tmp_path / "cut", *flags) == whole
    assert (tmp_path / "cut" / "pseudo.json").read_text() == (tmp_path / "whole" / "pseudo.json").read_text()
    for part in ("finetune", "selftrain"):
        a, b = (checkpoint.load(tmp_path / x / part / "checkpoint.pth")["state_dict"] for x in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_pseudo_labels_of_another_network_are_not_taken(data, weights, tmp_path):
    flags = [*FEW, "--threshold", "2.57", "--end_epoch", "1"]
    whole = call(main_semi, data, weights, tmp_path, *flags)
    file = tmp_path / "pseudo.json"
    own = json.loads(file.read_text())
    assert len(own["labels"]) == whole["pseudo_labelled"] > 1 and own["threshold_bits"] == 2.57
    file.write_text(json.dumps(own | {"source": "other", "labels": own["labels"][:1]}))
    assert call(main_semi, data, weights, tmp_path, *flags) == whole and json.loads(file.read_text()) == own
    file.write_text(json.dumps(own | {"labels": own["labels"][:1]}))  # changed by hand: the training was of others
    with pytest.raises(UserError, match="pseudo-sha256 was"):
        call(main_semi, data, weights, tmp_path, *flags)
    file.write_text(file.read_text()[:-5])
    with pytest.raises(UserError, match="pseudo.json: not a readable file of pseudo-labels; remove it"):
        call(main_semi, data, weights, tmp_path, *flags)


def test_process_0_decides_whether_there_are_pseudo_labels(tmp_path, monkeypatch):
    """Another process that looks when the new file is already there does what process 0 did, collectives included."""
    file, calls = tmp_path / "pseudo.json", []
    args = SimpleNamespace(threshold=1.0, overwrite=False)
    run: Any = SimpleNamespace(args=args, rank=0, world=1, device=torch.device("cpu"))
    network, images = nn.Linear(2, 2), ImageList([], [])
    assert main_semi.label(run, network, images, [], file) == []  # nothing is unlabelled: no other collective
    own = json.loads(file.read_text())
    file.write_text(json.dumps(own | {"labels": [[1, 2]]}))
    assert main_semi.label(run, network, images, [], file) == [(1, 2)]

    run.rank, run.world, sent = 1, 2, None
    monkeypatch.setattr(main_semi.distributed, "same_buffers", lambda network: None)
    monkeypatch.setattr(main_semi.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, source: box.__setitem__(0, sent))
    assert main_semi.label(run, network, images, [], file) == [] and calls == ["barrier"]
    sent = [(3, 4)]
    file.unlink()  # not seen here
    assert main_semi.label(run, network, images, [], file) == [(3, 4)] and calls == ["barrier"]


def test_too_few_labels(data, weights, tmp_path):
    args = main_semi.get_parser().parse_args(["--pretrained", "x", "--batch_size", "64"])
    main_semi.resolve(args, 11, 1000, 4)
    assert args.batch_size == 8
    (tmp_path / "one.txt").write_text(next((data / "train").rglob("*.*")).name)
    with pytest.raises(UserError, match="1 labelled images are fewer than two for each of 1 proc.*raise --fraction"):
        call(main_semi, data, weights, tmp_path / "out", "--labels", str(tmp_path / "one.txt"))
    assert not (tmp_path / "out").exists()


def test_without_self_training_and_from_scratch(data, tmp_path):
    flags = [*FEW, *"--self_training false --arch resnet10 --width 4 --stem cifar_pool".split()]
    found = call(main_semi, data, "none", tmp_path, *flags)
    assert "semi_self" not in found and 0 <= found["semi"] <= found["semi_top5"] <= 100
    assert not (tmp_path / "selftrain").exists()
    with pytest.raises(UserError, match="--threshold -1"):
        call(main_semi, data, "none", tmp_path / "b", *flags, "--threshold", "-1")


def test_two_processes_agree_on_the_pseudo_labels(data, weights, tmp_path, python):
    flags = [
        *SMALL_TRAIN,
        "--data_dir",
        str(data),
        "--pretrained",
        str(weights),
        *FEW,
        "--threshold",
        "2.5",
        "--end_epoch",
        "1",
    ]
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["hsa.main_semi", *flags, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = result(tmp_path)
    net = build("resnet10", 8, "cifar_pool")
    net.fc = nn.Linear(64, 6)
    net.eval()
    images, val = (image_folder(data / split, plain(32)) for split in ("train", "val"))
    # each process evaluated half of the images, and both with the network that process 0 has written
    for part, key in (("finetune", "semi"), ("selftrain", "semi_self")):
        net.load_state_dict(checkpoint.load(tmp_path / part / "checkpoint.pth")["state_dict"])
        with torch.no_grad():
            right = (net(stacked(val)).argmax(1) == val.labels).double().mean()
        assert found[key] == pytest.approx(100 * float(right))
        if part == "finetune":
            with torch.no_grad():
                logits = net(stacked(images))
            known = labelled_indices(images, None, 0.25, data, 0)
            expected = [
                [i, int(logits[i].argmax())]
                for i, bits in enumerate(main_semi.entropy_bits(logits))
                if bits <= 2.5 and i not in known
            ]
            assert json.loads((tmp_path / "pseudo.json").read_text())["labels"] == expected


# ------------------------------------------------------------------------------------------------------------ export
def test_export(tmp_path, capsys):
    path = pretrained(tmp_path / "w.pth", "resnet50", 64, "imagenet", "mlp")
    source = {k: v for k, v in checkpoint.read_weights(path).items() if not k.startswith("fc")}
    for kind in ("torchvision", "detectron2"):
        flags = ["--pretrained", str(path), "--format", kind, "--out", str(tmp_path / f"{kind}.pth")]
        assert export_detection.main(flags) == 0
    assert "MODEL.RESNETS.DEPTH 50" in capsys.readouterr().out
    state = checkpoint.load(tmp_path / "torchvision.pth")
    assert state.keys() == source.keys() and all(torch.equal(state[k], source[k]) for k in source)
    net = torchvision.models.resnet50()
    net.load_state_dict(state | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})
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


def test_export_refuses_what_detectron2_lacks(weights, tmp_path):
    with pytest.raises(UserError, match="detectron2 has no resnet10 of width 8"):
        export_detection.main(["--pretrained", str(weights), "--out", str(tmp_path / "a.pth")])
    assert not list(tmp_path.iterdir())
