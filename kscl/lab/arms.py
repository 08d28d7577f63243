"""Table of the arms that `run_arms.sh` trained: python -m kscl.lab.arms runs/kscl/arms/small/cifar10 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into kscl/lab/logs/.
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
    result = {**linear, **knn}
    return {name: result[name] for name in ARMS.metrics if linear or name in result}


ARMS = Arms(
    paper="kscl",
    home=Path(__file__).resolve().parents[1],
    arms={
        "moco": "MoCo v2 (A0: K = 1, cosine), equal epochs",
        "moco_eq3": "MoCo v2, equal compute to K = 3 (1.5 x the epochs)",
        "moco_eq5": "MoCo v2, equal compute to K = 5 (2 x the epochs)",
        "abs": "K = 1, absolute cosine (A1)",
        "k3": "KSCL, K = 3 (A2)",
        "k5": "KSCL, K = 5 (A3)",
        "mean": "K = 5, rank 1: one direction in place of a subspace (A4)",
        "full": "K = 5, whole span, energy 1 (A5)",
        "grad": "K = 3, gradient through the positive subspace (A6)",
        "untrained": "untrained network (floor)",
    },
    metrics={
        "few_shot": "10-shot kNN top-1",
        "knn": "20-NN top-1",
        "knn200": "200-NN top-1 (t = 0.1)",
        "purity": "5-NN purity",
        "linear_last": "linear top-1 (cached features)",
    },
    sets={"cifar10": "CIFAR-10, 4,000 images, 32 px"},
    claim="few_shot",
    baseline="moco",
    # The claim first, at equal epochs; the same at equal compute; what the subspace adds to the mean; the controls.
    pairs=[
        ("k5", "moco"), ("k3", "moco"), ("k5", "moco_eq5"), ("k3", "moco_eq3"), ("k5", "mean"), ("mean", "moco"),
        ("abs", "moco"), ("full", "k5"), ("grad", "k3"), ("moco_eq5", "moco"), ("moco", "untrained"),
    ],
    claims=[("k5", "moco", "few_shot"), ("k5", "moco_eq5", "few_shot")],
    # More epochs are MoCo v2's known improvement: 67.5 after 200, 71.1 after 800 (its README).
    controls={("moco_eq5", "moco"): "above", ("moco", "untrained"): "above"},
    positive=("moco_eq5", "moco"),
    floor="untrained",
    curve=(
        "step", "loss", "acc1", "subspace/rank_mean", "subspace/lambda1_frac", "subspace/pos_sim", "subspace/neg_sim",
        "subspace/pos_cos", "feat/std",
    ),
    command="export DATA_ROOT=/path/to/data SET={set} && ARMS='{arms}' SEEDS='{seeds}' bash kscl/run_arms.sh small",
    read=read,
)  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    return ARMS.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    return ARMS.main(get_parser().parse_args(argv))


if __name__ == "__main__":
    cli(main)
