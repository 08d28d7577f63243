"""The arms of a folder's small tier: their table, the acceptance rule, and the rows and logs that they leave.

`run_arms.sh` trains ARM/seedN below one folder and writes evaluations beside it (seedN-knn, seedN-linear). A folder
describes its arms once, in its arms.py:

    ARMS = Arms("hsa", arms={...}, metrics={...}, ...)

and `python -m hsa.lab.arms ROOT` prints the table, with --record writes `lab/logs/SET-ARM.json` (metrics of each
seed, what made them, twenty points of each training curve) and the rows of results.csv. The rows come from those logs
alone, so arms and seeds that were recorded before stay beside new ones.
"""

import argparse
import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser
from shared_utils.lab import plots, rule

Seeds = dict[int, dict[str, Any]]  # seed: what its log holds, {"metrics", "facts", "curve"}


def cell(x: Sequence[float]) -> str:
    """Mean ± sample standard deviation of the seeds; one seed has none."""
    return f"{statistics.mean(x):.2f}" + (f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else "")


def numbers(ours: Sequence[float], base: Sequence[float], one: rule.Comparison) -> dict[str, str]:
    """The numbers of a row of results.csv: both sides, the seeds that each has at least, p and the 95 % interval."""
    return {
        "ours_mean": f"{statistics.mean(ours):.2f}", "ours_std": f"{statistics.stdev(ours):.2f}",
        "n_seeds": str(one.n),
        "baseline_mean": f"{statistics.mean(base):.2f}", "baseline_std": f"{statistics.stdev(base):.2f}",
        "p": f"{one.p:.2g}", "ci_low": f"{one.low:.2f}", "ci_high": f"{one.high:.2f}",
    }  # fmt: skip


def thinned(log: Path, names: Sequence[str], points: int = 20) -> list[dict[str, float]]:
    """About `points` lines of a log.jsonl, the last one among them, with the columns `names` that they have."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    keep = rows[:: max(1, len(rows) // points)] + rows[-1:]
    return [{k: row[k] for k in names if k in row} for row in keep]


def replace_rows(results: Path, prefix: str, rows: Sequence[Mapping[str, str]]) -> int:
    """Write `rows` in the place of those of `results` whose id starts with `prefix`, at the end where there are none;
    returns how many were written."""
    with open(results, newline="") as handle:
        reader = csv.DictReader(handle)
        columns = list(reader.fieldnames or [])
        table = list(reader)
    old = [i for i, row in enumerate(table) if row["id"].startswith(prefix)]
    place = old[0] if old else len(table)
    before, after = table[:place], [row for row in table[place:] if not row["id"].startswith(prefix)]
    with open(results, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*before, *(dict.fromkeys(columns, "") | dict(row) for row in rows), *after])
    return len(rows)


def facts(folder: Path) -> dict[str, Any]:
    """What made the run in `folder`: commit, hardware, date, minutes. UserError where no commit names its code.

    The minutes are the checkpoint's, or where that was not kept those that an evaluation beside the run has noted, or
    those of the line that the run ended with in its log (ARM-seedN.log).
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("git_dirty"):
        raise UserError(f"{folder}: made with uncommitted changes, so no commit names its code")
    if (folder / "checkpoint.pth").is_file():
        minutes = round(checkpoint.load(folder / "checkpoint.pth")["progress"]["seconds"] / 60, 2)
    else:
        results = [json.loads(file.read_text()) for file in folder.parent.glob(f"{folder.name}-*/result.json")]
        noted = [result["minutes"] for result in results if "minutes" in result]
        log = folder.parent.with_name(f"{folder.parent.name}-{folder.name}.log")
        end = rf"done: \d+ steps in ([\d.]+) min; \S*/{folder.parent.name}/{folder.name}/checkpoint.pth"
        noted += map(float, re.findall(end, log.read_text()) if log.is_file() else ())
        if not noted:
            raise UserError(
                f"{folder}: no checkpoint.pth, and neither a result beside it nor {log.name} tells its minutes"
            )
        minutes = noted[0]
    return {
        "commit": config["git_commit"], "hardware": config["hardware"], "date": config["date"],
        "minutes": minutes,
    }  # fmt: skip


