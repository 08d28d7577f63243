"""Table of the arms that `run_arms.sh` trained: python -m hsa.lab.arms runs/hsa/arms/small/cifar10 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into hsa/lab/logs/. `python -m hsa.lab.arms RUN --bags FILE.npy` writes the neighbours that one run trained
with last, where it had some, for the `--bags` of hsa.main_knn.
"""

import argparse
from pathlib import Path

import numpy as np

from shared_utils import checkpoint
from shared_utils.lab.arms import Arms, evaluations
from shared_utils.run import cli


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from its two evaluations, None while they are not complete.

    Nearest neighbours that left one image out at a time are all there is: the set has no validation images.
    """
    knn, linear = evaluations(folder, "knn", "linear")
    if knn is None or linear is None:
        return None
    result = dict(knn)
    if linear:
        blocks = linear["blocks"]
        result |= {"linear_last": linear["linear_last"], "linear3": blocks[min(blocks, key=int)]["last"]}
    return {name: result[name] for name in (*ARMS.metrics, *ARMS.shown) if name in result}


ARMS = Arms(
    paper="hsa",
    home=Path(__file__).resolve().parents[1],
    arms={
        "moco": "MoCo v2, equal epochs",
        "moco_eq": "MoCo v2, equal compute (2.9 x the epochs)",
        "moco_level": "MoCo v2 + level 3",
        "cross": "cross-sample positives, no CutMix",
        "full": "HSA, the release's loss",
        "level": "HSA + level 3 (reconstructed)",
        "random": "HSA with random neighbours (control)",
        "label": "HSA with neighbours by label (upper bound)",
        "untrained": "untrained network (floor)",
    },
    metrics={
        "few_shot": "10-shot kNN top-1",
        "knn": "20-NN top-1",
        "purity": "5-NN purity",
        "linear_last": "linear top-1 (cached features)",
        "linear3": "linear top-1 of layer3 (cached features)",
    },
    # Of arms with neighbours, each on its own ones: neighbours that were searched are close by construction and random
    # ones are not.
    shown={"bag_gap": "cosine gap of its own neighbours"},
    sets={
        "cifar10": "CIFAR-10, 4,000 images, 32 px",
        "tiny_imagenet50": "Tiny-ImageNet, 50 classes, 4,000 images, 32 px",
        # Recorded before there was a batched loader; run_arms.sh trains a set SET_pil with --aug_backend pil.
        "cifar10_pil": "CIFAR-10, 4,000 images, 32 px, PIL pipeline, 3 seeds (2026-11)",
        "tiny_imagenet50_pil": "Tiny-ImageNet, 50 classes, 4,000 images, 32 px, PIL pipeline, 3 seeds (2026-11)",
    },
    only=dict.fromkeys(
        ("cifar10_pil", "tiny_imagenet50_pil"), ("moco", "moco_eq", "cross", "full", "level", "random")
    ),
    claim="few_shot",
    baseline="moco",
    pairs=[
        ("full", "moco"), ("full", "moco_eq"),
        ("cross", "moco"), ("full", "cross"), ("level", "full"), ("level", "moco_eq"), ("full", "random"),
        ("random", "moco"), ("moco_level", "moco"), ("label", "full"),
        ("moco_eq", "moco"), ("moco", "untrained"),
    ],
    claims=[("full", "moco", "few_shot"), ("full", "moco_eq", "few_shot")],
    # More epochs are MoCo v2's known improvement: 67.5 after 200, 71.1 after 800 (its README).
    controls={
        ("moco_eq", "moco"): "above", ("moco", "untrained"): "above",
    },
    positive=("moco_eq", "moco"),
    floor="untrained",
    curve=(
        "step", "loss", "acc1", "sim/positive", "sim/negative", "sim/neighbour", "feat/std",
        "neighbours/purity",
    ),
    command="export DATA_ROOT=/path/to/data SET={set} && ARMS='{arms}' SEEDS='{seeds}' bash hsa/run_arms.sh small",
    read=read,
)  # fmt: skip


def write_bags(folder: Path, file: Path) -> None:
    """The neighbours [N, K] in the checkpoint of the run in `folder`, into the .npy `file`; nothing without them."""
    saved = checkpoint.load(folder / "checkpoint.pth")
    if "neighbours" in saved:
        np.save(file, saved["neighbours"]["index"].numpy())


def get_parser() -> argparse.ArgumentParser:
    p = ARMS.parser(__doc__ or "")
    p.add_argument("--bags", type=Path, help="write the neighbours of the one run in `root` to this .npy file instead")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.bags:
        write_bags(args.root, args.bags)
        return 0
    return ARMS.main(args)


if __name__ == "__main__":
    cli(main)
