"""Table of the arms that `run_arms.sh` trained: python -m mdp.arms runs/mdp/arms/small [--record]

mIoU after a tenth of the fine-tuning schedule and at its end, mean and sample standard deviation over the seeds.
`--record` writes the rows of the small tier into results.csv and compact logs into mdp/logs/.
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
    "scratch": "no pretraining",
    "multihead": "multi-head cross entropy, both sets",
    "unionce": "one cross entropy over all classes, both sets",
    "p2p": "pixel-to-pixel, both sets",
    "region": "region bank, both sets",
    "single": "MDP on LabelMeFacade alone",
    "multi": "MDP on both sets",
    "mix": "MDP on both sets + cross-dataset mixing",
    "csc": "MDP on both sets + mixing + sparse coding",
}
SETS = {
    "camvid": "CamVid val (never seen in pretraining)",
    "labelmefacade": "LabelMeFacade, 200 held-out images",
    "mini": "mini data, third taxonomy",
}


# The claim, the first comparisons of the table; then every arm against no pretraining, and arms against each other.
ACCEPTANCE = [("multi", "scratch"), ("multi", "p2p")]
CONTRASTS = [("multi", "single"), ("multi", "multihead"), ("mix", "multi"), ("csc", "mix")]
STATUS = {
    "above": "effect shown at small scale",
    "no difference": "no effect at small scale",
    "below": "contradicted",
}


def collect(root: Path) -> dict[str, dict[str, dict[int, dict]]]:
    """{config: {arm: {seed: result.json}}} of everything below `root`. UserError when there is nothing."""
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for file in sorted(root.glob("*/seed*-*/result.json")):
        seed, config = file.parent.name.removeprefix("seed").split("-", 1)
        result = json.loads(file.read_text())
        if "final" in result:
            found.setdefault(config, {}).setdefault(file.parent.parent.name, {})[int(seed)] = {
                **result,
                "folder": file.parent,
            }
    if not found:
        raise UserError(f"{root}: no finished arm (ARM/seedN-CONFIG/result.json); run mdp/run_arms.sh first")
    return found


def values(runs: dict[int, dict], when: str) -> list[float]:
    return [runs[seed][when]["mIoU"] for seed in sorted(runs)]


def spread(x: list[float]) -> float:
    """Sample standard deviation; nan for fewer than two seeds."""
    return statistics.stdev(x) if len(x) > 1 else math.nan


def verdict(ours: list[float], baseline: list[float]) -> str:
    """The acceptance rule: do the means differ by more than the pooled standard deviation of the seeds?

    An arm of one seed is held against the spread of the other; of two arms of one seed each nothing can be said.
    """
    variances = [statistics.variance(x) for x in (ours, baseline) if len(x) > 1]
    if not variances:
        return "one seed each, no verdict"
    gap, pooled = statistics.mean(ours) - statistics.mean(baseline), math.sqrt(statistics.mean(variances))
    return "above" if gap > pooled else "below" if gap < -pooled else "no difference"


def table(found: dict[str, dict[str, dict[int, dict]]]) -> str:
    lines = ["| set | arm | seeds | mIoU at 10% of the schedule | mIoU at the end | against scratch at 10% |"]
    lines += ["|---|---|---|---|---|---|"]
    for config, arms in found.items():
        for arm in sorted(arms, key=list(ARMS).index):
            early, final = values(arms[arm], "early"), values(arms[arm], "final")
            against = verdict(early, values(arms["scratch"], "early")) if "scratch" in arms and arm != "scratch" else ""
            cells = [
                f"{statistics.mean(x):.2f}" + (f" ± {spread(x):.2f}" if len(x) > 1 else "") for x in (early, final)
            ]
            lines.append(f"| {config} | {arm} | {len(early)} | {cells[0]} | {cells[1]} | {against} |")
    return "\n".join(lines)


def compact(runs: dict[int, dict], pretrain: Path) -> dict:
    """What is worth keeping of an arm: both validations of each seed and twenty points of each pretraining curve."""
    out: dict = {"finetune": {}, "pretrain": {}}
    for seed, run in sorted(runs.items()):
        out["finetune"][seed] = {when: run[when] for when in ("early", "final")} | {"seconds": run["seconds"]}
        log = pretrain / f"seed{seed}" / "log.jsonl"
        if log.is_file():
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            keep = rows[:: max(1, len(rows) // 20)] + rows[-1:]
            names = ("step", "loss", "acc/pixel_proto", "proto/mean_offdiag_cos", "data_wait")
            out["pretrain"][seed] = [{k: row[k] for k in names if k in row} for row in keep]
    return out


def record(found: dict[str, dict[str, dict[int, dict]]], root: Path, results: Path) -> int:
    """Replace the small tier's rows in `results` by what was measured; returns how many rows were written."""
    with open(results, newline="") as handle:
        reader = csv.DictReader(handle)
        columns = list(reader.fieldnames or [])
        rows = [row for row in reader if not row["id"].startswith("small-")]
    (HERE / "logs").mkdir(exist_ok=True)
    written = 0
    for config, arms in found.items():
        for arm, runs in arms.items():
            log = HERE / "logs" / f"{config}-{arm}.json"
            log.write_text(json.dumps(compact(runs, root / arm), separators=(",", ":")) + "\n")
        pairs = [*ACCEPTANCE, *((arm, "scratch") for arm in ARMS if arm not in ("scratch", "multi")), *CONTRASTS]
        for arm, against in ((a, b) for a, b in pairs if a in arms and b in arms):
            runs = arms[arm]
            facts = json.loads((next(iter(runs.values()))["folder"] / "config.json").read_text())
            saved = checkpoint.load(root / arm / f"seed{min(runs)}" / "checkpoint.pth")
            minutes = saved["progress"]["seconds"] / 60 + statistics.mean(run["seconds"] for run in runs.values()) / 60
            for when in ("early", "final"):
                ours, base = values(runs, when), values(arms[against], when)
                if verdict(ours, base) not in STATUS:
                    continue  # one seed each claims nothing
                row = dict.fromkeys(columns, "") | {
                    "id": f"small-{config}-{arm}-vs-{against}-{when}",
                    "table": f"Small tier, measured here: {SETS[config]}",
                    "experiment": f"{ARMS[arm]}; baseline: {ARMS[against]}",
                    "dataset": SETS[config],
                    "metric": "mIoU at 10% of the schedule" if when == "early" else "mIoU at the end",
                    "tier": "small",
                    "ours_mean": f"{statistics.mean(ours):.2f}",
                    "ours_std": "" if len(ours) < 2 else f"{spread(ours):.2f}",
                    "n_seeds": len(ours),
                    "baseline_mean": f"{statistics.mean(base):.2f}",
                    "baseline_std": "" if len(base) < 2 else f"{spread(base):.2f}",
                    "status": STATUS[verdict(ours, base)],
                    "command": f"ARMS='{against} {arm}' SEEDS='{' '.join(map(str, sorted(runs)))}' "
                    "bash mdp/run_arms.sh small",
                    "commit": facts["git_commit"],
                    "hardware": facts["hardware"],
                    "minutes": f"{minutes:.1f}",
                    "date": facts["date"],
                    "log": f"logs/{config}-{arm}.json; logs/{config}-{against}.json",
                }
                rows.append({k: str(v) for k, v in row.items()})
                written += 1
    with open(results, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return written


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="mdp.arms", description=__doc__.splitlines()[0])
    p.add_argument("root", type=Path, help="folder that run_arms.sh wrote")
    p.add_argument("--record", action="store_true", help="write the rows of results.csv and mdp/logs/")
    args = p.parse_args(argv)
    found = collect(args.root)
    print(table(found))
    if args.record:
        if args.root.resolve().name != "small":
            raise UserError(
                f"{args.root}: --record takes the small tier's folder; other tiers are no row of results.csv"
            )
        print(f"{record(found, args.root, HERE / 'results.csv')} rows -> {HERE / 'results.csv'}")
    return 0


if __name__ == "__main__":
    cli(main)
