"""Exported backbones: safetensors that load elsewhere by the two lines of their card, detectron2's names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import bingo.arch
import bingo.export_detection
import hsa.arch
import hsa.export_detection
import kscl.arch
import kscl.export_detection
import mdp.export_mmseg
import mdp.models
import sage.arch
import sage.export
from shared_utils import UserError, checkpoint, export

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
    "bingo": bingo.export_detection.main, "hsa": hsa.export_detection.main, "kscl": kscl.export_detection.main,
    "mdp": mdp.export_mmseg.main, "sage": sage.export.main,
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
    assert "`--seed 3`" in card and "Apache-2.0" in card and "| experiment |" in card and "arXiv" in card


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
    assert hsa.export_detection.main(flags) == 0
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
            hsa.export_detection.main(["--pretrained", str(path), "--format", kind, "--out", str(tmp_path / name)])
    with pytest.raises(UserError, match="nothing to export"):
        export.check("none", tmp_path / "a.pth", "torchvision")
    with pytest.raises(UserError, match="detectron2 has no resnet18 of width 8"):
        hsa.export_detection.main(["--pretrained", str(path), "--out", str(tmp_path / "a.pth")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        flags = ["--format", "safetensors", "--out", str(tmp_path / "file" / "a.safetensors")]
        hsa.export_detection.main(["--pretrained", str(path), *flags])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "w.pth"]
