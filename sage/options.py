"""What the evaluations of SaGe have in common: flags of the data and of the network, and its weights."""

import argparse
from typing import Any

from sage.arch import DEPTHS, STEMS, build
from sage.finegrained import READERS
from shared_utils.evaluation import add_data_flags, add_network_flags, load_backbone

DROP = ("fc.*", "projection_head.*", "prototypes.*", "classifier.3.*", "predictor*")  # heads of other public files


def add_flags(p: argparse.ArgumentParser) -> None:
    """--pretrained with its architecture, --data_dir with its layout."""
    add_network_flags(p, list(DEPTHS), STEMS, "resnet50")
    add_data_flags(p, list(READERS))


def backbone(args: argparse.Namespace) -> tuple[Any, str]:
    """The backbone of --pretrained (`online_net.0.*` of a run of ours or of the release), and what was loaded."""
    return load_backbone(build, args, "resnet50", DROP)
