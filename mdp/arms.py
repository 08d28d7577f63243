"""Table of the arms that `run_arms.sh` trained: python -m mdp.arms runs/mdp/arms/small [--record]

mIoU after a tenth of the fine-tuning schedule and at its end, mean and sample standard deviation over the seeds.
`--record` writes the rows of the small tier into results.csv and compact logs into mdp/logs/.
"""

import json
import statistics
from pathlib import Path

from shared_utils import UserError, checkpoint
from shared_utils.arms import STATUS, cell, replace_rows, thinned, verdict
from shared_utils.flags import Parser
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


def table(found: dict[str, dict[str, dict[int, dict]]]) -> str:
    lines = ["| set | arm | seeds | mIoU at 10% of the schedule | mIoU at the end | against scratch at 10% |"]
    lines += ["|---|---|---|---|---|---|"]
    for config, arms in found.items():
        for arm in sorted(arms, key=list(ARMS).index):
            early, final = values(arms[arm], "early"), values(arms[arm], "final")
            against = verdict(early, values(arms["scratch"], "early")) if "scratch" in arms and arm != "scratch" else ""
            lines.append(f"| {config} | {arm} | {len(early)} | {cell(early)} | {cell(final)} | {against} |")
    return "\n".join(lines)


def compact(runs: dict[int, dict], pretrain: Path) -> dict:
    """What is worth keeping of an arm: both validations of each seed and twenty points of each pretraining curve."""
    out: dict = {"finetune": {}, "pretrain": {}}
    for seed, run in sorted(runs.items()):
        out["finetune"][seed] = {when: run[when] for when in ("early", "final")} | {"seconds": run["seconds"]}
        log = pretrain / f"seed{seed}" / "log.jsonl"
        if log.is_file():
            names = ("step", "loss", "acc/pixel_proto", "proto/mean_offdiag_cos", "data_wait")
            out["pretrain"][seed] = thinned(log, names)
    return out


def record(found: dict[str, dict[str, dict[int, dict]]], root: Path, results: Path) -> int:
    """Replace the small tier's rows in `results` by what was measured; returns how many rows were written."""
    (HERE / "logs").mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
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
                    continue  # one seed claims nothing
                row = {
                    "id": f"small-{config}-{arm}-vs-{against}-{when}",
                    "table": f"Small tier, measured here: {SETS[config]}",
                    "experiment": f"{ARMS[arm]}; baseline: {ARMS[against]}",
                    "dataset": SETS[config],
                    "metric": "mIoU at 10% of the schedule" if when == "early" else "mIoU at the end",
                    "tier": "small",
                    "ours_mean": f"{statistics.mean(ours):.2f}",
                    "ours_std": f"{statistics.stdev(ours):.2f}",
                    "n_seeds": len(ours),
                    "baseline_mean": f"{statistics.mean(base):.2f}",
                    "baseline_std": f"{statistics.stdev(base):.2f}",
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
    return replace_rows(results, "small-", rows)


def get_parser() -> Parser:
    p = Parser(prog="mdp.arms", description=__doc__.splitlines()[0])
    p.add_argument("root", type=Path, help="folder that run_arms.sh wrote")
    p.add_argument("--record", action="store_true", help="write the rows of results.csv and the logs")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
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
