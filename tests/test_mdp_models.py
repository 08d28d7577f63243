"""mdp: network, exporter, IoU and the checks before fine-tuning (nothing here imports mmsegmentation)."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from mdp import eval_seg, finetune
from mdp.lab import export_mmseg
from mdp.models import ASPPHead, Encoder, ResNet
from shared_utils import UserError, checkpoint
from shared_utils.layout import follow, place

NARROW: dict[str, Any] = {"arch": "resnet18", "base_channels": 4, "head_channels": 8, "dilations": (1, 2, 4)}


def randomise_norms(module: nn.Module) -> None:
    """Batch norms at their start hide mistakes: residual branches would end in zeros."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.5, 0.5), (m.running_mean, -1, 1)):
                value.data.uniform_(low, high)  # type: ignore[union-attr]
            m.running_var.data.uniform_(0.5, 2)  # type: ignore[union-attr]


# Network -----------------------------------------------------------------------------------------------------------


def test_resnet50_is_torchvisions_dilated_one() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    randomise_norms(reference)
    ours = ResNet(50)
    report = checkpoint.load_strict(ours, reference.state_dict(), drop=("fc.*",))
    assert "left new 0" in report
    layers = (reference.layer1, reference.layer2, reference.layer3, reference.layer4)
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        y = reference.eval().maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for got, layer in zip(ours.eval()(x), layers):
            y = layer(y)
            torch.testing.assert_close(got, y)


@pytest.mark.parametrize(("depth", "count"), [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032), (101, 42_500_160)])
def test_resnet_sizes(depth: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(depth).parameters()) == count  # torchvision's without fc


def test_basic_block_dilates_its_first_convolution_only() -> None:
    net = ResNet(18, 4)
    dilations = {k: m.dilation[0] for k, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1}
    assert dilations == {"layer3.1.conv1": 2, "layer4.0.conv1": 2, "layer4.1.conv1": 4}


