"""What fine-tuning takes of a pretraining: backbone and decode head of one encoder, in mmsegmentation's names.

And what a pretraining starts from: --init.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mdp.models import Encoder
from shared_utils import UserError, checkpoint
from shared_utils.init import initialise

FORMATS = ("mmseg", "torchvision")


def export(state_dict: Mapping[str, Tensor], branch: str = "q", fmt: str = "mmseg") -> dict[str, Tensor]:
    """Select the weights that are transferred.

    Args:
        state_dict: keys ``encoder_q.backbone...``, ``encoder_q.decode_head...``, also below ``module.``.
        branch: ``q``, the trained encoder, or ``k``, its moving average.
        fmt: ``mmseg`` keeps ``backbone.*`` and ``decode_head.*``; ``torchvision`` keeps the backbone, unprefixed.
    Raises:
        UserError: not an MDP state dict, or one without that branch.
    """
    if branch not in ("q", "k"):
        raise UserError(f"branch '{branch}' is not known; choose q (trained) or k (moving average)")
    if fmt not in FORMATS:
        raise UserError(f"format '{fmt}' is not known; choose one of {', '.join(FORMATS)}")
    prefix = f"encoder_{branch}."
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "backbone.conv1.weight" not in own:
        first = next(iter(state_dict), "no key at all")
        raise UserError(f"not an MDP pretraining checkpoint: no {prefix}backbone.conv1.weight (its first key: {first})")
    if fmt == "torchvision":
        return {k.removeprefix("backbone."): v for k, v in own.items() if k.startswith("backbone.")}
    return {k: v for k, v in own.items() if k.startswith(("backbone.", "decode_head."))}


def load_pretrained(path: str | Path, branch: str = "q") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in mmsegmentation's names and the flags of their pretraining.

    Accepts a pretraining checkpoint or a file written by this exporter, whose flags are unknown ({}).
    """
    obj = checkpoint.load(path)
    if isinstance(obj, Mapping) and isinstance(obj.get("state_dict"), Mapping):
        try:
            return export(obj["state_dict"], branch), dict(obj.get("args") or {})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if isinstance(obj, Mapping) and isinstance(obj.get("backbone.conv1.weight"), Tensor):
        return dict(obj), {}
    raise UserError(
        f"{path}: not an MDP pretraining checkpoint and not an export of one; see python -m mdp.main_pretrain"
    )


def start(encoder: Encoder, spec: str, arch: str) -> str:
    """Load what --init names: none, imagenet (torchvision), timm:NAME, weights of a backbone, or a run of this job.

    Of a run, or of its checkpoint, decode head and projector are loaded, too; a classifier, of other classes perhaps,
    stays new. Returns a line for the preflight. UserError: no such file, or weights of another network.
    """
    if spec == "none":
        return "random"
    if spec == "imagenet":
        import torchvision

        weights = torchvision.models.get_model(arch, weights="DEFAULT").state_dict()
        return f"imagenet: {checkpoint.load_strict(encoder.backbone, weights, drop=('fc.*',))}"
    path = Path(spec)
    file = path / "checkpoint.pth" if path.is_dir() else path
    state = {} if spec.startswith("timm:") else checkpoint.read_weights(file)
    if "backbone.conv1.weight" not in state:
        return initialise(encoder.backbone, spec)
    state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    new = {key.split(".")[0] for key in encoder.state_dict()} - {key.split(".")[0] for key in state}
    try:
        report = checkpoint.load_strict(encoder, state, ["projector.*"], [f"{part}.*" for part in new])
    except UserError as error:
        raise UserError(f"--init {spec}: {error}; --arch and its like must name the network of the run") from None
    return f"{spec}: {report}"
