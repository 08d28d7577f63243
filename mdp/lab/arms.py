"""Table of the arms that `run_arms.sh` trained: python -m mdp.lab.arms runs/mdp/arms/small [--record]

mIoU after a tenth of the fine-tuning schedule and at its end. The arms of a seed share the order of both data sets and
the fine-tuning, so they are compared seed by seed. `--record` writes the rows of the small tier into results.csv and
compact logs into mdp/lab/logs/.
"""

import argparse
import json
from pathlib import Path

from shared_utils import UserError, checkpoint
from shared_utils.lab import arms
from shared_utils.run import cli

WHEN = {"early": "mIoU at 10% of the schedule", "final": "mIoU at the end"}
CURVE = ("step", "loss", "acc/pixel_proto", "proto/mean_offdiag_cos", "data_wait")


def read(folder: Path) -> dict[str, float] | None:
    """Both validations of the fine-tuning in `folder`; None while it is not complete."""
    file = folder / "result.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    return {when: result[when]["mIoU"] for when in WHEN} if "final" in result else None


ARMS = arms.Arms(
    paper="mdp",
    home=Path(__file__).resolve().parents[1],
    arms={
        "scratch": "no pretraining",
        "multihead": "multi-head cross entropy, both sets",
        "unionce": "one cross entropy over all classes, both sets",
        "p2p": "pixel-to-pixel, both sets",
        "region": "region bank, both sets",
        "single": "MDP on LabelMeFacade alone",
        "multi": "MDP on both sets",
        "mix": "MDP on both sets + cross-dataset mixing",
        "csc": "MDP on both sets + mixing + sparse coding",
    },
    metrics=WHEN,
    sets={
        "camvid": "CamVid val (never seen in pretraining)",
        "labelmefacade": "LabelMeFacade, 200 held-out images",
    },
    claim="early",
    baseline="scratch",
    pairs=[
        ("multi", "scratch"), ("multi", "p2p"), ("multihead", "scratch"), ("unionce", "scratch"), ("p2p", "scratch"),
        ("region", "scratch"), ("single", "scratch"), ("mix", "scratch"), ("csc", "scratch"), ("multi", "single"),
        ("multi", "multihead"), ("mix", "multi"), ("csc", "mix"),
    ],
    claims=[("multi", "scratch", "early"), ("multi", "p2p", "early")],
    # Supervised pretraining on other labelled sets is a known improvement over none.
    controls={("multihead", "scratch"): "above"},
    positive=("multihead", "scratch"),
    curve=CURVE,
    command="export DATA_ROOT=/path/to/data && ARMS='{arms}' SEEDS='{seeds}' CONFIGS='{set}' "
    "bash mdp/run_arms.sh small",
    read=read,
)  # fmt: skip


def collect(root: Path) -> dict[str, dict[str, dict[int, Path]]]:
    """{set: {arm: {seed: folder of the fine-tuning}}} of the finished runs below `root`. UserError: there are none."""
    found: dict[str, dict[str, dict[int, Path]]] = {}
    for folder in sorted(root.glob("*/seed*-*/")):
        seed, name = folder.name.removeprefix("seed").split("-", 1)
        if folder.parent.name in ARMS.arms and read(folder) is not None:
            found.setdefault(name, {}).setdefault(folder.parent.name, {})[int(seed)] = folder
    if not found:
        raise UserError(f"{root}: no finished arm (ARM/seedN-CONFIG/result.json); run mdp/run_arms.sh first")
    return found


def compact(folder: Path) -> dict:
    """Of a fine-tuning and the pretraining before it: metrics, what made them, curve, IoU of each class."""
    result = json.loads((folder / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    if config.get("git_dirty"):
        raise UserError(f"{folder}: made with uncommitted changes, so no commit names its code")
    pretrained, minutes, curve = folder.with_name(folder.name.split("-")[0]), result["seconds"] / 60, []
    if (pretrained / "checkpoint.pth").is_file():
        minutes += checkpoint.load(pretrained / "checkpoint.pth")["progress"]["seconds"] / 60
        curve = arms.thinned(pretrained / "log.jsonl", CURVE)
    facts = {"commit": config["git_commit"], "hardware": config["hardware"], "date": config["date"]}
    return {
        "metrics": {when: round(result[when]["mIoU"], 4) for when in WHEN},
        "facts": facts | {"minutes": round(minutes, 2)},
        "curve": curve,
        "classes": {when: result[when]["per_class"] for when in WHEN},
        "seconds": result["seconds"],
    }


def record(found: dict[str, dict[str, dict[int, Path]]]) -> int:
    """Keep what was found in logs/, beside seeds that were kept before, and write the rows anew; how many there are."""
    (ARMS.home / "lab" / "logs").mkdir(parents=True, exist_ok=True)
    for name, by_arm in ((name, by_arm) for name, by_arm in found.items() if name in ARMS.sets):
        old = ARMS.logs(name)
        for arm, runs in by_arm.items():
            seeds = {**old.get(arm, {}), **{seed: compact(folder) for seed, folder in runs.items()}}
            text = json.dumps({str(seed): run for seed, run in sorted(seeds.items())}, separators=(",", ":"))
            (ARMS.home / "lab" / "logs" / f"{name}-{arm}.json").write_text(text + "\n")
    return ARMS.write()


def get_parser() -> argparse.ArgumentParser:
    return ARMS.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.root is None:
        return ARMS.main(args)
    found = collect(args.root)
    for name, by_arm in found.items():
        measured = {
            arm: {seed: {"metrics": read(folder)} for seed, folder in sorted(runs.items())}
            for arm, runs in sorted(by_arm.items(), key=lambda item: list(ARMS.arms).index(item[0]))
        }
        print(f"{ARMS.sets.get(name, name)}\n\n{ARMS.table(measured)}\n")
    if args.record:
        if args.root.resolve().name != "small":
            raise UserError(f"{args.root}: --record takes the small tier's folder; other tiers are no row")
        print(f"{record(found)} rows -> {ARMS.home / 'results.csv'}")
    return 0


if __name__ == "__main__":
    cli(main)