@pytest.mark.parametrize(("head", "stride"), [("aspp", 8), ("sep_aspp", 4), ("none", 8)])
def test_encoder_shapes(head: str, stride: int) -> None:
    encoder = place(Encoder(**{**NARROW, "base_channels": 16}, head=head, dim=5), torch.device("cpu"))
    x = follow(torch.randn(2, 3, 64, 96), encoder)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert encoder(x).shape == (2, 5, 64 // stride, 96 // stride)
    classifier = Encoder(**NARROW, head=head, num_classes=7)
    assert classifier(x).shape == (2, 7, 64 // stride, 96 // stride)
    assert not any("projector" in name for name, _ in classifier.named_parameters())


def test_every_parameter_gets_a_gradient() -> None:
    encoder = Encoder(**NARROW)
    randomise_norms(encoder)
    encoder(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_image_pooling_is_a_repeated_mean() -> None:
    head = ASPPHead(4, 3, (1, 2)).eval()
    x = torch.randn(2, 4, 5, 7)
    pooled = head.image_pool(x)
    torch.testing.assert_close(pooled, head.image_pool[1](x.mean((2, 3), keepdim=True)))
    resized = nn.functional.interpolate(pooled, size=(5, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pooled.expand(-1, -1, 5, 7), resized)


def test_unknown_names_are_refused() -> None:
    for kwargs, word in (({"arch": "vgg16"}, "vgg16"), ({"head": "fcn"}, "fcn")):
        with pytest.raises(UserError, match=word):
            Encoder(**{**NARROW, **kwargs})


# Export ------------------------------------------------------------------------------------------------------------


def pretraining(path: Path, head: str = "aspp", **more: object) -> dict[str, Tensor]:
    """A checkpoint as pretraining writes it; returns its state_dict."""
    torch.manual_seed(1)
    state = {}
    for branch in "qk":
        encoder = Encoder(**NARROW, head=head, dim=6)
        randomise_norms(encoder)
        state.update({f"encoder_{branch}.{k}": v for k, v in encoder.state_dict().items()})
    flags = {**NARROW, "dilations": list(NARROW["dilations"]), "head": head, "dim": 6}
    checkpoint.save(path, {"state_dict": state, "args": {**flags, **more}, "bank": {}})
    return state


def test_export_keeps_backbone_and_head_of_one_branch(tmp_path: Path) -> None:
    state = pretraining(tmp_path / "checkpoint.pth")
    q, k = export_mmseg.export(state, "q"), export_mmseg.export(state, "k")
    assert {key.split(".")[0] for key in q} == {"backbone", "decode_head"}
    assert not any("conv_seg" in key or "projector" in key for key in q)
    assert torch.equal(q["backbone.conv1.weight"], state["encoder_q.backbone.conv1.weight"])
    assert torch.equal(k["backbone.conv1.weight"], state["encoder_k.backbone.conv1.weight"])
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert export_mmseg.export(wrapped, "q").keys() == q.keys()


def test_export_to_torchvision_loads_there(tmp_path: Path) -> None:
    pretraining(tmp_path / "c.pth")
    assert (
        export_mmseg.main([str(tmp_path / "c.pth"), "--out", str(tmp_path / "o.pth"), "--format", "torchvision"]) == 0
    )
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    exported = checkpoint.load(tmp_path / "o.pth")
    assert set(exported) == {key for key in network.state_dict() if not key.startswith("fc.")}


def test_export_to_detectron2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = torchvision.models.resnet18().state_dict()
    state = {f"encoder_q.backbone.{key}": value for key, value in own.items() if not key.startswith("fc.")}
    checkpoint.save(tmp_path / "c.pth", {"state_dict": state, "args": {"arch": "resnet18"}})
    argv = [str(tmp_path / "c.pth"), "--out", str(tmp_path / "o.pth"), "--format", "detectron2"]
    assert export_mmseg.main(argv) == 0 and "MODEL.RESNETS.DEPTH 18" in capsys.readouterr().out
    exported = checkpoint.load(tmp_path / "o.pth")["model"]
    assert len(exported) == len(state)
    assert torch.equal(exported["res3.0.shortcut.weight"], own["layer2.0.downsample.0.weight"])
    pretraining(tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="detectron2 has no"):
        export_mmseg.main([str(tmp_path / "narrow.pth"), *argv[1:]])


def test_export_refuses_foreign_and_truncated_files(tmp_path: Path) -> None:
    foreign, broken = tmp_path / "foreign.pth", tmp_path / "broken.pth"
    checkpoint.save(foreign, {"state_dict": {"layer1.weight": torch.zeros(2)}})
    pretraining(broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    for path, word in ((foreign, "encoder_q"), (broken, "broken"), (tmp_path / "absent.pth", "no such")):
        with pytest.raises(UserError, match=word) as caught:
            export_mmseg.main([str(path), "--out", str(tmp_path / "out.pth")])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.pth").exists()


# Scores ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**31 - 1))
def test_confusion_is_sklearns(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, (9, 11))
    label[rng.random((9, 11)) < 0.2] = 255
    pred = rng.integers(0, classes, (9, 11))
    got = eval_seg.confusion(torch.from_numpy(pred), torch.from_numpy(label), classes)
    keep = label != 255
    want = confusion_matrix(label[keep], pred[keep], labels=list(range(classes)))
    assert np.array_equal(got.numpy(), want)
    hit = np.diag(want)
    union = want.sum(0) + want.sum(1) - hit
    expected = 100 * np.mean(hit[union > 0] / union[union > 0])
    assert eval_seg.mean_iou(got) == pytest.approx(expected)


def test_iou_of_special_cases() -> None:
    label = torch.tensor([[0, 0, 1, 1]])
    assert eval_seg.mean_iou(eval_seg.confusion(label, label, 3)) == 100  # class 2 is in neither map: skipped
    only_predicted = eval_seg.confusion(torch.tensor([[0, 0, 1, 2]]), label, 3)
    assert eval_seg.class_iou(only_predicted).tolist() == [100, 50, 0]
    # Two images: IoU of class 0 is 1/4 and 3/3, of class 1 0/3 and 1/1; the data set counts pixels, not images.
    first = eval_seg.confusion(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 1, 1, 1]]), 2)
    second = eval_seg.confusion(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 0, 1]]), 2)
    assert eval_seg.class_iou(first + second).tolist() == pytest.approx([100 * 4 / 7, 100 / 4])
    per_image = (eval_seg.mean_iou(first) + eval_seg.mean_iou(second)) / 2
    assert eval_seg.mean_iou(first + second) != pytest.approx(per_image)
    with pytest.raises(UserError, match="outside"):
        eval_seg.confusion(torch.tensor([3]), torch.tensor([0]), 3)


