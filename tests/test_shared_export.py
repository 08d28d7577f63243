"""Exported backbones: safetensors that load elsewhere by the two lines of their card, detectron2's names."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.models import VisionTransformer
from torch import nn

import bingo.arch
import bingo.lab.export_detection
import fame.backbone
import fame.lab.export
import flat.backbone
import flat.lab.export
import hsa.arch
import hsa.lab.export_detection
import kscl.arch
import kscl.lab.export_detection
import mdp.lab.export_mmseg
import mdp.models
import mra.lab.export
import mra.models_mae
import mra.nets
import sage.arch
import sage.lab.export
import uvos_dino.lab.export
import uvos_dino.model_cluster
import uvos_dino.vision_transformer
from shared_utils import UserError, augment, checkpoint
from shared_utils.lab import embed, export

ROOT = Path(__file__).resolve().parent.parent


def resnet_checkpoint(network: nn.Module, prefix: str, path: Path, **flags: object) -> Path:
    state = {prefix + key: value for key, value in network.state_dict().items()}
    checkpoint.save(path, {"state_dict": state, "args": {"seed": 3, **flags}})
    return path


def moco(build, width, stem, path):
    return resnet_checkpoint(
        build("resnet18", width, stem), "encoder_q.", path, arch="resnet18", width=width, stem=stem
    )


def small(folder: str, path: Path, width: int = 8, stem: str = "cifar") -> tuple[Path, list[str]]:
    """A checkpoint of `folder` and the arguments of its exporter."""
    network: nn.Module
    if folder == "mdp":
        network = mdp.models.ResNet(18, width)
        resnet_checkpoint(network, "encoder_q.backbone.", path, arch="resnet18", base_channels=width)
        return path, [str(path)]
    if folder == "bingo":  # a student's flags have names of their own
        network = bingo.arch.build("resnet18", width, stem)
        resnet_checkpoint(network, "encoder_q.", path, s_arch="resnet18", s_width=width, s_stem=stem)
    elif folder == "sage":
        network = sage.arch.build("resnet18", width, stem)
        resnet_checkpoint(network, "online_net.0.", path, arch="resnet18", width=width, stem=stem)
    else:
        moco({"hsa": hsa.arch.build, "kscl": kscl.arch.build}[folder], width, stem, path)
    return path, ["--pretrained", str(path)]


MAINS = {
    "bingo": bingo.lab.export_detection.main, "hsa": hsa.lab.export_detection.main,
    "kscl": kscl.lab.export_detection.main, "mdp": mdp.lab.export_mmseg.main, "sage": sage.lab.export.main,
}  # fmt: skip


def code_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found
    return found[1]


@pytest.mark.parametrize("folder", sorted(MAINS))
def test_the_lines_of_the_card_load_the_weights(folder, tmp_path, monkeypatch):
    path, argv = small(folder, tmp_path / "w.pth")
    assert MAINS[folder]([*argv, "--format", "safetensors", "--out", str(tmp_path / "b.safetensors")]) == 0
    card = (tmp_path / "b.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, nn.Module] = {}
    exec(code_of(card), names)
    own = checkpoint.load(path)["state_dict"]
    for key, value in names["model"].state_dict().items():
        (source,) = [k for k in own if k.endswith("." + key) and k[: -len(key)].count(".") <= 2]
        assert torch.equal(own[source], value), key
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["paper"] == folder
    assert "`--seed 3`" in card and "Apache-2.0" in card and "arXiv" in card
    assert "| experiment |" in card or "Nothing yet." in card
    assert "mean and standard deviation" in card and card.count("at this scale |") + card.count("not testable") <= 6


def stirred(net: nn.Module) -> nn.Module:
    """With statistics that a fresh batch norm would not have."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def own(kind: str, path: Path) -> tuple[Any, Any, tuple[int, ...]]:
    """A checkpoint of a small network at `path`; its module, its function of images and their shape."""
    net: Any
    model, *more = kind.split()
    if model == "mae":
        net = mra.models_mae.MAE(24, mra.models_mae.SIZES["mae_tiny_patch8"])
        flags = {"model": "mae_tiny_patch8", "input_size": 24}
        checkpoint.save(path, {"model": net.state_dict(), "args": flags})
        return net, lambda x: net.encode(net.embed(x))[:, 0], (2, 3, 24, 24)
    if model == "classifier":
        net = stirred(mra.nets.build(more[0], 3, 0, more[1]))
        flags = {"arch": more[0], "width": 0, "stem": more[1], "input_size": 32, "mean_std": "cifar"}
        info = {"classes": ["a", "b", "c"]}
        run = {"state_dict": net.state_dict(), "info": info, "args": flags, "progress": {"seconds": 1.0}}
        checkpoint.save(path, run)
        return net, net, (2, 3, 32, 32)
    if model == "video":
        net = stirred(fame.backbone.build(more[0], width=4))
        state = {"encoder_q." + key: value for key, value in net.state_dict().items()}
        checkpoint.save(path, {"state_dict": state, "args": {"arch": more[0], "width": 4}})
        return net, net, (1, 3, 8, 32, 32)
    if model == "dino":
        net = uvos_dino.vision_transformer.VisionTransformer(8, 64, 2, 32)
        state = {"backbone." + key: value for key, value in net.state_dict().items()}
        checkpoint.save(path, {"student": {}, "teacher": state, "args": {}})
        return net, net.embed, (2, 3, 32, 32)
    if model == "block":
        net = uvos_dino.vision_transformer.VisionTransformer(8, 64, 2, 32)
        whole = uvos_dino.model_cluster.AttEncoder(net, 2, 4)
        checkpoint.save(path, {"model_state_dict": whole.state_dict(), "args": {"num_heads": 4}})
        return whole, net.embed, (2, 3, 32, 32)
    width = int(more[0])
    net = stirred(flat.backbone.build(model, 32, width))
    state = {"feature." + key: value for key, value in net.state_dict().items()}
    checkpoint.save(path, {"epoch": 0, "state": state})
    return net, net, (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("folder", "kind", "loader"),
    [
        ("mra", "mae", "timm.models.VisionTransformer("),
        ("mra", "classifier resnet18 imagenet", 'timm.create_model("resnet18", num_classes=3)'),
        ("mra", "classifier resnet8 imagenet", "mra.nets.build("),
        ("fame", "video tiny", "fame.backbone.build("),
        ("fame", "video s3d", "torchvision.models.video.s3d("),
        ("fame", "video r3d_18", "torchvision.models.video.r3d_18("),
        ("uvos_dino", "dino", "timm.models.VisionTransformer("),
        ("uvos_dino", "block", "timm.models.VisionTransformer("),
        ("flat", "Conv4 8", "flat.backbone.build("),
        ("flat", "ResNet12 8", "flat.backbone.build("),
        ("flat", "ResNet10 64", "timm.models.resnet.ResNet("),
        ("flat", "ResNet18 0", "timm.models.resnet.ResNet("),
    ],
)
def test_loaded_by_the_lines_of_the_card_the_outputs_are_equal(folder, kind, loader, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, function, shape = own(kind, tmp_path / "w.pth")
    size = ["--model", kind.split()[0], "--image_size", "32", "--width", kind.split()[1]] if folder == "flat" else []
    main = {"mra": mra.lab.export.main, "fame": fame.lab.export.main, "flat": flat.lab.export.main,
            "uvos_dino": uvos_dino.lab.export.main}[folder]  # fmt: skip
    out = tmp_path / "b.safetensors"
    assert main(["--pretrained", str(tmp_path / "w.pth"), "--format", "safetensors", "--out", str(out), *size]) == 0
    monkeypatch.chdir(tmp_path)
    code, names = code_of(out.with_suffix(".md").read_text()), {}
    exec(code, names)
    assert loader in code
    x = torch.randn(shape)
    with torch.no_grad():
        found = names["model"].eval()(x)
        net.eval()
        expected = function(x)
    torch.testing.assert_close(found.mean((2, 3, 4)) if found.dim() == 5 else found.flatten(1), expected)
    assert (tmp_path / "b-block.safetensors").is_file() == (kind == "block")
    if kind == "block":
        exec(code_of((tmp_path / "b-block.md").read_text()), names)
        tokens = torch.randn(1, 5, 64)
        with torch.no_grad():
            for mine, theirs in zip(net.temporal_transformer, names["model"].eval(), strict=True):
                assert torch.equal(mine(tokens)[0], theirs(tokens)[0])


@pytest.mark.parametrize("name", export.VITS)
def test_sizes_by_which_a_vit_is_named_are_those_of_timm(name):
    patch, dim, depth, heads = export.VITS[name]
    assert export.vit(224, patch, dim, depth, heads).lines[0] == f'model = timm.create_model("{name}", num_classes=0)'
    assert "VisionTransformer(img_size=96" in export.vit(96, patch, dim, depth, heads).lines[0]
    with torch.device("meta"):
        named = timm.create_model(name, num_classes=0)
        plain = VisionTransformer(224, patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0)
    assert named.blocks[0].attn.num_heads == heads
    assert {k: v.shape for k, v in named.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_full_width_loads_into_timm_and_nothing_of_ours(tmp_path):
    moco(hsa.arch.build, 64, "imagenet", tmp_path / "w.pth")
    flags = [
        "--pretrained",
        str(tmp_path / "w.pth"),
        "--format",
        "safetensors",
        "--out",
        str(tmp_path / "b.safetensors"),
    ]
    assert hsa.lab.export_detection.main(flags) == 0
    code = code_of((tmp_path / "b.md").read_text())
    assert "timm.create_model" in code and len(code.strip().split("\n\n")[1].splitlines()) == 2
    code += "\nimport torch; print(float(model.eval()(torch.ones(1, 3, 64, 64)).sum()))"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    encoder = hsa.arch.build("resnet18").eval()
    state = checkpoint.load(tmp_path / "w.pth")["state_dict"]
    encoder.load_state_dict({key.removeprefix("encoder_q."): value for key, value in state.items()})
    with torch.no_grad():
        expected = float(encoder(torch.ones(1, 3, 64, 64), pre_out=True).sum())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)


def test_names_of_files_and_networks_are_checked_before_anything_is_written(tmp_path):
    path, _ = small("hsa", tmp_path / "w.pth")
    for kind, name in (("safetensors", "a.pth"), ("torchvision", "a.safetensors"), ("detectron2", "a.pkl")):
        with pytest.raises(UserError, match=f"with --format {kind} the name must end in"):
            hsa.lab.export_detection.main(["--pretrained", str(path), "--format", kind, "--out", str(tmp_path / name)])
    with pytest.raises(UserError, match="nothing to export"):
        export.check("none", tmp_path / "a.pth", "torchvision")
    with pytest.raises(UserError, match="detectron2 has no resnet18 of width 8"):
        hsa.lab.export_detection.main(["--pretrained", str(path), "--out", str(tmp_path / "a.pth")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        flags = ["--format", "safetensors", "--out", str(tmp_path / "file" / "a.safetensors")]
        hsa.lab.export_detection.main(["--pretrained", str(path), *flags])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "w.pth"]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("hsa", "moco"), ("sage", "byol"), ("mdp", "dilated"), ("flat", "ResNet10 64"), ("mra", "mae"),
     ("mra", "classifier resnet18 imagenet"), ("uvos_dino", "block")],
)  # fmt: skip
def test_a_hub_folder_is_read_by_timm_and_tells_nothing_of_the_machine(folder, kind, tmp_path):
    torch.manual_seed(0)
    run, out = tmp_path / "home of alice" / "run", tmp_path / "hub"
    file = run / "checkpoint.pth"
    more: list[str] = []
    shape: tuple[int, ...] = (2, 3, 32, 32)
    net: Any
    function: Any
    if folder in MAINS:
        _, argv = small(folder, file, 64, "imagenet")
        state = checkpoint.load(file)["state_dict"]
        plain = {re.sub(r"^(encoder_q\.(backbone\.)?|online_net\.0\.)", "", key): value for key, value in state.items()}
        net = timm.create_model("resnet18", num_classes=0, output_stride=8 if folder == "mdp" else 32)
        net.load_state_dict(plain)
        main, function = MAINS[folder], net
        more = ["--normalise", "half"] if folder == "sage" else []
    else:
        net, function, shape = own(kind, file)
        argv = ["--pretrained", str(file)]
        main = {"mra": mra.lab.export.main, "flat": flat.lab.export.main, "uvos_dino": uvos_dino.lab.export.main}[
            folder
        ]
        more = ["--model", "ResNet10", "--image_size", "32", "--width", "64"] if folder == "flat" else []
    saved = checkpoint.load(file)
    private = {"seed": 3, "data_dir": f"{tmp_path}/alice/birds", "val_dir": "birds", "weights_of": "~alice/w.pth"}
    if folder != "flat":  # CloserLookFewShot's files have no flags
        checkpoint.save(file, saved | {"args": {**saved.get("args", {}), **private}})
    (run / "config.json").write_text('{"flags": {}, "git_commit": "abc123"}')
    for place, top1 in (("knn", 31.25), ("knn-data_dir=alice", 29.5)):
        (run / "eval" / place).mkdir(parents=True)
        (run / "eval" / place / "result.json").write_text(f'{{"top1": {top1}, "data_dir": "alice/birds"}}')
    assert main([*argv, *more, "--format", "hub", "--out", str(out)]) == 0
    assert main([*argv, *more, "--format", "hub", "--out", str(out)]) == 0  # the same folder again

    names = {"model.safetensors", "config.json", "README.md"}
    names |= {"block.safetensors", "block.md"} if kind == "block" else set()
    assert {path.name for path in out.iterdir()} == names
    for path in [*out.glob("*.md"), out / "config.json"]:
        assert (
            "alice" not in path.read_text()
            and "birds" not in path.read_text()
            and str(tmp_path) not in path.read_text()
        )
    card = (out / "README.md").read_text()
    assert "| knn | top1 | 31.25 |\n| knn | top1 | 29.5 |" in card and "abc123" in card
    assert ("`--seed 3`" in card) == (folder != "flat")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        net.eval()
        torch.testing.assert_close(model(x), function(x))
    assert "Not a finished training" not in card
    (run / "config.json").write_text('{"flags": {}, "job": "x.y", "git_commit": "abc123", "git_dirty": true}')
    (run / "end.json").write_text('{"state": "stopped by SIGINT", "step": 40, "steps": 120}')
    assert main([*argv, *more, "--format", "hub", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "commit abc123+changes" in card and "training: stopped by SIGINT at step 40 of 120.**" in card
    mean = {"sage": 0.5, "mra": 0.4914 if "classifier" in kind else 0.485}.get(folder, 0.485)
    assert model.pretrained_cfg["mean"][0] == pytest.approx(mean)
    assert model.pretrained_cfg["input_size"][1] == (shape[-1] if folder in ("flat", "mra", "uvos_dino") else 224)
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5)(x).shape == (2, 5)


@pytest.mark.parametrize("folder", ["hsa", "sage", "mdp"])
def test_torch_hub_gives_the_backbone_of_a_run(folder, tmp_path):
    torch.manual_seed(0)
    file, _ = small(folder, tmp_path / "checkpoint.pth", 64, "imagenet")
    more = {"sage": ["--normalise", "half"]}.get(folder, [])
    root = str(Path(export.__file__).resolve().parents[2])
    net = torch.hub.load(root, "backbone", folder, str(file), *more, source="local")
    state = checkpoint.load(file)["state_dict"]
    name = r"(encoder_q\.(backbone\.)?|online_net\.0\.)?conv1.weight"
    (expected,) = (value for key, value in state.items() if re.fullmatch(name, key))
    assert torch.equal(net.get_parameter("conv1.weight"), expected) and not net.training
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    net = torch.hub.load(root, "backbone", folder, str(file), *more, source="local", num_classes=7)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="no exporter for 'nobody'; choose bingo"):
        torch.hub.load(root, "backbone", "nobody", str(file), source="local")


