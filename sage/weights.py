"""Networks that others have trained: their heads, their size, and the input that they were trained on."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sage.arch import DEPTHS
from shared_utils import UserError, checkpoint

DROP = ("fc.*", "projection_head.*", "prototypes.*", "classifier.3.*", "predictor*")  # heads of public files
NORMS = ("half", "imagenet")  # mean and standard deviation 0.5; those of ImageNet
IMAGENET = ("encoder_q.", "base_encoder.", "projection_head.", "prototypes.", "teacher.")  # MoCo, SwAV, DINO


def input_norm(path: str) -> str | None:
    """Of `NORMS`, what the network in the file was trained on, or None where the file does not tell.

    `sage.train` sees images in -1..1, and so does the release, whose files hold the decoder too. The releases of MoCo
    v1 to v3, DINO and SwAV, and classifiers of ImageNet's 1,000 classes (torchvision, timm), take ImageNet's mean and
    standard deviation. Names of OpenSelfSup do not tell: its own networks saw ImageNet's, those of SaGe's code did not.
    """
    loaded = checkpoint.load(path)
    flags = loaded.get("args") if isinstance(loaded, Mapping) else None
    if isinstance(flags, Mapping) and "evaluator_norm" in flags:  # a run of sage.train
        return "half"
    if isinstance(loaded, Mapping) and {"student", "teacher"} <= set(loaded):
        return "imagenet"
    state: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {}
    state = next((state[k] for k in ("state_dict", "model") if isinstance(state.get(k), Mapping)), state)
    names = {str(key).removeprefix("module."): value for key, value in state.items()}
    if any(name.startswith("online_net.") for name in names):
        return "half" if any(name.startswith("decoder.") for name in names) else None
    if any(name.startswith("encoder_q.fc.fc1.") for name in names):  # BYOL under MoCo's names: whose is not known
        return None
    head = names.get("fc.weight")
    if any(name.startswith(IMAGENET) for name in names) or isinstance(head, Tensor) and head.shape[0] == 1000:
        return "imagenet"
    return None


def resolve_norm(path: str, asked: str, flag: str) -> str:
    """`asked`, or with `auto` what the file tells; random weights have none: images in -1..1.

    UserError where the file does not tell: a network that sees another range than in its training gives lower numbers
    without a word.
    """
    if asked != "auto":
        return asked
    found = "half" if path in ("none", "random") else input_norm(path)
    if found is None:
        raise UserError(
            f"{path}: does not say which mean and standard deviation its images had in training; give {flag} imagenet "
            f"(torchvision, timm, OpenSelfSup, MoCo, DINO, ...) or {flag} half (networks of SaGe's own code)"
        )
    return found


def guess_network(state: Mapping[str, Tensor]) -> tuple[str, int, bool] | None:
    """Name, width and whether the stem is ImageNet's (7 x 7) of a ResNet's weights; None for another network."""
    first = state.get("conv1.weight")
    if first is None or first.dim() != 4:
        return None
    blocks: dict[int, int] = {}
    for key in state:
        if found := re.match(r"layer([1-4])\.(\d+)\.", key):
            stage, block = int(found[1]), int(found[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    depths, bottleneck = tuple(blocks.get(i, 0) for i in range(1, 5)), "layer1.0.conv3.weight" in state
    for name, (kind, wanted) in DEPTHS.items():
        if wanted == depths and (kind.expansion == 4) == bottleneck:
            return name, first.shape[0], first.shape[-1] == 7
    return None
