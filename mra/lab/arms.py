"""Table of the arms that `run_arms.sh` trained: python -m mra.lab.arms runs/mra/arms/small/texture [--record]

Mean and sample standard deviation over the seeds; the arms of a seed have the same labelled images, start, batches and
crops, so they are compared seed by seed. `--record` writes the rows of the small tier into results.csv and compact logs
into mra/lab/logs/, from the json files of the runs alone.
"""

import argparse
import json
from pathlib import Path

from shared_utils.lab.arms import Arms
from shared_utils.run import cli


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from its own result and its occlusion test; None while they are not complete."""
    files = [folder / "result.json", folder.with_name(f"{folder.name}-test") / "result.json"]
    if not all(file.is_file() for file in files):
        return None
    trained, tested = (json.loads(file.read_text()) for file in files)
    result = {**tested, "top1": trained["top1"]}
    if "test_a_top1" in trained:
        result["test_a"] = trained["test_a_top1"]
    return {name: result[name] for name in (*ARMS.metrics, *ARMS.shown) if name in result}


ARMS = Arms(
    paper="mra",
    home=Path(__file__).resolve().parents[1],
    arms={
        "base": "baseline",
        "mra": "MRA",
        "random": "random mask + reconstruction",
        "cutout": "Cutout",
        "cutmix": "CutMix",
        "mixup": "Mixup",
        "erase": "attention mask, erased only",
        "inverse": "inverse MRA (the most attended erased)",
        "full": "MRA, decoder output everywhere",
        "out_dot": "MRA, dot product of outputs",
        "mra_cutmix": "MRA and CutMix",
        "ratio0.2": "MRA, ratio 0.2",
        "ratio0.6": "MRA, ratio 0.6",
        "ratio0.8": "MRA, ratio 0.8",
        "prob0.25": "MRA, probability 0.25",
        "prob0.5": "MRA, probability 0.5",
        "prob0.75": "MRA, probability 0.75",
    },
    metrics={
        "top1": "test top-1",
        "test_a": "top-1 on test A (shortcut holds)",
        "occlusion_random": "area under occlusion, random cells",
        "occlusion_salient": "area under occlusion, attended cells first",
        "occlusion_nonsalient": "area under occlusion, unattended cells first",
    },
    # Of the autoencoder, not of the classifier: the same for all arms of a set.
    shown={
        "kept_foreground": "object kept by attention (%)",
        "kept_random": "by random masks (%)",
        "mse": "squared error on erased patches",
        "mse_mean": "of the mean colour",
        "entropy": "entropy of the attention",
    },
    sets={
        "texture": "texture shortcut, 2,000 labels, 48 px; top-1 on test B, where the texture says nothing",
        "cifar10": "CIFAR-10, 1,000 labels, 32 px",
    },
    claim="top1",
    baseline="base",
    pairs=[
        ("mra", "base"), ("mra", "random"), ("mra", "erase"), ("random", "base"), ("inverse", "base"),
        ("mra", "inverse"), ("mra", "cutout"), ("mra", "cutmix"), ("mra", "mixup"), ("cutout", "base"),
        ("cutmix", "base"), ("mra_cutmix", "cutmix"), ("full", "mra"), ("out_dot", "base"), ("ratio0.2", "base"),
        ("ratio0.6", "base"), ("ratio0.8", "base"), ("prob0.25", "base"), ("prob0.5", "base"), ("prob0.75", "base"),
    ],
    claims=[("mra", "base", "top1")],
    # Cutout is a known improvement: CIFAR-10 95.28 -> 96.01 (uoguelph-mlrg/Cutout), ImageNet 76.32 -> 77.07.
    controls={
        ("cutout", "base"): "above", ("inverse", "base"): "below",
        ("mra", "random"): "above",
    },
    positive=("cutout", "base"),
    floor=12.5,  # chance of the texture set (eight balanced classes; CIFAR-10: 10)
    curve=("step", "loss", "acc/train", "val/top1", "val/test_a_top1", "mra/entropy"),
    command="export DATA_ROOT=/path/to/data SET={set} && ARMS='{arms}' SEEDS='{seeds}' bash mra/run_arms.sh small",
    read=read,
)  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    return ARMS.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    return ARMS.main(get_parser().parse_args(argv))


if __name__ == "__main__":
    cli(main)
