"""--arch timm:NAME: the networks, training and resuming with them, and what reads such a checkpoint."""

import importlib
import json
import os
import signal
from typing import Any

import numpy as np
import pytest
import timm
import torch

import bingo.arch
import hsa.arch
import kscl.arch
import sscl.arch
from shared_utils import UserError, checkpoint, distributed, timm_nets
from shared_utils.lab import embed
from shared_utils.run import Run
from tests.checkpoints import differing
from tests.test_own_images import MACHINE, call, photographs

NETS = ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "mobilenetv3_small_050", "test_vit"]
MOCO = [*MACHINE, *"--img_size 32 --batch_size 8 --log-every 1 --moco_dim 16 --moco_k 32 --epochs 2".split()]
JOBS = {
    "hsa.main_moco": [*MOCO, "--clus_pos_num", "3", "--arch"],
    "kscl.main_kscl": [*MOCO, "--shots", "2", "--arch"],
    "bingo.main_teacher": [*MOCO, "--arch"],
    "sscl.main": [*MACHINE, *"--img_size 32 --batch_labelled 3 --mu 2 --labels_per_class 3 --dim 16 --moco_k 32 "
                  "--epochs 2 --log-every 1 --num_nn 2 --num_pos 2 --arch".split()],
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_features_and_names_are_those_of_timm(name):
    network = timm_nets.build(f"timm:{name}").eval()
    theirs: Any = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(network.state_dict())  # the same names
    size = int(theirs.pretrained_cfg["input_size"][-1])  # type: ignore[index, arg-type]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        pooled = theirs(x)
        assert torch.equal(network(x, pre_out=True), pooled) and pooled.shape == (2, network.num_features)
        network.fc = torch.nn.Linear(network.num_features, 5)
        assert torch.equal(network(x), network.fc(pooled)) and torch.equal(network(x, pre_out=True), pooled)
        assert torch.equal(network.maps(x, [0])[0].flatten(1), pooled)
    more = set(network.state_dict()) - set(theirs.state_dict())
    assert more == {"fc.weight", "fc.bias"}
    with pytest.raises(UserError, match="only `last` is there"):
        network.maps(x, [0, 3])


@pytest.mark.parametrize("arch", [hsa.arch, bingo.arch, kscl.arch, sscl.arch])
def test_what_cannot_be_built(arch):
    with pytest.raises(UserError, match="--arch timm:resnot: timm cannot give it .*resnot.*; timm.list_models"):
        arch.build("timm:resnot")
    with pytest.raises(UserError, match="one width and one stem; leave --width and --stem away"):
        arch.build("timm:test_resnet", 32)
    vit = arch.build("timm:vit_tiny_patch16_224").train()
    with pytest.raises(UserError, match="--arch timm:vit_tiny.*: takes no images of 32 pixels .*; timm has it for 224"):
        timm_nets.check_size(vit, "timm:vit_tiny_patch16_224", 224, 32)
    assert vit.training
    timm_nets.check_size(arch.build("resnet10", 64), "resnet10", 1)  # no network of timm's is not asked


def test_level_3_and_split_norms_are_refused():
    with pytest.raises(UserError, match="level 3 is inside a ResNet"):
        hsa.arch.build("timm:test_resnet").add_level3()
    network = timm_nets.build("timm:test_efficientnet")
    with pytest.raises(UserError, match="is a BatchNormAct2d, which cannot be split; take --bn_splits 1"):
        distributed.convert_norm(network, "split", 2)
    plain = distributed.convert_norm(timm_nets.build("timm:test_resnet"), "split", 2)
    assert any(isinstance(m, distributed.SplitBatchNorm) for m in plain.modules())


@pytest.mark.parametrize("module", JOBS)
def test_trained_resumed_tested_and_exported(module, tmp_path, monkeypatch):
    data, out, flags = tmp_path / "my photos", tmp_path / "my run", [*JOBS[module], "timm:test_resnet"]
    photographs(data / "train", classes=3), photographs(data / "val", classes=3)
    call(module, data, out, *flags)

    with monkeypatch.context() as patch:  # stopped inside the first epoch
        log = Run.log

        def stop(self: Run, *args: Any, **kwargs: Any) -> None:
            log(self, *args, **kwargs)
            if self.step == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Run, "log", stop)
        with pytest.raises(SystemExit):
            call(module, data, tmp_path / "cut", *flags)
    assert checkpoint.load(tmp_path / "cut/checkpoint.pth")["progress"]["step"] == 1
    call(module, data, tmp_path / "cut", *flags)
    assert differing(out, tmp_path / "cut") == []

    state = checkpoint.load(out / "checkpoint.pth")["state_dict"]
    prefix = "encoder_q.backbone." if module == "sscl.main" else "module.encoder_q."
    assert {prefix + key for key in timm.create_model("test_resnet", num_classes=0).state_dict()} <= set(state)

    folder = module.partition(".")[0]
    knn, script = ("eval_features", "export") if folder == "sscl" else ("main_knn", "export_detection")
    weights = ["--pretrained", str(out)]  # the folder of the run
    call(f"{folder}.{knn}", data, tmp_path / "knn", *weights, *MACHINE[2:])
    assert 0 <= json.loads((tmp_path / "knn/result.json").read_text())["knn"] <= 100
    if folder != "sscl":
        probe = "--selected_feat_id last --epochs 1 --batch_size 9 --lr 1".split()
        call(f"{folder}.main_lincls", data, tmp_path / "lincls", *weights, *MACHINE[2:], *probe)
    hub = tmp_path / "hub"
    export = importlib.import_module(f"{folder}.lab.{script}").main
    assert export([*weights, "--format", "hub", "--out", str(hub)]) == 0
    network = timm.create_model(f"local-dir:{hub}", pretrained=True)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[prefix + key]), key
    assert embed.main([str(hub), str(data / "val"), "--out", str(tmp_path / "e"), *MACHINE[2:]]) == 0
    assert np.load(tmp_path / "e.npy").shape == (18, network.num_features)
    with pytest.raises(UserError, match=f"it is a run: python -m {folder}.lab.{script} --pretrained '.*my run' --form"):
        embed.load(str(out))


