"""Table of the arms that `run_arms.sh` trained: python -m hsa.arms runs/hsa/arms/small/cifar10 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into hsa/logs/. `python -m hsa.arms RUN --bags FILE.npy` writes the neighbours that one run trained with
last, where it had some, for the `--bags` of hsa.main_knn.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from shared_utils import UserError, checkpoint
from shared_utils.run import cli

HERE = Path(__file__).resolve().parent
ARMS = {
    "moco": "MoCo v2, equal epochs",
    "moco_eq": "MoCo v2, equal compute (2.9 x the epochs)",
    "moco_level": "MoCo v2 + level 3",
    "cross": "cross-sample positives, no CutMix",
    "full": "HSA, the release's loss",
    "level": "HSA + level 3 (reconstructed)",
    "random": "HSA with random neighbours (control)",
    "label": "HSA with neighbours by label (upper bound)",
}
METRICS = {
    "few_shot": "10-shot kNN top-1",
    "knn": "20-NN top-1",
    "purity": "5-NN purity",
    "linear_last": "linear top-1 (cached features)",
    "linear3": "linear top-1 of layer3 (cached features)",
}
# Only of arms with neighbours, and of each on its own ones: shown in the table and kept in the logs, but no claim,
# because neighbours that were searched are close by construction and random ones are not.
GAP, GAP_TITLE = "bag_gap", "cosine gap of its own neighbours"
SETS = {"cifar10": "CIFAR-10, 4,000 images, 32 px", "tiny_imagenet50": "Tiny-ImageNet, 50 classes, 4,000 images, 32 px"}
# The claim first, on few_shot; the same at equal compute beside it; then what the ablation asks.
ACCEPTANCE = [("full", "moco"), ("full", "moco_eq")]
CONTRASTS = [
    ("cross", "moco"), ("full", "cross"), ("level", "full"), ("level", "moco_eq"), ("full", "random"),
    ("random", "moco"), ("moco_level", "moco"), ("label", "full"),
]  # fmt: skip
STATUS = {
    "above": "effect shown at small scale",
    "no difference": "no effect at small scale",
    "below": "contradicted",
}

Runs = dict[int, dict[str, Any]]  # seed: metrics, and the folder of the pretraining


def collect(root: Path) -> dict[str, Runs]:
    """{arm: {seed: metrics and folder}} of the finished runs below `root`. UserError when there is none."""
    found: dict[str, Runs] = {}
    for file in sorted(root.glob("*/seed*-knn/result.json")):
        folder = file.parent.with_name(file.parent.name.removesuffix("-knn"))
        linear = folder.with_name(f"{folder.name}-linear") / "result.json"
        if linear.is_file() and folder.parent.name in ARMS:
            result = {**json.loads(file.read_text()), **json.loads(linear.read_text()), "folder": folder}
            result["linear3"] = result["blocks"][min(result["blocks"], key=int)]["last"]
            found.setdefault(folder.parent.name, {})[int(folder.name.removeprefix("seed"))] = result
    if not found:
        raise UserError(f"{root}: no finished arm (ARM/seedN-knn/result.json); run hsa/run_arms.sh first")
    return found


def values(runs: Runs, metric: str) -> list[float]:
    return [runs[seed][metric] for seed in sorted(runs)]


def has_gap(runs: Runs) -> bool:
    """Whether every seed was measured on its own neighbours (MoCo has none; earlier results lack it)."""
    return all(GAP in run for run in runs.values())


def verdict(ours: list[float], baseline: list[float]) -> str:
    """The acceptance rule: do the means differ by more than the pooled standard deviation of the seeds?

    Nothing is said unless both sides have two seeds or more.
    """
    if min(len(ours), len(baseline)) < 2:
        return "one seed, no verdict"
    gap = statistics.mean(ours) - statistics.mean(baseline)
    pooled = math.sqrt((statistics.variance(ours) + statistics.variance(baseline)) / 2)
    return "above" if gap > pooled else "below" if gap < -pooled else "no difference"


def cell(x: list[float]) -> str:
    return f"{statistics.mean(x):.2f}" + (f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else "")


def table(found: dict[str, Runs]) -> str:
    """Markdown: a row an arm, a column a metric, and the claim's verdict against MoCo v2."""
    gaps = any(map(has_gap, found.values()))
    titles = [*METRICS.values(), *[GAP_TITLE] * gaps]
    lines = ["| arm | seeds | " + " | ".join(titles) + " | 10-shot against MoCo v2 |"]
    lines.append("|---" * (len(titles) + 3) + "|")
    for arm in sorted(found, key=list(ARMS).index):
        cells = [cell(values(found[arm], metric)) for metric in METRICS]
        if gaps:
            cells.append(cell(values(found[arm], GAP)) if has_gap(found[arm]) else "")
        against = ""
        if arm != "moco" and "moco" in found:
            against = verdict(values(found[arm], "few_shot"), values(found["moco"], "few_shot"))
        lines.append(f"| {ARMS[arm]} | {len(found[arm])} | " + " | ".join(cells) + f" | {against} |")
    return "\n".join(lines)


def compact(runs: Runs) -> dict[str, Any]:
    """What is worth keeping of an arm: the metrics of each seed and twenty points of each training curve."""
    out: dict[str, Any] = {}
    names = ("step", "loss", "acc/contrast_top1", "sim/positive", "sim/negative", "sim/neighbour", "feat/std")
    for seed, run in sorted(runs.items()):
        rows = [json.loads(line) for line in (run["folder"] / "log.jsonl").read_text().splitlines()]
        keep = rows[:: max(1, len(rows) // 20)] + rows[-1:]
        out[str(seed)] = {
            "metrics": {metric: round(run[metric], 4) for metric in (*METRICS, GAP) if metric in run},
            "curve": [{k: row[k] for k in (*names, "neighbours/purity") if k in row} for row in keep],
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
        seconds = [checkpoint.load(run["folder"] / "checkpoint.pth")["progress"]["seconds"] for run in runs.values()]
        for metric, title in METRICS.items():
            ours, base = values(runs, metric), values(found[against], metric)
            if verdict(ours, base) not in STATUS:
                continue  # one seed claims nothing
            rows.append(
                dict.fromkeys(columns, "")
                | {
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
                    f"ARMS='{against} {arm}' SEEDS='{' '.join(map(str, sorted(runs)))}' "
                    "bash hsa/run_arms.sh small",
                    "commit": facts["git_commit"],
                    "hardware": facts["hardware"],
                    "minutes": f"{statistics.mean(seconds) / 60:.1f}",
                    "date": facts["date"],
                    "log": f"logs/{name}-{arm}.json; logs/{name}-{against}.json",
                }
            )
            written += 1
    with open(results, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return written


def write_bags(folder: Path, file: Path) -> None:
    """The neighbours [N, K] in the checkpoint of the run in `folder`, into the .npy `file`; nothing without them."""
    saved = checkpoint.load(folder / "checkpoint.pth")
    if "neighbours" in saved:
        np.save(file, saved["neighbours"]["index"].numpy())


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="hsa.arms", description=(__doc__ or "").splitlines()[0])
    p.add_argument("root", type=Path, help="folder that run_arms.sh wrote")
    p.add_argument("--record", action="store_true", help="write the rows of results.csv and hsa/logs/")
    p.add_argument("--bags", type=Path, help="write the neighbours of the one run in `root` to this .npy file instead")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.bags:
        write_bags(args.root, args.bags)
        return 0
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
