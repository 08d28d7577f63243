"""Table of the arms that `run_arms.sh` trained: python -m bingo.lab.arms runs/bingo/arms/small/cifar10 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into bingo/lab/logs/.
"""

import argparse
from pathlib import Path

from shared_utils.lab.arms import Arms, evaluations
from shared_utils.run import cli


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from its two evaluations, None while they are not complete.

    Nearest neighbours that left one image out at a time are all there is: the set has no validation images.
    """
    knn, linear = evaluations(folder, "knn", "linear")
    if knn is None or linear is None:
        return None
    result = {**knn, **linear}
    return {name: result[name] for name in ARMS.metrics if linear or name in result}


ARMS = Arms(
    paper="bingo",
    home=Path(__file__).resolve().parents[1],
    arms={
        "alone": "student alone (MoCo v2), equal epochs",
        "alone_eq": "student alone (MoCo v2), equal compute (6.6 x the epochs)",
        "intra": "intra-sample distillation alone",
        "anchors": "two anchors without cross terms or CutMix",
        "bingo": "BINGO, release's loss",
        "paper_loss": "BINGO, L_intra + L_inter as published",
        "random": "BINGO with random bags (control)",
        "label": "BINGO with label bags (upper bound)",
        "alone_wide": "student alone (MoCo v2), BINGO's head, equal epochs",
        "alone_wide_eq": "student alone (MoCo v2), BINGO's head, equal compute (6 x the epochs)",
        "bingo_narrow": "BINGO, release's loss, MoCo v2's head, batch-norm shares of 32",
        "bingo_wide": "BINGO, release's loss, batch-norm shares of 32",
        "untrained": "untrained student (floor)",
    },
    metrics={
        "few_shot": "10-shot kNN top-1",
        "knn": "20-NN top-1",
        "linear_last": "linear top-1 (cached features)",
        "purity": "5-NN purity",
        "bag_gap": "bag gap",
    },
    sets={
        "cifar10": "CIFAR-10, 4,000 images, 32 px",
        "tiny_imagenet50": "Tiny-ImageNet, 50 classes, 4,000 images, 32 px",
    },
    claim="few_shot",
    baseline="alone",
    against={"bingo_wide": "alone_wide", "alone_wide_eq": "alone_wide"},  # of the same head
    pairs=[
        ("bingo", "alone"), ("bingo", "alone_eq"),
        ("bingo", "intra"), ("bingo", "anchors"), ("bingo", "random"), ("label", "bingo"), ("intra", "alone"),
        ("paper_loss", "bingo"), ("alone_eq", "alone"), ("alone", "untrained"),
        ("bingo_narrow", "alone"), ("bingo_narrow", "alone_eq"), ("bingo_wide", "alone_wide"),
        ("bingo_wide", "alone_wide_eq"), ("alone_wide_eq", "alone_wide"), ("alone_wide", "untrained"),
    ],
    # Equal heads and batch-norm shares on both sides; `bingo` against `alone` differs in both and is descriptive.
    claims=[("bingo_wide", "alone_wide", "few_shot"), ("bingo_wide", "alone_wide_eq", "few_shot")],
    # More epochs are MoCo v2's known improvement: 67.5 after 200, 71.1 after 800 (its README).
    controls={
        ("alone_wide_eq", "alone_wide"): "above", ("alone_wide", "untrained"): "above",
        ("alone_eq", "alone"): "above", ("alone", "untrained"): "above", ("bingo", "random"): "above",
        ("label", "bingo"): "above",
    },
    positive=("alone_wide_eq", "alone_wide"),
    floor="untrained",
    curve=("step", "loss", "acc1", "sim/positive", "sim/bag", "feat/std"),
    command="export DATA_ROOT=/path/to/data SET={set} && bash bingo/run_teacher.sh small && bash bingo/run_knn.sh small"
    " && ARMS='{arms}' SEEDS='{seeds}' bash bingo/run_arms.sh small",
    read=read,
)  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    return ARMS.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    return ARMS.main(get_parser().parse_args(argv))


if __name__ == "__main__":
    cli(main)
