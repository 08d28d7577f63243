"""Atomic files, refusal of pickles, strict loading and the public checkpoint families."""

import argparse
import contextlib
import os
import random
import re

import pytest
import torch
import torchvision
from torch import nn

from shared_utils import UserError, checkpoint


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should_never_exist_shared_checkpoint",))


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "checkpoint.pth"
    checkpoint.save(path, {"a": torch.ones(3)})
    assert [f.name for f in path.parent.iterdir()] == ["checkpoint.pth"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*an older file there is unharmed"):
        checkpoint.save(path, {"a": torch.zeros(3)})
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))
    assert [f.name for f in path.parent.iterdir()] == ["checkpoint.pth"]


def test_a_full_disk_is_reported_and_the_old_file_survives(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    old = tmp_path / "checkpoint.pth"
    checkpoint.save(old, {"a": torch.ones(3)})
    (tmp_path / f".checkpoint.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(old, {"a": torch.zeros(100_000)})
    assert torch.equal(checkpoint.load(old)["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), RuntimeError, "^DataLoader worker"),
        (OSError(28, "No space left on device"), UserError, "x.pth: cannot be written .*No space left"),
    ],
)
def test_what_ends_a_write_is_told_and_not_torch_s_complaint_about_it(cause, kind, message, tmp_path):
    class Stopped:
        def __init__(self, handle):
            self.handle, self.left = handle, 3

        def write(self, data):
            self.left -= 1
            if not self.left:
                raise cause
            return self.handle.write(data)

        def flush(self):
            self.handle.flush()

    path = tmp_path / "x.pth"
    checkpoint.save(path, {"a": torch.zeros(9)})
    with pytest.raises(kind, match=message):
        checkpoint.write(path, lambda handle: torch.save({"a": torch.ones(100_000)}, Stopped(handle)))  # type: ignore[arg-type]
    assert not checkpoint.load(path)["a"].any() and len(list(tmp_path.iterdir())) == 1


def test_pickles_truncated_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(UserError, match="loading them could run code"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/should_never_exist_shared_checkpoint")
    checkpoint.save(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="evil.pth: not a readable checkpoint"):
        checkpoint.load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no such checkpoint file"):
        checkpoint.load(tmp_path / "none.pth")


def test_a_flipped_bit_is_never_another_number(tmp_path):
    """torch.load alone does not look at the checksums that torch.save writes."""
    path, rng, weight = tmp_path / "x.pth", random.Random(0), torch.arange(500.0)
    checkpoint.save(path, {"weight": weight})
    whole, unseen = path.read_bytes(), 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert torch.equal(checkpoint.load(path)["weight"], weight)
        except UserError as error:
            assert re.search("x.pth: (damaged|not a readable checkpoint)", str(error)), error
            with contextlib.suppress(Exception):
                unseen += not torch.equal(torch.load(path, weights_only=True)["weight"], weight)
    assert unseen > 50


def test_files_without_checksums_are_read(tmp_path):
    written = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(9.0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(written)
    torch.save({"weight": torch.arange(9.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("x.pth", "old.pth"):
        assert torch.equal(checkpoint.load(tmp_path / name)["weight"], torch.arange(9.0))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_strict_loading_names_what_does_not_fit_and_changes_nothing():
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    bad = {**state, "fc.weight": torch.zeros(2), "0.weight": torch.zeros(4, 3, 1, 1)}
    del bad["1.bias"]
    with pytest.raises(UserError) as error:
        checkpoint.load_strict(net, bad)
    for part in (
        "1 missing (1.bias)",
        "1 unexpected (fc.weight)",
        "1 mis-shaped (0.weight (4, 3, 1, 1) in the file, (4, 3, 3, 3) here)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    report = checkpoint.load_strict(net, {**state, "fc.weight": torch.zeros(2)}, drop=("fc.*",))
    assert report == "loaded 7 tensors, dropped 1, left new 0"
    assert all(torch.equal(v, before[k] + 1) for k, v in net.state_dict().items())
    del state["0.bias"]
    assert checkpoint.load_strict(net, state, missing_ok=("0.bias",)).endswith("left new 1")


RESNET = torchvision.models.resnet18(weights=None).state_dict()
PROJECTION = {"fc.0.weight": torch.ones(2), "fc.2.weight": torch.ones(2)}
TRUNK = {k: v for k, v in RESNET.items() if not k.startswith("fc.")}


@pytest.mark.parametrize(
    ("family", "file"),
    [
        ("plain", RESNET),
        ("plain", {"state_dict": RESNET, "epoch": 3}),
        ("moco", {"epoch": 200, "arch": "resnet18", "state_dict": {
            **{f"module.encoder_q.{k}": v for k, v in {**TRUNK, **PROJECTION}.items()},
            **{f"module.encoder_k.{k}": v + 1 for k, v in {**TRUNK, **PROJECTION}.items()},
            "module.queue": torch.ones(2, 3)}}),
        ("swav", {f"module.{k}": v for k, v in {**TRUNK, "projection_head.0.weight": torch.ones(2),
                                                "prototypes.weight": torch.ones(2)}.items()}),
        ("dino", {"student": {f"module.backbone.{k}": v + 1 for k, v in TRUNK.items()},
                  "teacher": {**{f"backbone.{k}": v for k, v in TRUNK.items()}, "head.mlp.0.weight": torch.ones(2)},
                  "args": argparse.Namespace(lr=1.0)}),
        ("mae", {"model": TRUNK, "optimizer": {}, "args": argparse.Namespace()}),
    ],
)  # fmt: skip
def test_public_families_load_into_a_torchvision_trunk(family, file, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(file, path)
    trunk = torchvision.models.resnet18(weights=None)
    trunk.fc = nn.Identity()
    for name in ("auto", family):
        state = checkpoint.read_weights(path, name)
        checkpoint.load_strict(trunk, state, drop=("fc.*", "projection_head.*", "prototypes.*"))
        assert all(torch.equal(trunk.state_dict()[k], v) for k, v in TRUNK.items())
    wrong = "mae" if family != "mae" else "moco"
    with pytest.raises(UserError, match=f"looks like a {family} checkpoint, expected {wrong}"):
        checkpoint.read_weights(path, wrong)


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"loss": [1.0, 2.0]}, tmp_path / "log.pth")
    with pytest.raises(UserError, match=re.escape("no state_dict found (holds: loss)")):
        checkpoint.read_weights(tmp_path / "log.pth")
