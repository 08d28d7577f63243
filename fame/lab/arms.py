"""Table of the arms that `run_arms.sh` trained: python -m fame.lab.arms runs/fame/arms/small/motion [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into fame/lab/logs/; the json files of the runs are enough for it, checkpoints are not needed.
"""

import argparse
import json
from pathlib import Path

from shared_utils.lab.arms import Arms
from shared_utils.run import cli


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from its evaluations, None while they are not complete.

    The folds leave the names: a seed of the fight clips is a split. How well features tell the background or the
    source is turned round, so that more is better for every metric: the share of videos where they do not.
    """
    probe = folder.with_name(f"{folder.name}-linear") / "result.json"
    if not probe.is_file():
        return None
    found = json.loads(probe.read_text())
    if "inside" in found:  # videos of one's own, in class folders or not
        own = {"inside": found["inside"]}
        classes = "linear/class/1" in found
        return own | ({"linear": found["linear/class/1"], "r1": found["r1/class/1"]} if classes else {})
    if "linear/class/2" in found and "linear/class/1" in found:  # motion: list 1 has tied and swapped backgrounds
        return {
            "linear": found["linear/class/1"], "r1": found["r1/class/1"],
            "linear_free": found["linear/class/2"], "r1_free": found["r1/class/2"],
            "blind": 100 - found["linear/background/2"],
        }  # fmt: skip
    finetune = folder.with_name(f"{folder.name}-finetune") / "result.json"
    if not finetune.is_file():
        return None
    flat = {key.rpartition("/")[0]: value for key, value in found.items() if "/" in key}
    return {
        "linear": flat["linear/class"], "r1": flat["r1/class"], "blind": 100 - flat["linear/source_video"],
        "finetuned": json.loads(finetune.read_text())["acc1"],
    }  # fmt: skip


ARMS = Arms(
    paper="fame",
    home=Path(__file__).resolve().parents[1],
    arms={
        "moco": "MoCo",
        "fame": "MoCo + FAME",
        "beta03": "MoCo + FAME, beta 0.3",
        "beta07": "MoCo + FAME, beta 0.7",
        "seed": "motion mask without the colour step",
        "gauss": "Gaussian mask",
        "grid": "grid mask",
        "random": "background swap with a random mask (control)",
        "erase": "background erasing",
        "both": "FAME on both views",
        "clean": "MoCo + FAME, clean queue",
        "untrained": "untrained network (floor)",
    },
    metrics={
        "linear": "linear probe top-1 of the action",
        "r1": "retrieval R@1 of the action",
        "linear_free": "linear probe top-1 of the action, backgrounds independent of it",
        "r1_free": "retrieval R@1 of the action, backgrounds independent of it",
        "finetuned": "fine-tuned top-1 of the action",
        "blind": "error of a linear probe of the background or source (more: less of it in the features)",
    },
    shown={"inside": "activation inside FAME's mask (needs no classes)"},
    sets={
        "motion": "generated motions, backgrounds tied in training and swapped in test, 300 videos, 48 px",
        "fight": "fight clips, about 180 a split by source, 48 px",
    },
    claim="linear",
    baseline="moco",
    pairs=[
        ("fame", "moco"), ("fame", "random"), ("random", "moco"), ("gauss", "moco"), ("fame", "gauss"),
        ("grid", "moco"), ("fame", "grid"), ("seed", "moco"), ("fame", "seed"), ("beta03", "moco"), ("beta03", "fame"),
        ("beta07", "moco"), ("beta07", "fame"), ("erase", "moco"), ("both", "fame"), ("clean", "fame"),
        ("moco", "untrained"),
    ],
    claims=[("fame", "moco", "linear")],
    controls={("fame", "random"): "above", ("moco", "untrained"): "above", ("erase", "moco"): "above"},
    positive=("erase", "moco"),  # its authors report it as an improvement on MoCo (CVPR 2021)
    floor="untrained",
    curve=("step", "loss", "moco_train/acc1", "sim/positive", "sim/negative", "sim/same_view", "feat/std"),
    command="export DATA_ROOT=/path/to/data SET={set} && ARMS='{arms}' SEEDS='{seeds}' bash fame/run_arms.sh small",
    read=read,
)  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    return ARMS.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    return ARMS.main(get_parser().parse_args(argv))


if __name__ == "__main__":
    cli(main)
