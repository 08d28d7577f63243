"""Weights of a checkpoint for this folder's encoder: own runs, public files, timm; and what a checkpoint holds."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_utils import UserError, checkpoint, init, timm_nets
from shared_utils.evaluation import stored_flags
from shared_utils.flags import positive
from sscl.arch import ARCHS, STEMS, Encoder, build
from sscl.model import SsCL

MOCO_HEAD = {f"fc.{layer}.{kind}": f"proj.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def default_width(arch: str) -> int:
    """Channels of the first stage: ResNets 64, WRN-28-2 32."""
    return 32 if arch == "wrn28" else 64


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the encoder: own ones stay; MoCo's `fc.0`, `fc.2` become `proj.*`, all else goes below `backbone.`"""
    if any(key.startswith("backbone.") for key in state):
        return dict(state)
    return {MOCO_HEAD.get(key, f"backbone.{key}"): value for key, value in state.items()}


class Whole:
    """The checkpoint's `state_dict`: the model's tensors under their own names, loaded strictly, and class names."""

    def __init__(self, model: SsCL, classes: Sequence[str] = ()):
        self.model, self.classes = model, list(classes)

    def state_dict(self) -> dict[str, Tensor]:
        names = torch.tensor(list(json.dumps(self.classes).encode()), dtype=torch.uint8)  # tensors alone are weights
        return {**self.model.state_dict(), "class_names": names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        checkpoint.load_strict(self.model, state, drop=("class_names",))


def class_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names that `Whole` has kept; none in checkpoints that are older."""
    return json.loads(bytes(state["class_names"].tolist())) if "class_names" in state else []


def initialise(encoder: Encoder, spec: str) -> str:
    """Start from --init: the backbone, and g where the file has one of the same shape; the class head stays new.

    Args:
        spec: a file, the folder of a run, or timm:NAME.

    Returns: a line for the preflight. UserError: no such file or name, or another network's weights.
    """
    if spec.startswith("timm:"):
        return init.initialise(encoder.backbone, spec)
    path = Path(spec) / "checkpoint.pth" if Path(spec).is_dir() else Path(spec)
    state = {k: v for k, v in renamed(checkpoint.read_weights(path)).items() if not k.startswith("fc.")}
    theirs = {k: v.shape for k, v in state.items() if k.startswith("proj.")}
    if theirs != {k: v.shape for k, v in encoder.state_dict().items() if k.startswith("proj.")}:
        state = {k: v for k, v in state.items() if k not in theirs}
    drop = [f"backbone.{pattern}" for pattern in init.HEADS]
    new = ["fc.*", "*.num_batches_tracked", *([] if "proj.0.weight" in state else ["proj.*"])]
    try:
        return f"{spec}: {checkpoint.load_strict(encoder, state, drop, new)}"
    except UserError as error:
        raise UserError(f"--init {spec}: {error}; --arch, --width and --stem must be those of the file") from None


def momentum_copy(path: str) -> dict[str, Tensor]:
    """The tensors of `encoder_k` in a checkpoint of sscl.main. UserError: another file."""
    saved = checkpoint.load(path)
    state = saved.get("state_dict") if isinstance(saved, Mapping) else None
    own = {k.removeprefix("encoder_k."): v for k, v in (state or {}).items() if k.startswith("encoder_k.")}
    if "fc.weight" not in own:
        raise UserError(f"{path}: holds no momentum copy with a class head; give a checkpoint of sscl.main")
    return own


def add_network_flags(a: Any) -> None:
    a("--pretrained", required=True, help="checkpoint of a run of ours, a MoCo or torchvision file, or none: random")
    a("--arch", choices=ARCHS, help="default: the checkpoint's, else resnet50")
    a("--width", type=positive, help="channels of the first stage; default: the checkpoint's, else the architecture's")
    a("--stem", choices=STEMS, help="default: the checkpoint's, else imagenet")


def load_encoder(args: argparse.Namespace, classes: int | None, copy: str = "query") -> tuple[Encoder, str]:
    """The encoder of --pretrained, and a line about what was loaded; resolves --arch, --width and --stem.

    Args:
        classes: outputs of the class head that must be in the file; None: the head is not needed and stays new.
        copy: `query` or `momentum`.
    """
    stored = stored_flags(args.pretrained)
    args.arch = args.arch or stored.get("arch") or "resnet50"
    args.width = args.width or stored.get("width") or default_width(args.arch)
    args.stem = args.stem or stored.get("stem") or "imagenet"
    encoder = Encoder(build(args.arch, args.width, args.stem), classes or 1, stored.get("dim", 128))
    if size := getattr(args, "img_size", None):
        timm_nets.check_size(encoder.backbone, args.arch, size)
    what = f"{args.arch}, width {args.width}, stem {args.stem}"
    args.backbone_sha256 = ""
    if args.pretrained == "none":
        return encoder, f"{what}, random weights"
    state = renamed(checkpoint.read_weights(args.pretrained) if copy == "query" else momentum_copy(args.pretrained))
    if classes is None:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    missing = ["*.num_batches_tracked", *(["fc.*"] if classes is None else [])]
    missing += [] if any(key.startswith("proj.") for key in state) else ["proj.*"]
    try:
        report = checkpoint.load_strict(encoder, state, ("backbone.fc.*",), missing)
    except UserError as error:
        raise UserError(f"{args.pretrained}, taken as {what}: {error}") from None
    digest = hashlib.sha256()
    for key, value in sorted(encoder.backbone.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    args.backbone_sha256 = digest.hexdigest()[:16]
    return encoder, f"{what}, {args.pretrained}: {report}"
