"""Table of the arms that `run_arms.sh` trained: python -m sage.lab.arms runs/sage/arms/small/cifar10 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into sage/lab/logs/.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from shared_utils.lab.arms import Arms, evaluations
from shared_utils.run import cli

# Evaluations beside a run: {job: the numbers that are taken from its result.json}.
LABELS = {"knn": ("knn1", "knn20", "knn200"), "linear": ("linear",)}
FACTORS = {
    "attributes": (
        "linear_mean", "linear_class", "linear_hue", "linear_texture", "linear_background",
        "knn20_mean", "knn20_class", "knn20_hue", "knn20_texture", "knn20_background",
    ),
}  # fmt: skip


def has_attributes(root: Path) -> bool:
    """Whether the arms in this folder were trained on the generated attribute set (tier mini, or its small set)."""
    return root.resolve().name in ("mini", "mini_attributes")


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from the evaluations beside it, None while they are not complete.

    Nearest neighbours that left one image out at a time are all there is: the set has no validation images.
    `explained` is what the freshly trained decoder removes of the mean image's error, in per cent.
    """
    out: dict[str, float] = {}
    jobs = FACTORS if has_attributes(folder.parent.parent) else LABELS
    for (_, numbers), result in zip(jobs.items(), evaluations(folder, *jobs)):
        if result is None:
            return None
        out |= {number: result[number] for number in numbers if result}
        if "recon" in result:
            out["explained"] = 100 * (1 - result["recon"] / result["recon_mean_image"])
    return out


CIFAR = Arms(
    paper="sage",
    home=Path(__file__).resolve().parents[1],
    arms={
        "byol": "BYOL, equal epochs",
        "pixel": "BYOL + generation by pixels",
        "sage": "SaGe",
        "random": "SaGe with a random evaluator (control)",
        "byol_sum": "BYOL at the summed budget (evaluator + SaGe)",
        "untrained": "untrained network (floor)",
    },
    metrics={
        "linear": "linear top-1 (cached features)",
        "knn20": "20-NN top-1",
        "knn1": "1-NN top-1",
        "knn200": "200-NN top-1",
    },
    sets={"cifar10": "CIFAR-10, 4,000 images, 32 px"},
    claim="linear",
    baseline="byol",
    pairs=[("sage", "byol"), ("sage", "byol_sum"), ("sage", "pixel"), ("sage", "random"), ("pixel", "byol"),
           ("byol_sum", "byol"), ("byol", "untrained")],
    claims=[("sage", "byol", "linear"), ("sage", "byol_sum", "linear")],
    # More epochs are BYOL's known improvement: 69.6 after 100, 74.3 after 1,000 (its paper; recalled).
    controls={("byol_sum", "byol"): "above", ("byol", "untrained"): "above", ("sage", "random"): "above"},
    positive=("byol_sum", "byol"),
    floor="untrained",
    curve=("step", "loss", "loss1", "loss_mse", "loss_f1", "loss_f7", "loss_f14", "loss_f28", "feat/std"),
    command="export DATA_ROOT=/path/to/data SET={set} && ARMS='{arms}' SEEDS='{seeds}' bash sage/run_arms.sh small",
    read=read,
)  # fmt: skip
ATTRIBUTES = replace(
    CIFAR,
    metrics={
        "linear_mean": "linear accuracy, mean of the attributes",
        "linear_class": "linear accuracy of shape",
        "linear_hue": "linear accuracy of hue",
        "linear_texture": "linear accuracy of texture",
        "linear_background": "linear accuracy of background",
        "knn20_mean": "20-NN accuracy, mean of the attributes",
        "knn20_class": "20-NN accuracy of shape",
        "knn20_hue": "20-NN accuracy of hue",
        "knn20_texture": "20-NN accuracy of texture",
        "knn20_background": "20-NN accuracy of background",
        "explained": "pixels explained by the frozen features, per cent of the mean image's error",
    },
    sets={"mini_attributes": "generated attribute set, 1,000 images, 32 px"},
    claim="linear_mean",
    claims=[("sage", "byol", "linear_mean"), ("sage", "byol_sum", "linear_mean")],
)
CIFAR.family = ATTRIBUTES.family = (CIFAR, ATTRIBUTES)


def arms_of(root: Path) -> Arms:
    """What is measured on the set whose folder `root` is."""
    return ATTRIBUTES if has_attributes(root) else CIFAR


def get_parser() -> argparse.ArgumentParser:
    return CIFAR.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    return (arms_of(args.root) if args.root else CIFAR).main(args)


if __name__ == "__main__":
    cli(main)
