"""A finished run's backbone through torch.hub, without the training code in your own program:

    torch.hub.load("/path/to/this/folder", "backbone", "hsa", "RUN/checkpoint.pth", source="local")

It is what the folder's exporter writes by `--format hub`, loaded by timm: ResNets of full width and ViTs.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import timm
from torch import nn

dependencies = ["torch", "timm", "safetensors"]

EXPORTERS = {
    **dict.fromkeys(("bingo", "hsa", "kscl"), "export_detection"),
    **dict.fromkeys(("flat", "mra", "sage", "sscl", "uvos_dino"), "export"),
    "mdp": "export_mmseg",
}


def backbone(paper: str, checkpoint: str, *flags: str, **timm_flags: Any) -> nn.Module:
    """The network of a run in evaluation mode, images [B, 3, H, W] -> features [B, D].

    Args:
        paper: the folder that trained it, one of EXPORTERS; checkpoint: its checkpoint.pth, or the run's folder.
        flags: of the exporter, such as "--copy", "momentum"; timm_flags: of timm.create_model, such as num_classes=10.

    Raises:
        ValueError: no such paper. UserError: no such file, or a network that timm does not have.
    """
    if paper not in EXPORTERS:
        raise ValueError(f"no exporter for {paper!r}; choose {', '.join(EXPORTERS)}")
    exporter = importlib.import_module(f"{paper}.lab.{EXPORTERS[paper]}")
    given = [checkpoint] if paper == "mdp" else ["--pretrained", checkpoint]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hub"
        exporter.main([*given, "--format", "hub", "--out", str(out), *flags])
        return timm.create_model(f"local-dir:{out}", pretrained=True, **timm_flags).eval()
