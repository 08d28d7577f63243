"""Plots of results: the forest of all claims, a folder's arms with every seed, training curves.

Each is drawn from numbers that stand in the tree (results.csv, logs). A PNG carries the hash of what it was drawn from,
so that a test can tell a stale one without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GREY, BLUE, RED, GREEN = "#9a9a9a", "#1f5fa8", "#b8352c", "#2c8a4b"
COLOURS = {  # of a claim's status
    "effect shown at this scale": GREEN,
    "no effect at this scale": BLUE,
    "contradicted at this scale": RED,
}
LEAST = 2.306 * math.sqrt(2 / 5)  # deviations that five seeds a side can tell from 0: t(8, 97.5 %)
EDGE = 9.0  # deviations, where the forest ends


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def stale(file: Path, data: Any) -> bool:
    """Whether `file` is not there or was drawn from other numbers."""
    return not file.is_file() or digest(data).encode() not in file.read_bytes()


def _save(figure: Any, file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None, "Comment": digest(data)})


def _figure(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure without pyplot's global state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


# -- every claim of the workspace --------------------------------------------------------------------------------------
def forest(file: Path, data: Sequence[Mapping[str, Any]]) -> bool:
    """The claims that `shared_utils.lab.results.claims` lists, as a forest; returns whether it had to be drawn."""
    if not stale(file, data):
        return False
    groups = [[one for one in data if one["compute"] == compute] for compute in (False, True)]
    heights = [max(1, len(group)) for group in groups]
    figure, axes = _figure(9, 1.6 + 0.24 * sum(heights), 2, sharex=True, height_ratios=heights)
    for axis, group, title in zip(axes, groups, ("equal epochs", "equal compute")):
        axis.axvspan(-LEAST, LEAST, color="#eeeeee", zorder=0)
        axis.axvline(0, color="black", linewidth=0.8)
        for place, one in enumerate(group):
            colour = COLOURS.get(one["status"], GREY)
            axis.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=1.6)
            beyond = abs(one["gap"]) > EDGE
            marker = "o" if not beyond else ">" if one["gap"] > 0 else "<"
            axis.plot([max(-EDGE, min(EDGE, one["gap"]))], [place], marker, color=colour, markersize=5, clip_on=False)
        axis.set_yticks(range(len(group)), [one["label"] for one in group], fontsize=7.5)
        axis.set_ylim(len(group) - 0.4, -0.6)
        axis.set_xlim(-EDGE, EDGE)
        axis.set_title(f"method minus baseline, {title}", fontsize=9, loc="left")
    figure.supxlabel(
        "pooled standard deviations of the seeds, with 95 % interval (arrow: beyond the edge)\n"
        "band: what five seeds a side of this spread cannot tell from 0\n"
        "green: shown, blue: no effect, red: contradicted, grey: not testable",
        fontsize=8,
    )
    _save(figure, file, data)
    return True


# -- a folder's arms ---------------------------------------------------------------------------------------------------
def arms(
    file: Path, sets: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], metric: str,
    floor: str | float | None = None,
) -> bool:  # fmt: skip
    """Dots of all seeds, mean and 95 % interval of each arm, a panel a set; returns whether it had to be drawn.

    Args:
        sets: {set: {arm: a number a seed}}. titles: {arm: title}. floor: an arm or a number, drawn as a line.
    """
    shown = {name: {arm: list(x) for arm, x in by_arm.items() if x} for name, by_arm in sets.items()}
    shown = {name: by_arm for name, by_arm in shown.items() if by_arm}
    data = [shown, dict(titles), metric, floor]
    if not shown or not stale(file, data):
        return False
    from scipy.stats import t

    figure, axes = _figure(
        8, 0.7 + sum(0.5 + 0.26 * len(by_arm) for by_arm in shown.values()), len(shown),
        height_ratios=[len(by_arm) + 1 for by_arm in shown.values()],
    )  # fmt: skip
    for axis, (name, by_arm) in zip(axes, shown.items()):
        for place, values in enumerate(by_arm.values()):
            mean = statistics.mean(values)
            if len(values) > 1:
                half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
                axis.plot([mean - half, mean + half], [place, place], color=BLUE, linewidth=1.2)
            axis.plot([mean], [place], "|", color=BLUE, markersize=11, markeredgewidth=2)
            axis.plot(values, [place] * len(values), "o", color=GREY, markersize=4, alpha=0.8)
        base = statistics.mean(by_arm[floor]) if isinstance(floor, str) and floor in by_arm else floor
        if isinstance(base, float):
            axis.axvline(base, color=RED, linewidth=0.9, linestyle=":")
        seen = [value for values in by_arm.values() for value in values]
        room = 0.15 * (max(seen) - min(seen)) or 1.0
        axis.set_xlim(min(seen) - room, max(seen) + room)
        axis.set_yticks(range(len(by_arm)), [titles.get(arm, arm) for arm in by_arm], fontsize=7.5)
        axis.set_ylim(len(by_arm) - 0.4, -0.6)
        axis.set_title(f"{name}: {metric}", fontsize=9, loc="left")
    axes[-1].set_xlabel("dots: seeds; bar and line: mean, 95 % interval; red: floor", fontsize=8)
    _save(figure, file, data)
    return True


def curves(file: Path, sets: Mapping[str, Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]]) -> bool:
    """Training loss over steps, a line a seed and a colour an arm, a panel a set; whether it had to be drawn.

    Args:
        sets: {set: {title of an arm: {seed: lines of its log with `step` and `loss`}}}.
    """
    points = {
        name: {
            title: [[[row["step"], row["loss"]] for row in log if "loss" in row] for log in seeds.values() if log]
            for title, seeds in by_arm.items()
        }
        for name, by_arm in sets.items()
    }
    points = {name: {arm: logs for arm, logs in by_arm.items() if logs} for name, by_arm in points.items()}
    points = {name: by_arm for name, by_arm in points.items() if by_arm}
    if not points or not stale(file, points):
        return False
    figure, axes = _figure(8, 2.9 * len(points), len(points))
    for axis, (name, by_arm) in zip(axes, points.items()):
        for number, (arm, logs) in enumerate(by_arm.items()):
            for first, log in enumerate(logs):
                axis.plot(*zip(*log), color=f"C{number % 10}", linewidth=0.9, label=None if first else arm,
                          linestyle="-" if number < 10 else "--")  # fmt: skip
        axis.set_title(f"{name}: training loss", fontsize=9, loc="left")
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[-1].set_xlabel("step", fontsize=8)
    _save(figure, file, points)
    return True
