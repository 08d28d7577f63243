"""What the evaluations of SaGe have in common: flags of the data and of the network, and its weights."""

import argparse
from typing import Any

from sage.arch import DEPTHS, STEMS, build
from sage.finegrained import READERS
from sage.weights import DROP, NORMS, resolve_norm
from shared_utils.evaluation import add_data_flags, add_network_flags, load_backbone
from shared_utils.flags import add_aug_flag


def add_flags(p: argparse.ArgumentParser) -> None:
    """--pretrained with its architecture, --data_dir with its layout."""
    add_network_flags(p, list(DEPTHS), STEMS, "resnet50")
    p.add_argument(
        "--normalise",
        choices=["auto", *NORMS],
        default="auto",
        help="mean and standard deviation of the backbone's input: 0.5, ImageNet's, or as its file tells (a run of "
        "ours, MoCo, DINO, SwAV, a classifier)",
    )
    add_data_flags(p, list(READERS))
    add_aug_flag(p)


def normalisation(args: argparse.Namespace) -> str:
    """Of `NORMS`: what --normalise says or the file of --pretrained tells; UserError where neither does."""
    return resolve_norm(str(args.pretrained), args.normalise, "--normalise")


def backbone(args: argparse.Namespace) -> tuple[Any, str]:
    """The backbone of --pretrained (`online_net.0.*` of a run of ours or of the release), and what was loaded."""
    network, report = load_backbone(build, args, "resnet50", DROP)
    return network, f"{report}; input {normalisation(args)}"
