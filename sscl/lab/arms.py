"""Table of the arms that `run_arms.sh` trained: python -m sscl.lab.arms runs/sscl/arms/small/cifar10-4 [--record]

Mean and sample standard deviation over the seeds; the arms of a seed have the same label split, start and batches, so
they are compared seed by seed. A second table holds the pseudo-labels of a run after its calibration against those
before it. `--record` writes the rows of both into results.csv and compact logs into sscl/lab/logs/.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from shared_utils.lab import rule
from shared_utils.lab.arms import Arms, Seeds, cell, numbers, replace_rows
from shared_utils.run import cli

# Pseudo-labels: (name, title) of each accuracy, stored as NAME_raw, NAME_aligned, NAME_calib.
PSEUDO = {
    "early_half": "accuracy of pseudo-labels, half coverage, first third of training",
    "early_all": "accuracy of pseudo-labels, full coverage, first third of training",
    "end20": "accuracy of pseudo-labels, a fifth covered, finished network",
    "end50": "accuracy of pseudo-labels, half coverage, finished network",
    "end100": "accuracy of pseudo-labels, full coverage, finished network",
}
COLUMNS = ("raw", "aligned", "calib")


def course(log: Path) -> dict[str, float]:
    """Per cent, from log.jsonl: pseudo-labels over the first third of the steps that had some, neighbour purity and
    coverage over the last third."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = rows[-1]["step"]
    early = [row for row in rows if row["step"] <= last / 3]
    late = [row for row in rows if row["step"] > 2 * last / 3]
    out = {}
    for name in COLUMNS:
        for key, suffix in (("early_half", "_half"), ("early_all", "")):
            values = [row[f"pl/acc_{name}{suffix}"] for row in early if f"pl/acc_{name}{suffix}" in row]
            if values:
                out[f"{key}_{name}"] = 100 * mean(values)
    for key, column in (("coverage", "pl/coverage"), ("neighbours", "neighbours/purity")):
        values = [row[column] for row in late if column in row]
        if values:
            out[key] = 100 * mean(values)
    return out


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder`, from its two evaluations and its log; None while they are not complete."""
    files = [folder.with_name(f"{folder.name}-{job}") / "result.json" for job in ("cls", "linear")]
    if not all(file.is_file() for file in [*files, folder / "log.jsonl"]):
        return None
    heads, feats = (json.loads(file.read_text()) for file in files)
    out = {name: heads[name] for name in ("top1", "ema_top1")}
    out |= {name: feats[name] for name in ("knn", "linear")}
    out |= {"few_shot": feats["5shot_lr"]} if "5shot_lr" in feats else {}  # own folders may have fewer
    out |= course(folder / "log.jsonl")
    if "early_all_calib" in out:  # the arm has an embedding to calibrate with
        out |= {f"end{share}_{name}": heads[f"{name}@{share}"] for share in (20, 50, 100) for name in COLUMNS}
    return out


ARMS = Arms(
    paper="sscl",
    home=Path(__file__).resolve().parents[1],
    arms={
        "supervised": "supervised",
        "fixmatch": "FixMatch",
        "pseudo": "pseudo-labels on MoCo's views",
        "pseudo_da": "pseudo-labels on MoCo's views, with distribution alignment",
        "joint": "joint, without exchange",
        "neighbours": "joint + neighbours from the class branch",
        "calibration": "joint + calibration by the embedding",
        "full": "SsCL, both exchanges",
        "labelled": "SsCL, prototypes of labelled images alone",
        "positive": "SsCL, loss 8b (per positive)",
    },
    metrics={
        "top1": "top-1, class head",
        "ema_top1": "top-1, class head of the momentum copy",
        "few_shot": "5-shot logistic regression on frozen features",
        "knn": "20-NN top-1",
        "linear": "linear top-1 (cached features)",
        "neighbours": "purity of the neighbours, last third of training",
    },
    shown={"coverage": "coverage, last third of training"},
    sets={f"cifar10-{n}": f"CIFAR-10, 8,000 images, {n} labels a class, 32 px" for n in (4, 25, 400)},
    claim="top1",
    baseline="joint",
    # The claim first; what each direction does alone; the other baselines; the controls.
    pairs=[
        ("full", "joint"), ("neighbours", "joint"), ("calibration", "joint"), ("full", "neighbours"),
        ("full", "calibration"), ("full", "fixmatch"), ("joint", "fixmatch"), ("full", "pseudo"), ("joint", "pseudo"),
        ("joint", "pseudo_da"), ("pseudo_da", "pseudo"), ("fixmatch", "supervised"), ("pseudo", "supervised"),
        ("full", "supervised"), ("full", "labelled"), ("full", "positive"),
        ("joint", "supervised"),
    ],
    claims=[("full", "joint", "top1")],
    # FixMatch above supervised training is known: CIFAR-10, 40 labels, error 8.33 against 77.58 (USB, classic_cv).
    controls={("fixmatch", "supervised"): "above", ("joint", "supervised"): "above"},
    positive=("fixmatch", "supervised"),
    floor="supervised",
    curve=(
        "step", "loss", "loss/x", "loss/u", "loss/c", "pl/coverage", "pl/acc_raw", "pl/acc_aligned", "pl/acc_calib",
        "neighbours/num_pos", "neighbours/purity", "proto/mean_offdiag_cos", "da/entropy",
    ),
    command="export DATA_ROOT=/path/to/data SET={set} && ARMS='{arms}' SEEDS='{seeds}' bash sscl/run_arms.sh small",
    read=read,
)  # fmt: skip


def below_floor(found: Mapping[str, Seeds]) -> list[str]:
    """A line for each arm that has the same labels as `supervised` and is below it in the claim's metric: it is no
    baseline, since what stands above it may only have done less harm."""
    if "supervised" not in found:
        return []
    lines = []
    for arm, seeds in found.items():
        ours, floor = ARMS.compared(seeds, found["supervised"], ARMS.claim)
        one = ARMS.compare(found, arm, "supervised", ARMS.claim)
        if arm != "supervised" and one is not None and one.below:
            lines.append(
                f"{ARMS.arms[arm]}: {cell(ours)}, below training on the labels alone ({cell(floor)}): no baseline here"
            )
    return lines


def before_and_after(found: Mapping[str, Seeds]) -> dict[tuple[str, str], tuple[list[float], list[float], list[float]]]:
    """{(arm, name of PSEUDO): raw, aligned and calibrated accuracies, a number a seed} of arms that have them."""
    out = {}
    for arm, seeds in found.items():
        for name in PSEUDO:
            raw, aligned, calib = (ARMS.values(seeds, f"{name}_{column}") for column in COLUMNS)
            if calib:
                out[arm, name] = raw, aligned, calib
    return out


def calibration_table(found: Mapping[str, Seeds]) -> str:
    """Markdown: argmax p, of the aligned p, and of the calibrated one; difference and p of the last two, by seed.

    Arms with --calib none calibrate for this number alone.
    """
    lines = [
        "| arm | pseudo-labels | seeds | p | aligned | calibrated | calibrated - aligned |",
        "|---" * 7 + "|",
    ]
    for (arm, name), (raw, aligned, calib) in before_and_after(found).items():
        one = rule.paired(dict(enumerate(calib)), dict(enumerate(aligned)))
        cells = [cell(raw), cell(aligned), cell(calib), f"{one.difference:+.2f}, p = {one.p:.2g}" if one else ""]
        lines.append(f"| {ARMS.arms[arm]} | {PSEUDO[name]} | {len(calib)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibration_rows(name: str) -> list[dict[str, str]]:
    """Rows of results.csv from the logs of the set `name`: calibrated pseudo-labels; the baseline is the same run's
    before the calibration."""
    found, rows = ARMS.logs(name), []
    for (arm, kind), (_, aligned, calib) in before_and_after(found).items():
        one = rule.paired(dict(enumerate(calib)), dict(enumerate(aligned)))
        if one is None:
            continue  # one seed says nothing
        made = [found[arm][seed]["facts"] for seed in sorted(found[arm])]
        rows.append(
            {
                "id": f"pseudo-{name}-{arm}-{kind}",
                "table": f"Pseudo-labels after the calibration, measured here: {ARMS.sets[name]}",
                "experiment": f"{ARMS.arms[arm]}; baseline: before the calibration, same run",
                "dataset": name,
                "metric": PSEUDO[kind],
                "tier": "small",
                **numbers(calib, aligned, one),
                "status": rule.DESCRIPTIVE,
                "command": ARMS.command.format(set=name, arms=arm, seeds=" ".join(map(str, sorted(found[arm])))),
                "commit": made[0]["commit"],
                "hardware": made[0]["hardware"],
                "minutes": f"{mean(fact['minutes'] for fact in made):.1f}",
                "date": made[0]["date"],
                "log": f"lab/logs/{name}-{arm}.json",
            }
        )
    return rows


def get_parser() -> argparse.ArgumentParser:
    return ARMS.parser(__doc__ or "")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    ARMS.main(args)
    if args.root is not None:
        found = ARMS.measured(args.root)
        print(*below_floor(found), calibration_table(found), sep="\n")
    if args.record:
        file = ARMS.home / "results.csv"
        rows = sum(replace_rows(file, f"pseudo-{name}-", calibration_rows(name)) for name in ARMS.sets)
        print(f"{rows} rows of pseudo-labels -> {file}")
    return 0


if __name__ == "__main__":
    cli(main)
