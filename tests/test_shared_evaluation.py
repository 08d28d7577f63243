"""What evaluations share: splits, label subsets, weights and what is stored beside them, shares of rows, top-k."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shared_utils import UserError, checkpoint, distributed, evaluation
from shared_utils.data import image_folder
from shared_utils.flags import WEIGHTS, Parser

ROOT = Path(__file__).resolve().parent.parent


def folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(root / name / f"{name}_{i}.png")
    return root


def flags(**values: object) -> argparse.Namespace:
    p = argparse.ArgumentParser()
    evaluation.add_data_flags(p)
    evaluation.add_network_flags(p, ["a", "b"], ["s", "t"], "a")
    args = p.parse_args(["--pretrained", "none"])
    vars(args).update(values)
    return args


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_the_folder_of_a_run_stands_for_its_checkpoint(name, tmp_path):
    p = Parser()
    for flag, kind in ((name, str), (f"{name}_of_another", str)):
        p.add_argument(f"--{flag}", type=kind)
    run, file = tmp_path / "my run", tmp_path / "my run/checkpoint.pth"
    run.mkdir()
    assert getattr(p.parse_args([f"--{name}", str(run)]), name) == str(run)
    with pytest.raises(UserError, match="my run: a folder without checkpoint.pth; give a file of weights, or the fol"):
        checkpoint.load(run)
    checkpoint.save(file, {})
    args = p.parse_args([f"--{name}", str(run), f"--{name}_of_another", str(run)])
    assert getattr(args, name) == str(file) and getattr(args, f"{name}_of_another") == str(run)
    assert [getattr(p.parse_args([f"--{name}", word]), name) for word in ("none", "", str(file))] == [
        "none", "", str(file)
    ]  # fmt: skip
    p = Parser()
    p.add_argument(f"--{name}", type=Path)
    assert getattr(p.parse_args([f"--{name}", str(run)]), name) == file


def test_splits_and_where_validation_lies(tmp_path):
    folder(tmp_path / "train", {"cat": 5, "dog": 4})
    folder(tmp_path / "test", {"cat": 2, "dog": 1})
    train, val = evaluation.open_splits(flags(data_dir=tmp_path, per_class=3, cache=True))
    assert (len(train), len(val)) == (6, 3) and train.classes == ["cat", "dog"]
    folder(tmp_path / "val", {"cat": 1, "dog": 1})
    assert len(evaluation.open_splits(flags(data_dir=tmp_path))[1]) == 2
    folder(tmp_path / "other", {"cat": 1, "eel": 1})
    with pytest.raises(UserError, match="other: its classes are not those of .*train .first difference: dog"):
        evaluation.open_splits(flags(data_dir=tmp_path, val_dir=tmp_path / "other"))
    with pytest.raises(UserError, match="no such folder"):
        evaluation.open_splits(flags(data_dir=tmp_path / "none"))


def test_cifar_from_torchvisions_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cifar-10-batches-py: cifar10 not found or damaged"):
        evaluation.open_splits(flags(data_dir=tmp_path, dataset="cifar10"))
    base, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir()
    pixels = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels[name] = rng.integers(0, 255, (4, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [0, 1, 1, 0]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    monkeypatch.setattr(sys.modules["torchvision.datasets.cifar"], "check_integrity", lambda *_: True)
    train, val = evaluation.open_splits(flags(data_dir=tmp_path, dataset="cifar10", per_class=3))
    assert (len(train), len(val)) == (6, 4) and train.classes == ["plane", "car"]
    assert train.labels.tolist() == [0, 1, 1, 0, 0, 1]
    expected = pixels["data_batch_2"][1].reshape(3, 32, 32).transpose(1, 2, 0)  # the sixth that was kept
    assert np.array_equal(np.asarray(train.image(5)), expected)
    some = evaluation.subset(train, [5, 0], [-1, -1])
    assert np.array_equal(np.asarray(some.image(0)), expected) and some.labels.tolist() == [-1, -1]


def test_fraction_is_drawn_of_each_class_by_the_seed(tmp_path):
    images = image_folder(folder(tmp_path, {"a": 40, "b": 20, "c": 3}))
    drawn = [evaluation.labelled_indices(images, None, 0.1, tmp_path, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.bincount(images.labels[drawn[0]]).tolist() == [4, 2, 1]
    assert evaluation.labelled_indices(images, None, 1.0, tmp_path, 0) == list(range(63))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="list.txt: not UTF-8 text"):
        evaluation.labelled_indices(images, tmp_path / "list.txt", 0.1, tmp_path, 0)


@pytest.mark.parametrize("cached", [False, True])
def test_subset_keeps_images_with_their_labels(cached, tmp_path):
    args = flags(data_dir=tmp_path, cache=cached)
    folder(tmp_path / "train", {"a": 3, "b": 3})
    folder(tmp_path / "val", {"a": 1, "b": 1})
    train, _ = evaluation.open_splits(args)
    some = evaluation.subset(train, [4, 1])
    assert [np.asarray(some.image(i))[0, 0, 0] for i in range(2)] == [1, 1] and some.labels.tolist() == [1, 0]
    assert evaluation.subset(train, [4, 1], [7, 8]).labels.tolist() == [7, 8] and train.labels[4] == 1


def tiny(name: str, width: int, stem: str) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def test_flags_of_the_checkpoint_and_what_overrides_them(tmp_path):
    net = tiny("b", 5, "t")
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items() if "num_batches" not in k}
    state["module.encoder_q.fc.0.weight"] = torch.zeros(2, 5)
    student = {"s_arch": "b", "s_width": 5, "s_stem": "t", "t_arch": "a", "arch": "a"}
    for name, stored in (("student", student), ("encoder", {"arch": "b", "width": 5, "stem": "t"})):
        path = tmp_path / f"{name}.pth"
        checkpoint.save(path, {"state_dict": state, "args": stored})
        args = flags(pretrained=str(path))
        loaded, report = evaluation.load_backbone(tiny, args, "a", stored_as=("s_{}", "{}"))
        assert (args.arch, args.width, args.stem) == ("b", 5, "t") and "dropped 1" in report
        assert torch.equal(loaded[0].weight, net[0].weight) and len(args.backbone_sha256) == 16
    with pytest.raises(UserError, match="encoder.pth, taken as b, width 6, stem t: .*mis-shaped"):
        evaluation.load_backbone(tiny, flags(pretrained=str(path), width=6), "a")
    args = flags(pretrained=str(tmp_path / "student.pth"), width=5)
    evaluation.load_backbone(tiny, args, "a", stored_as=("t_{}",))  # the caller says which names count
    assert (args.arch, args.stem) == ("a", "imagenet")
    released = tmp_path / "released.pth"  # MoCo's own files have no flags of ours
    checkpoint.save(released, {"state_dict": state, "arch": "resnet50", "args": argparse.Namespace(arch=None)})
    args = flags(pretrained=str(released), width=5)
    evaluation.load_backbone(tiny, args, "a")
    assert (args.arch, args.stem) == ("a", "imagenet")
    for trained, given, size in ((32, None, 32), (32, 64, 64), (None, None, 224)):
        checkpoint.save(path, {"state_dict": state, "args": {"img_size": trained} if trained else {}})
        args = argparse.Namespace(pretrained=str(path), img_size=given, per_class=0)
        evaluation.prepare_data(args)
        assert args.img_size == size
    fresh = flags(width=4)
    assert evaluation.load_backbone(tiny, fresh, "a")[1].endswith("random weights") and fresh.backbone_sha256 == ""


def test_shares_cover_all_rows(monkeypatch):
    for world in (1, 2, 3, 5):
        monkeypatch.setattr(evaluation.distributed, "world", lambda world=world: world)
        found = []
        for rank in range(world):
            monkeypatch.setattr(evaluation.distributed, "rank", lambda rank=rank: rank)
            found += list(range(*evaluation.share(11)))
        assert found == list(range(11))


def test_stream_gives_what_is_collected_a_batch_at_a_time(tmp_path):
    images = image_folder(
        folder(tmp_path, {"a": 5, "b": 4}), lambda image: torch.tensor(np.array(image)).permute(2, 0, 1)
    )
    seen = []

    def embed(x):
        seen.append(len(x))
        return [x[:, :, 0, 0].bfloat16(), x[:, 0].flatten(1)]

    coming = evaluation.stream(embed, images, torch.device("cpu"), 4)
    (first, second), labels = next(coming)
    assert seen == [4] and first.shape == (4, 3) and first.dtype == torch.float32 and labels.tolist() == [0] * 4
    rest = list(coming)
    assert [len(y) for _, y in rest] == [4, 1]
    (a, b), y = evaluation.collect(embed, images, torch.device("cpu"), 4)
    assert a[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3] and torch.equal(y, images.labels)
    assert torch.equal(a, torch.cat([first, *(out[0] for out, _ in rest)]))
    assert torch.equal(b, torch.cat([second, *(out[1] for out, _ in rest)]))


def test_memory_that_features_take(monkeypatch):
    assert 2**26 < evaluation.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(evaluation, "available_memory", lambda: 8000)
    evaluation.check_cache({})
    evaluation.check_cache({"do a": (10, 50), "do b": (5, 100)})
    with pytest.raises(UserError, match="of 5 images, 101 values each, in memory: 4.02e-06 GB together.* do b$"):
        evaluation.check_cache({"do a": (10, 50), "do b": (5, 101)})
    monkeypatch.undo()
    monkeypatch.setattr(evaluation.Path, "read_text", lambda self: "MemTotal: 3 kB\nMemAvailable:   7 kB\n")
    assert evaluation.available_memory() == 7 * 1024
    monkeypatch.setattr(evaluation.Path, "read_text", lambda self: "MemTotal: 3 kB\n")
    assert evaluation.available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _buffers(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net(torch.randn(4, 2, generator=torch.Generator().manual_seed(rank)) + rank)
    torch.save([b.clone() for b in net.buffers()], f"{folder}/before{rank}")
    distributed.same_buffers(net)
    torch.save(list(net.buffers()), f"{folder}/after{rank}")
    torch.distributed.destroy_process_group()


def test_buffers_are_those_of_process_0(tmp_path, python):
    code = "import sys; from tests.test_shared_evaluation import _buffers; _buffers(int(sys.argv[1]), sys.argv[2])"
    ranks = [subprocess.Popen([python, "-c", code, str(rank), str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    own, other, a, b = (torch.load(tmp_path / f"{when}{rank}") for when in ("before", "after") for rank in (0, 1))
    assert not torch.equal(own[0], other[0])
    assert len(own) == 3 and all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(own, a, b))


def test_topk_counts():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 3, 2, 1]])
    assert evaluation.topk(logits, torch.tensor([0, 2, 0]), (1, 2, 3)).tolist() == [1, 2, 2]
    assert evaluation.topk(logits, torch.tensor([3, 0, 0])).tolist() == [0, 3]  # top-5 of four classes is everything


def test_ties_are_counted_as_argmax_decides_them():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (400, 7), generator=generator).float()  # most rows have ties
    labels = torch.randint(0, 7, (400,), generator=generator)
    order = [sorted(range(7), key=lambda c: (-row[c], c)) for row in logits.tolist()]  # equal ones by their number
    for k in (1, 2, 5, 7):
        expected = sum(int(y) in first[:k] for first, y in zip(order, labels))
        assert evaluation.topk(logits, labels, (k,)).tolist() == [expected]
    assert int(evaluation.topk(logits, labels)[0]) == int((logits.argmax(1) == labels).sum())
    constant = torch.zeros(70, 7)  # a collapsed network guesses the first class, not whichever is right
    assert evaluation.topk(constant, torch.arange(70) % 7, (1, 5)).tolist() == [10, 50]
    broken = torch.full((7, 7), torch.nan)
    assert evaluation.topk(broken, torch.arange(7), (1, 7)).tolist() == [0, 0]


def test_frozen_means_every_tensor():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = evaluation.freeze(net)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    net(torch.randn(4, 2))
    evaluation.unchanged(net, before)
    net.train()(torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="1.running_mean of the frozen backbone changed"):
        evaluation.unchanged(net, before)


def test_the_protocol_says_what_is_missing(tmp_path):
    """Neighbours that are not there, classes of a single image in leave-one-out, files that were not read."""
    for name in ("a/1.png", "a/2.png", "b/1.png", "c/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a/3.heic").write_bytes(b"x")
    images = image_folder(tmp_path)
    alone = "; not read: 1 .heic; 2 classes of a single image, which no other can name"
    own = "leave-one-out, each of the 4 images by all the others (neither val nor test is there)"
    assert evaluation.protocol(images, images, 3) == own + alone
    assert evaluation.protocol(images, images, 20) == f"{own}; 3 neighbours in the place of 20{alone}"
    other = image_folder(tmp_path)
    assert evaluation.protocol(images, other, 4) == "4 train / 4 val images; not read: 2 .heic"
    assert evaluation.protocol(images, other, 5).startswith("4 train / 4 val images; 4 neighbours in the place of 5")
