"""Table of the arms that `run_arms.sh` trained: python -m bingo.arms runs/bingo/arms/small/cifar10 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into bingo/logs/.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

from shared_utils import UserError, checkpoint
from shared_utils.run import cli

HERE = Path(__file__).resolve().parent
ARMS = {
    "alone": "student alone (MoCo v2), equal epochs",
    "alone_eq": "student alone (MoCo v2), equal compute (6.6 x the epochs)",
    "intra": "intra-sample distillation alone",
    "anchors": "two anchors without cross terms or CutMix",
    "bingo": "BINGO, release's loss",
    "paper_loss": "BINGO, L_intra + L_inter as published",
    "random": "BINGO with random bags (control)",
    "label": "BINGO with label bags (upper bound)",
}
METRICS = {
    "few_shot": "10-shot kNN top-1",
    "knn": "20-NN top-1",
    "linear_last": "linear top-1 (cached features)",
    "purity": "5-NN purity",
    "bag_gap": "bag gap",
}
SETS = {"cifar10": "CIFAR-10, 4,000 images, 32 px", "tiny_imagenet50": "Tiny-ImageNet, 50 classes, 4,000 images, 32 px"}
# The claim first; then what the ablation asks.
ACCEPTANCE = [("bingo", "alone"), ("bingo", "alone_eq")]
CONTRASTS = [("bingo", "intra"), ("bingo", "anchors"), ("bingo", "random"), ("label", "bingo"), ("intra", "alone")]
STATUS = {
    "above": "effect shown at small scale",
    "no difference": "no effect at small scale",
    "below": "contradicted",
}

Runs = dict[int, dict]  # seed: metrics


def collect(root: Path) -> dict[str, Runs]:
    """{arm: {seed: metrics and folder}} of the finished runs below `root`. UserError when there is none."""
    found: dict[str, Runs] = {}
    for file in sorted(root.glob("*/seed*-knn/result.json")):
        folder = file.parent.with_name(file.parent.name.removesuffix("-knn"))
        linear = folder.with_name(f"{folder.name}-linear") / "result.json"
        if linear.is_file():
            result = {**json.loads(file.read_text()), **json.loads(linear.read_text()), "folder": folder}
            found.setdefault(folder.parent.name, {})[int(folder.name.removeprefix("seed"))] = result
    if not found:
        raise UserError(f"{root}: no finished arm (ARM/seedN-knn/result.json); run bingo/run_arms.sh first")
    return found


def values(runs: Runs, metric: str) -> list[float]:
    return [runs[seed][metric] for seed in sorted(runs)]


def verdict(ours: list[float], baseline: list[float]) -> str:
    """The acceptance rule: do the means differ by more than the pooled standard deviation of the seeds?"""
    if min(len(ours), len(baseline)) < 2:
        return "one seed, no verdict"
    gap = statistics.mean(ours) - statistics.mean(baseline)
    pooled = math.sqrt((statistics.variance(ours) + statistics.variance(baseline)) / 2)
    return "above" if gap > pooled else "below" if gap < -pooled else "no difference"


def cell(x: list[float]) -> str:
    return f"{statistics.mean(x):.2f}" + (f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else "")


def table(found: dict[str, Runs]) -> str:
    lines = ["| arm | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for arm in sorted(found, key=list(ARMS).index):
        cells = [cell(values(found[arm], metric)) for metric in METRICS]
        lines.append(f"| {ARMS[arm]} | {len(found[arm])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compact(runs: Runs) -> dict:
    """What is worth keeping of an arm: the metrics of each seed and twenty points of each training curve."""
    out: dict = {}
    for seed, run in sorted(runs.items()):
        rows = [json.loads(line) for line in (run["folder"] / "log.jsonl").read_text().splitlines()]
        keep = rows[:: max(1, len(rows) // 20)] + rows[-1:]
        names = ("step", "loss", "acc1", "sim/positive", "sim/bag", "feat/std")
        out[str(seed)] = {
            "metrics": {metric: round(run[metric], 4) for metric in METRICS},
            "curve": [{k: row[k] for k in names if k in row} for row in keep],
        }
    return out


def record(found: dict[str, Runs], name: str, results: Path) -> int:
    """Replace the small tier's rows of this data set in `results` by what was measured; returns their number."""
    with open(results, newline="") as handle:
        reader = csv.DictReader(handle)
        columns = list(reader.fieldnames or [])
        rows = [row for row in reader if not row["id"].startswith(f"small-{name}-")]
    (HERE / "logs").mkdir(exist_ok=True)
    for arm, runs in found.items():
        log = HERE / "logs" / f"{name}-{arm}.json"
        log.write_text(json.dumps(compact(runs), separators=(",", ":")) + "\n")
    written = 0
    for arm, against in ((a, b) for a, b in [*ACCEPTANCE, *CONTRASTS] if a in found and b in found):
        runs = found[arm]
        facts = json.loads((runs[min(runs)]["folder"] / "config.json").read_text())
        if facts.get("git_dirty"):
            raise UserError(f"{runs[min(runs)]['folder']}: made with uncommitted changes, so no commit names its code")
        saved = [checkpoint.load(run["folder"] / "checkpoint.pth")["progress"]["seconds"] for run in runs.values()]
        for metric, title in METRICS.items():
            ours, base = values(runs, metric), values(found[against], metric)
            if verdict(ours, base) not in STATUS:
                continue
            row = dict.fromkeys(columns, "") | {
                "id": f"small-{name}-{arm}-vs-{against}-{metric}",
                "table": f"Small tier, measured here: {SETS[name]}",
                "experiment": f"{ARMS[arm]}; baseline: {ARMS[against]}",
                "dataset": name,
                "metric": title,
                "tier": "small",
                "ours_mean": f"{statistics.mean(ours):.2f}",
                "ours_std": f"{statistics.stdev(ours):.2f}",
                "n_seeds": str(len(ours)),
                "baseline_mean": f"{statistics.mean(base):.2f}",
                "baseline_std": f"{statistics.stdev(base):.2f}",
                "status": STATUS[verdict(ours, base)],
                "command": f"export DATA_ROOT=/path/to/data SET={name} && "
                "bash bingo/run_teacher.sh small && bash bingo/run_knn.sh small && "
                f"ARMS='{against} {arm}' SEEDS='{' '.join(map(str, sorted(runs)))}' "
                "bash bingo/run_arms.sh small",
                "commit": facts["git_commit"],
                "hardware": facts["hardware"],
                "minutes": f"{statistics.mean(saved) / 60:.1f}",
                "date": facts["date"],
                "log": f"logs/{name}-{arm}.json; logs/{name}-{against}.json",
            }
            rows.append(row)
            written += 1
    with open(results, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return written


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bingo.arms", description=(__doc__ or "").splitlines()[0])
    p.add_argument("root", type=Path, help="folder that run_arms.sh wrote")
    p.add_argument("--record", action="store_true", help="write the rows of results.csv and bingo/logs/")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    found = collect(args.root)
    print(table(found))
    if args.record:
        name = args.root.resolve().name
        if args.root.resolve().parent.name != "small" or name not in SETS:
            raise UserError(f"{args.root}: --record takes a data set's folder of the small tier; others are no rows")
        print(f"{record(found, name, HERE / 'results.csv')} rows -> {HERE / 'results.csv'}")
    return 0


if __name__ == "__main__":
    cli(main)