def evaluations(folder: Path, *jobs: str) -> list[dict[str, Any] | None]:
    """What the evaluations beside the run in `folder` found, in the order of `jobs`; None: not finished.

    Where the set has no validation images, `knn` left one image out at a time and no other job has run: {}.
    """
    files = [folder.with_name(f"{folder.name}-{job}") / "result.json" for job in jobs]
    found = [json.loads(file.read_text()) if file.is_file() else None for file in files]
    alone = any(str((result or {}).get("protocol", "")).startswith("leave-one-out") for result in found)
    return [{} if alone and result is None else result for result in found]


class Anchor(NamedTuple):
    """A published number of a baseline that an arm at the published setting has to reach within `margin`."""

    set: str
    arm: str
    metric: str
    value: float
    source: str
    margin: float


@dataclass
class Arms:
    """What a folder says of its arms.

    Attributes:
        paper: name of the folder.
        home: the folder itself, where results.csv and lab/logs/ lie.
        arms: {arm: title}, in the order of the table.
        metrics: {name: title} of the numbers that rows are made of, in the order of the table.
        shown: {name: title} of numbers that the table and the logs hold where an arm has them, but no row claims.
        sets: {data set: what was used of it}; a set is the name of the folder that run_arms.sh wrote.
        only: {data set: its arms}, where a set has not all of them.
        claim: the metric of the table's last column, held against the arm `baseline`.
        pairs: (arm, arm that it is held against): those of the claims first, then what the ablation asks.
        claims: (arm, arm that it is held against, metric) of the rows that are claims, on every set; Holm's family.
        controls: {(arm, against): "above" or "below"}, where that arm is expected by the metric `claim`.
        positive: the pair of `controls` that has to come out before a claim says anything: a known improvement.
        anchors: published numbers of baselines, a row each.
        floor: what the baseline has to clear: an arm (an untrained network, a blind guess), or a number (chance).
        curve: columns of log.jsonl that are kept.
        command: how a row is made again; {set}, {arms} and {seeds} are filled in.
        read: metrics of the run in a folder, from the results beside it; None while they are not complete.
        against: {arm: the arm that its last column compares it with}, where that is not `baseline`.
        paired: the arms of a seed share start and order, so they are compared seed by seed, over the seeds that both
            have; else the variance is pooled over the arms of a set.
    """

    paper: str
    home: Path
    arms: Mapping[str, str]
    metrics: Mapping[str, str]
    sets: Mapping[str, str]
    claim: str
    baseline: str
    pairs: Sequence[tuple[str, str]]
    curve: Sequence[str]
    command: str
    read: Callable[[Path], dict[str, float] | None]
    shown: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    against: Mapping[str, str] = field(default_factory=dict)
    claims: Sequence[tuple[str, str, str]] = ()
    controls: Mapping[tuple[str, str], str] = field(default_factory=dict)
    positive: tuple[str, str] | None = None
    floor: str | float | None = None
    anchors: Sequence[Anchor] = ()
    paired: bool = True
    family: "Sequence[Arms]" = ()  # where a folder's sets are described apart: all of them, for Holm's correction

    def collect(self, root: Path) -> dict[str, dict[int, Path]]:
        """{arm: {seed: folder}} of the finished runs below `root`. UserError when there is none."""
        found: dict[str, dict[int, Path]] = {}
        for folder in sorted(root.glob("*/seed*/")):
            seed = folder.name.removeprefix("seed")
            if seed.isdecimal() and folder.parent.name in self.arms and self.read(folder) is not None:
                found.setdefault(folder.parent.name, {})[int(seed)] = folder
        if not found:
            raise UserError(f"{root}: no finished arm (ARM/seedN and its results); run {self.paper}/run_arms.sh first")
        return found

    def measured(self, root: Path) -> dict[str, Seeds]:
        """{arm: {seed: {"metrics": ...}}} of the finished runs below `root`."""
        return {
            arm: {seed: {"metrics": self.read(folder)} for seed, folder in sorted(runs.items())}
            for arm, runs in self.collect(root).items()
        }

    def values(self, seeds: Seeds, metric: str) -> list[float]:
        """One number a seed, by seed; empty where a seed lacks it."""
        numbers = [seeds[seed]["metrics"].get(metric) for seed in sorted(seeds)]
        return [] if None in numbers else numbers

    def compared(self, one: Seeds, other: Seeds, metric: str) -> tuple[list[float], list[float]]:
        """The numbers of two arms that are held against each other; of their common seeds where they are paired."""
        common = set(one) & set(other) if self.paired else set(one) | set(other)
        one, other = ({seed: run for seed, run in seeds.items() if seed in common} for seeds in (one, other))
        return self.values(one, metric), self.values(other, metric)

    def compare(self, found: Mapping[str, Seeds], arm: str, against: str, metric: str) -> rule.Comparison | None:
        """Two arms of a set by one metric; None unless both have two seeds (common ones, where they are paired)."""
        if arm not in found or against not in found:
            return None
        ours, other = self.compared(found[arm], found[against], metric)
        if not self.paired:
            return rule.pooled(ours, other, [self.values(seeds, metric) for seeds in found.values()])
        return rule.paired(dict(enumerate(ours)), dict(enumerate(other))) if len(ours) == len(other) else None

    def doubts(self, found: Mapping[str, Seeds], against: str, metric: str) -> list[str]:
        """What keeps a claim against the arm `against` from being tested on a set, beside its number of seeds."""
        out = []
        if isinstance(self.floor, float):
            one, what = rule.over(dict(enumerate(self.values(found[against], metric))), self.floor), f"{self.floor:g}"
        else:
            one = self.compare(found, against, self.floor, metric) if self.floor else None
            what = self.arms[self.floor] if self.floor else ""
        if one is None:
            out.append("no floor measured")
        elif not one.above:
            out.append(f"{self.arms[against]} does not clear the floor, {what}")
        if self.positive is None or (one := self.compare(found, *self.positive, metric)) is None:
            out.append("no positive control measured")
        elif rule.control(one, self.controls[self.positive]) == rule.UNEXPECTED:
            out.append(f"the positive control fails, {self.arms[self.positive[0]]}")
        return out

    def claimed(self) -> dict[tuple[str, str, str, str], str]:
        """{(set, arm, against, metric): status} of every claim that was measured, from the logs; Holm's correction is
        over those that can be tested."""
        one, doubt = {}, {}
        for part in self.family or [self]:
            for found, name in ((part.logs(name), name) for name in part.sets):
                for arm, against, metric in part.claims:
                    if compared := part.compare(found, arm, against, metric):
                        one[name, arm, against, metric] = compared
                        doubt[name, arm, against, metric] = part.doubts(found, against, metric)
        ready = [key for key in one if one[key].n >= rule.SEEDS and not doubt[key]]
        adjusted = rule.holm({"\n".join(key): one[key].p for key in ready})
        return {key: rule.claim(one[key], adjusted.get("\n".join(key), 1.0), doubt[key]) for key in one}

    def status(
        self, claimed: Mapping[tuple[str, str, str, str], str], key: tuple[str, str, str, str], one: rule.Comparison
    ) -> str:
        """Of the row `key` (set, arm, against, metric): a claim's, a control's, or that it is descriptive."""
        _, arm, against, metric = key
        if key in claimed:
            return claimed[key]
        if metric == self.claim and (arm, against) in self.controls:
            return rule.control(one, self.controls[arm, against])
        return rule.DESCRIPTIVE

    def table(self, found: Mapping[str, Seeds]) -> str:
        """Markdown: a row an arm, a column a metric, and the claim's metric against the baseline: difference, its 95 %
        interval and p."""
        titles = {**self.metrics}
        titles |= {k: v for k, v in self.shown.items() if any(self.values(seeds, k) for seeds in found.values())}
        last = f"{self.metrics[self.claim]} against {self.arms[self.baseline]}"
        lines = ["| arm | seeds | " + " | ".join([*titles.values(), last]) + " |", "|---" * (len(titles) + 3) + "|"]
        for arm in (arm for arm in self.arms if arm in found):
            numbers = [self.values(found[arm], metric) for metric in titles]
            other, against = self.against.get(arm, self.baseline), ""
            if arm != other and (one := self.compare(found, arm, other, self.claim)):
                against = f"{one.difference:+.2f} ({one.low:.2f} to {one.high:.2f}), p = {one.p:.2g}"
                against += f" (against {self.arms[other]})" if other != self.baseline else ""
            cells = [*(cell(x) if x else "" for x in numbers), against]
            lines.append(f"| {self.arms[arm]} | {len(found[arm])} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    # -- what stays in the tree --------------------------------------------------------------------------------------
    def logs(self, name: str) -> dict[str, Seeds]:
        """{arm: {seed: metrics, facts, curve}} of all that was recorded for the set `name`."""
        files = {arm: self.home / "lab" / "logs" / f"{name}-{arm}.json" for arm in self.arms}
        return {
            arm: {int(seed): run for seed, run in json.loads(file.read_text()).items()}
            for arm, file in files.items()
            if file.is_file()
        }

    def keep(self, root: Path, name: str) -> None:
        """The finished runs below `root` into logs/; seeds that were kept before and are not among them stay."""
        found, old = self.collect(root), self.logs(name)
        new = {
            arm: {
                seed: {
                    "metrics": {k: round(v, 4) for k, v in (self.read(folder) or {}).items()},
                    "facts": facts(folder),
                    "curve": thinned(folder / "log.jsonl", self.curve),
                }
                for seed, folder in runs.items()
            }
            for arm, runs in found.items()
        }
        (self.home / "lab" / "logs").mkdir(parents=True, exist_ok=True)
        for arm, runs in new.items():
            seeds = {str(seed): run for seed, run in sorted({**old.get(arm, {}), **runs}.items())}
            (self.home / "lab" / "logs" / f"{name}-{arm}.json").write_text(
                json.dumps(seeds, separators=(",", ":")) + "\n"
            )

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of results.csv for the set `name`: each pair of arms that both have two seeds, by each metric.

        An arm of which no row tells is one row that says so.
        """
        found, claimed, rows = self.logs(name), self.claimed(), []
        for arm, against in ((a, b) for a, b in self.pairs if a in found and b in found):
            made, base_made = ([run["facts"] for _, run in sorted(found[name].items())] for name in (arm, against))
            machines = dict.fromkeys(fact["hardware"] for fact in made + base_made)
            minutes = [fact["minutes"] for fact in made]
            for metric, title in self.metrics.items():
                one = self.compare(found, arm, against, metric)
                if one is None:
                    continue  # one seed says nothing
                ours, base = self.compared(found[arm], found[against], metric)
                seeds = sorted(set(found[arm]) | set(found[against]))
                rows.append(
                    {
                        "id": f"small-{name}-{arm}-vs-{against}-{metric}",
                        "table": f"Small tier, measured here: {self.sets[name]}",
                        "experiment": f"{self.arms[arm]}; baseline: {self.arms[against]}",
                        "dataset": name,
                        "metric": title,
                        "tier": "small",
                        **numbers(ours, base, one),
                        "status": self.status(claimed, (name, arm, against, metric), one),
                        "command": self.command.format(
                            set=name, arms=f"{against} {arm}", seeds=" ".join(map(str, seeds))
                        ),
                        "commit": made[0]["commit"],
                        "hardware": "; ".join(machines),
                        "minutes": "" if None in minutes else f"{statistics.mean(minutes):.1f}",
                        "date": made[0]["date"],
                        "log": f"lab/logs/{name}-{arm}.json; lab/logs/{name}-{against}.json",
                    }
                )
        rows += [self.anchored(anchor, found[anchor.arm]) for anchor in self.anchors
                 if anchor.set == name and anchor.arm in found]  # fmt: skip
        begin: dict[str, tuple[str, ...]] = {
            f"small-{name}-{one}-vs-{other}-": (one, other) for one, other in self.pairs
        }
        begin |= {f"small-{name}-{anchor.arm}-anchor-": (anchor.arm,) for anchor in self.anchors}
        told = {arm for text, pair in begin.items() if any(row["id"].startswith(text) for row in rows) for arm in pair}
        rest = [arm for arm in self.only.get(name, self.arms) if arm not in told]
        return rows + [self.missing(name, arm, len(found.get(arm, ()))) for arm in rest]

    def anchored(self, anchor: Anchor, seeds: Seeds) -> dict[str, str]:
        """The row of a published number: reproduced where the mean over the seeds lies within its margin."""
        ours, made = self.values(seeds, anchor.metric), [run["facts"] for _, run in sorted(seeds.items())]
        mean = statistics.mean(ours)
        near = abs(mean - anchor.value) <= anchor.margin
        return {
            "id": f"small-{anchor.set}-{anchor.arm}-anchor-{anchor.metric}",
            "table": f"Small tier, measured here: {self.sets[anchor.set]}",
            "experiment": f"{self.arms[anchor.arm]}; anchor, within {anchor.margin:g} points of what is published",
            "dataset": anchor.set,
            "metric": self.metrics[anchor.metric],
            "paper_value": f"{anchor.value:g}",
            "paper_source": anchor.source,
            "tier": "small",
            "ours_mean": f"{mean:.2f}",
            "ours_std": f"{statistics.stdev(ours):.2f}" if len(ours) > 1 else "",
            "n_seeds": str(len(ours)),
            "status": rule.REPRODUCED if near else rule.MISSED,
            "command": self.command.format(set=anchor.set, arms=anchor.arm, seeds=" ".join(map(str, sorted(seeds)))),
            "commit": made[0]["commit"],
            "hardware": made[0]["hardware"],
            "minutes": f"{statistics.mean(fact['minutes'] for fact in made):.1f}",
            "date": made[0]["date"],
            "log": f"lab/logs/{anchor.set}-{anchor.arm}.json",
        }

    def missing(self, name: str, arm: str, seeds: int) -> dict[str, str]:
        """The row of an arm that has not run, or with one seed only."""
        return {
            "id": f"small-{name}-{arm}-{self.claim}",
            "table": f"Small tier, measured here: {self.sets[name]}",
            "experiment": self.arms[arm],
            "dataset": name,
            "metric": self.metrics[self.claim],
            "tier": "small",
            "status": f"not run (needs {'further seeds, one says nothing' if seeds else 'CPU time; left out so far'})",
            "command": self.command.format(set=name, arms=arm, seeds="0 1 2"),
        }

    def write(self) -> int:
        """Write the rows of every set anew from the logs (Holm's correction is over all of them), and draw the plots.

        Returns how many rows there are.
        """
        parts = self.family or [self]
        for place, part in enumerate(parts):
            part.draw(f"-{next(iter(part.sets))}" if place else "")
        return sum(
            replace_rows(part.home / "results.csv", f"small-{name}-", part.rows(name))
            for part in parts
            for name in part.sets
        )

    def draw(self, suffix: str = "") -> None:
        """`arms.png` and `curves.png`: the claim's metric of every seed, and the training losses."""
        found = {name: self.logs(name) for name in self.sets}
        values = {
            name: {arm: self.values(seeds, self.claim) for arm, seeds in of.items()} for name, of in found.items()
        }
        titles = {arm: title if len(title) < 48 else f"{title[:45]}..." for arm, title in self.arms.items()}
        plots.arms(self.home / "lab" / f"arms{suffix}.png", values, titles, self.metrics[self.claim], self.floor)
        plots.curves(
            self.home / "lab" / f"curves{suffix}.png",
            {
                name: {titles[arm]: {seed: run["curve"] for seed, run in seeds.items()} for arm, seeds in of.items()}
                for name, of in found.items()
            },
        )

    def record(self, root: Path) -> int:
        """Keep the runs below `root` (.../small/SET) and write the rows anew; returns how many there are."""
        name = root.resolve().name
        if root.resolve().parent.name != "small" or name not in self.sets:
            raise UserError(f"{root}: --record takes a data set's folder of the small tier; others are no rows")
        self.keep(root, name)
        return self.write()

    # -- the command line --------------------------------------------------------------------------------------------
    def parser(self, doc: str) -> argparse.ArgumentParser:
        p = Parser(prog=f"{self.paper}.arms", description=doc.splitlines()[0])
        p.add_argument("root", type=Path, nargs="?", help="folder that run_arms.sh wrote")
        p.add_argument("--record", action="store_true", help="write the rows of results.csv and the logs; without a "
          "folder: the rows anew, from the logs in the tree")  # fmt: skip
        return p

    def main(self, args: argparse.Namespace) -> int:
        if args.root is None:
            if not args.record:
                raise UserError("give the folder that run_arms.sh wrote, or --record")
            print(f"{self.write()} rows -> {self.home / 'results.csv'}")
            return 0
        print(self.table(self.measured(args.root)))
        if args.record:
            print(f"{self.record(args.root)} rows -> {self.home / 'results.csv'}")
        return 0
