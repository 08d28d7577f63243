"""--init: a network that starts from given weights: a finished run, a published file, or one of timm's networks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from shared_utils import UserError, checkpoint

# What the file has on top of its backbone: classifiers, projectors, predictors, prototypes.
HEADS = ("fc.*", "fc_*", "head.*", "heads.*", "classifier.*", "projection_head.*", "projector.*", "predictor.*",
         "prototypes.*", "queue*")  # fmt: skip


def add_init_flag(parser: argparse.ArgumentParser) -> None:
    """--init, of a pretraining script."""
    parser.add_argument(
        "--init",
        metavar="FILE|RUN|timm:NAME",
        help="start the backbone from these weights: a checkpoint (of this workspace, torchvision, timm, MoCo, DINO, "
        "SwAV, BYOL), the folder of a finished run, or timm:NAME, which timm downloads; heads start new",
    )


def initialise(network: nn.Module, spec: str, missing_ok: Sequence[str] = (), drop: Sequence[str] = HEADS) -> str:
    """Load the weights that `spec` names into a backbone; every tensor of it is loaded, or an error says which is not.

    Args:
        spec: a file, a run's folder (its checkpoint.pth) or timm:NAME.
        missing_ok: patterns of keys of `network` that stay new (its head).
        drop: patterns of keys of the file that `network` may lack.

    Returns: one line for the preflight.

    Raises:
        UserError: no such file or name, not weights, or weights of another network; `network` is then unchanged.
    """
    if spec.startswith("timm:"):
        import timm

        try:
            state = timm.create_model(spec[5:], pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # whatever hub or network raise
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"--init {spec}: timm cannot give it ({reason}); timm.list_models lists names") from None
    else:
        path = Path(spec)
        state = checkpoint.read_weights(path / "checkpoint.pth" if path.is_dir() else path)
    counts = ("*.num_batches_tracked", "num_batches_tracked")  # files of old PyTorch versions lack them
    try:
        report = checkpoint.load_strict(network, state, drop, (*missing_ok, *counts))
    except UserError as error:
        raise UserError(f"--init {spec}: {error}; --arch and its like must name the network of the file") from None
    return f"{spec}: {report}"