def test_a_student_and_its_teacher_of_timm(tmp_path):
    data, teacher = photographs(tmp_path / "photos", classes=3), tmp_path / "teacher"
    call("bingo.main_teacher", data, teacher, *JOBS["bingo.main_teacher"], "timm:test_efficientnet")
    bags = ["--corr_dir", str(tmp_path), "--corr_name", "bags.npy", *MACHINE[2:], "--img_size", "32"]
    knn = importlib.import_module("bingo.compute_knn").main
    of = ["--data_dir", str(data), "--arch", "timm:test_efficientnet", "--ckpt_name", str(teacher)]
    assert knn([*of, *bags]) == 0
    nets = ["--s_arch", "timm:test_resnet", "--t_arch", "timm:test_efficientnet", "--hidden", "16"]
    flags = [*MOCO[: MOCO.index("--moco_dim")], "--moco_k", "32", "--epochs", "1", *nets]
    flags += ["--pretrain_path", str(teacher), "--corr_npy", str(tmp_path / "bags.npy")]
    call("bingo.main_moco", data, tmp_path / "student", *flags)
    mine = checkpoint.load(tmp_path / "student/checkpoint.pth")["state_dict"]
    taught = checkpoint.load(teacher / "checkpoint.pth")["state_dict"]
    names = [key for key in taught if key.startswith("module.encoder_q.") and "running" not in key]
    assert len(names) > 50 and all(
        torch.equal(mine[key.replace("encoder_q", "encoder_k")], taught[key]) for key in names
    )
    call("bingo.main_knn", data, tmp_path / "knn", "--pretrained", str(tmp_path / "student"), *MACHINE[2:])
    with pytest.raises(UserError, match="BatchNormAct2d, which cannot be split; take --bn_splits 1"):
        call("bingo.main_teacher", data, tmp_path / "no", *JOBS["bingo.main_teacher"], "timm:test_efficientnet",
             "--bn_splits", "2")  # fmt: skip