def test_nearest_prototype_never_names_an_unseen_class() -> None:
    proto = torch.eye(4)
    embeddings = torch.zeros(1, 4, 2, 2)
    embeddings[0, 1, :, 0], embeddings[0, 2, :, 1] = 5.0, 0.1
    guess = eval_seg.nearest_prototype(embeddings, proto, torch.tensor([True, True, True, False]), (8, 8))
    assert guess.shape == (1, 8, 8) and guess[0, :, :4].eq(1).all() and guess[0, :, 4:].eq(2).all()
    without = eval_seg.nearest_prototype(embeddings, proto, torch.tensor([True, True, False, False]), (8, 8))
    assert set(without.unique().tolist()) <= {0, 1}


# Before fine-tuning ------------------------------------------------------------------------------------------------


def refused(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        finetune.main(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_finetune_refuses_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    root = str(tmp_path)
    pretraining(tmp_path / "ours.pth")
    ours = ["--config", "mini", "--data-root", root, "--checkpoint", str(tmp_path / "ours.pth")]
    checkpoint.save(tmp_path / "foreign.pth", {"model": {"x": torch.zeros(1)}})
    buffer = io.BytesIO()
    torch.save({"hook": print}, buffer)
    (tmp_path / "pickle.pth").write_bytes(buffer.getvalue())
    assert "cityscapes" in refused(["--config", "mini", "--data-root", root])
    assert "nowhere" in refused(["--config", "nowhere", "--data-root", root])
    assert "no such checkpoint" in refused(["--config", "mini", "--checkpoint", f"{root}/absent.pth"])
    assert "not an MDP" in refused(["--config", "mini", "--checkpoint", f"{root}/foreign.pth"])
    assert "pickle.pth" in refused(["--config", "mini", "--checkpoint", f"{root}/pickle.pth"])
    assert "was trained with 4" in refused([*ours, "--base-channels", "8"])
    assert "was trained with resnet18" in refused([*ours, "--arch", "resnet50"])
    assert "at least 2" in refused([*ours, "--batch-size", "1"])
    assert "--iters 0" in refused([*ours, "--iters", "0"])
    assert "--crop-size" in refused([*ours, "--crop-size", "8"])
    assert not (tmp_path / "runs").exists()


def test_finetune_takes_the_network_of_its_checkpoint(tmp_path: Path) -> None:
    pretraining(tmp_path / "ours.pth", head="sep_aspp")
    _, implied = finetune.read_checkpoint(str(tmp_path / "ours.pth"), "q")
    args = finetune.get_parser().parse_args(["--config", "camvid", "--iters", "50", "--crop-size", "96"])
    cfg = finetune.resolve(args, implied)
    assert cfg.model.decode_head.type == "DepthwiseSeparableASPPHead"
    assert (cfg.model.backbone.depth, cfg.model.backbone.base_channels, cfg.model.decode_head.channels) == (18, 4, 8)
    assert cfg.due == [5, 50] and tuple(cfg.model.data_preprocessor.size) == (96, 96)


def test_eval_refuses_bad_input(tmp_path: Path) -> None:
    pretraining(tmp_path / "ours.pth", datasets="voc,ade")
    for argv, word in (
        ([], "--run"),
        (["--run", str(tmp_path)], "no such"),
        (["--run", str(tmp_path / "ours.pth")], "not a fine-tuned model"),
        (["--protocol", "prototype"], "--checkpoint"),
        (["--protocol", "prototype", "--checkpoint", str(tmp_path / "ours.pth")], "no prototypes"),
    ):
        with pytest.raises(UserError, match=word):
            eval_seg.main(argv)