def test_hub_folders_that_cannot_be(tmp_path):
    moco(hsa.arch.build, 8, "cifar", tmp_path / "run" / "w.pth")
    flags = ["--pretrained", str(tmp_path / "run" / "w.pth"), "--format", "hub", "--out"]
    with pytest.raises(UserError, match="timm has no such network .resnet18, width 8"):
        hsa.lab.export_detection.main([*flags, str(tmp_path / "hub")])
    with pytest.raises(UserError, match="run: holds something else than a hub folder"):
        hsa.lab.export_detection.main([*flags, str(tmp_path / "run")])
    with pytest.raises(UserError, match="hub.safetensors: --format hub writes a folder"):
        hsa.lab.export_detection.main([*flags, str(tmp_path / "hub.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_features_of_photographs(tmp_path, capsys):
    file = moco(hsa.arch.build, 64, "imagenet", tmp_path / "w.pth")
    hub, photos, rng = tmp_path / "my hub", tmp_path / "my photos", np.random.default_rng(0)
    hsa.lab.export_detection.main(["--pretrained", str(file), "--format", "hub", "--out", str(hub)])
    sizes = {"a b.PNG": (40, 60), "owls/c.jpg": (300, 200), "owls/deep/d.jpeg": (64, 64), "grey.png": (50, 70)}
    for name, size in sizes.items():
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, size if name == "grey.png" else (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / name)
    flags = ["--workers", "0", "--device", "cpu", "--batch_size", "3", "--out", str(tmp_path / "out" / "e.v1")]
    assert embed.main([str(hub), str(photos), *flags]) == 0
    found = np.load(tmp_path / "out" / "e.v1.npy")
    with open(tmp_path / "out" / "e.v1.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert found.shape == (4, 512) and found.dtype == np.float32
    assert [row["file"] for row in rows] == sorted(sizes) and [int(row["row"]) for row in rows] == [0, 1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["e.v1.csv", "e.v1.npy"]
    encoder = hsa.arch.build("resnet18").eval()  # the same by this workspace's own transform and network
    state = checkpoint.load(file)["state_dict"]
    encoder.load_state_dict({key.removeprefix("encoder_q."): value for key, value in state.items()})
    for row, features in zip(rows, found, strict=True):
        x = augment.plain(224)(Image.open(photos / row["file"]).convert("RGB"))
        with torch.no_grad():
            np.testing.assert_allclose(features, encoder(x[None], pre_out=True)[0].numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="my photos: no hub folder"):
        embed.main([str(photos), str(photos), *flags])
    with pytest.raises(UserError, match="timm:resnet_none: timm cannot load it"):
        embed.main(["timm:resnet_none", str(photos), *flags])
    with pytest.raises(UserError, match="no image"):
        embed.main([str(hub), str(hub), *flags])
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="torn.jpg"):
        embed.main([str(hub), str(photos), *flags])
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_documented_lines_of_onnx(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    found = re.search(r"```python\n(import timm, torch\n.*?)```", (ROOT / "docs" / "running.md").read_text(), re.S)
    assert found
    file = moco(hsa.arch.build, 64, "imagenet", tmp_path / "w.pth")
    hsa.lab.export_detection.main(["--pretrained", str(file), "--format", "hub", "--out", str(tmp_path / "hub")])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(found[1], names)
    x = torch.randn(2, 3, 224, 224)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession("model.onnx")
    (features,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(features, names["model"](x).numpy(), rtol=1e-3, atol=1e-4)
