"""Plots of results: drawn from the tree's numbers, and told to be stale by the hash of what they were drawn from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from shared_utils.lab import plots, results
from tests.test_results import MEASURED, NOT_RUN, make

ROOT = Path(__file__).resolve().parent.parent
CLAIM = {
    "label": "mdp: CamVid, mIoU, against no pretraining (n = 5)", "gap": 5.0, "low": 3.0, "high": 7.0,
    "status": results.CLAIMED[0], "compute": False,
}  # fmt: skip
SEEDS = {"CamVid": {"base": [38.0, 39.0, 37.5], "ours": [40.1, 40.9, 40.5], "late": []}}
LOGS = {"CamVid": {"ours": {0: [{"step": 1, "loss": 3.0}, {"step": 2, "lr": 0.1}, {"step": 3, "loss": 1.0}], 1: []}}}
DRAWN: dict[str, tuple[Callable[..., bool], Any, Any]] = {
    "forest": (plots.forest, [CLAIM], [{**CLAIM, "gap": 5.001}]),
    "curves": (plots.curves, LOGS, {"CamVid": {"ours": {0: [*LOGS["CamVid"]["ours"][0], {"step": 4, "loss": 0.5}]}}}),
    "arms": (lambda file, sets: plots.arms(file, sets, {}, "mIoU", "base"), SEEDS, {"CamVid": {"base": [38.0, 39.0]}}),
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def colours(file: Path) -> set[tuple[int, ...]]:
    return {tuple(map(int, pixel)) for pixel in np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)}


def xs(line: Any) -> tuple[float, ...]:
    return tuple(line.get_xdata())


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("name", DRAWN)
def test_a_stale_plot_is_told_by_its_hash(name: str, tmp_path: Path) -> None:
    """Drawn where it is missing and where a number changed; left alone, to the byte, where none did."""
    draw, data, changed = DRAWN[name]
    file = tmp_path / "lab" / "plot.png"
    assert draw(file, data) is True
    first = file.read_bytes()
    assert draw(file, data) is False and file.read_bytes() == first
    assert draw(file, changed) is True and file.read_bytes() != first
    assert draw(file, data) is True and file.read_bytes() == first  # the same numbers make the same file


def test_nothing_to_draw_leaves_no_file(tmp_path: Path) -> None:
    assert plots.arms(tmp_path / "a.png", {"CamVid": {"ours": []}}, {}, "mIoU") is False
    assert plots.curves(tmp_path / "c.png", {"CamVid": {"ours": {0: []}}}) is False
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_is_no_longer_of_these_numbers_is_stale(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    assert plots.stale(file, [CLAIM])
    plots.forest(file, [CLAIM])
    assert not plots.stale(file, [CLAIM]) and plots.stale(file, []) and plots.stale(file, [{**CLAIM, "compute": True}])
    with Image.open(file) as image:  # the hash is text of the PNG: one that was edited and saved anew has none
        image.save(file)
    assert plots.stale(file, [CLAIM])


def test_claims_are_in_deviations_of_the_seeds(tmp_path: Path) -> None:
    """Rows of the claim alone, measured ones alone; the pooled deviation of 0.3 and 0.4 is 0.3536."""
    base = {**MEASURED, "ours_std": "0.3", "baseline_std": "0.4", "dataset": "CamVid (small), val"}
    rows = [
        {**base, "experiment": "MDP; baseline: scratch, cosine"},
        {**base, "id": "equal", "experiment": "MDP; baseline: scratch, equal compute"},
        {**base, "id": "other", "experiment": "a control"},
        NOT_RUN,
    ]
    root = make(tmp_path, *rows, claims=["equal", MEASURED["id"], NOT_RUN["id"]])
    equal, first = results.claims(root)
    assert (equal["compute"], first["compute"]) == (True, False)
    spread = ((0.3**2 + 0.4**2) / 2) ** 0.5
    assert [first[key] for key in ("gap", "low", "high")] == [round(x / spread, 3) for x in (2.5, 1.9, 3.1)]
    assert first["label"] == "mdp: CamVid, mIoU, against scratch (n = 3)" and first["status"] == MEASURED["status"]


def test_the_forest_shows_the_numbers(tmp_path: Path, drawn: list[Figure]) -> None:
    """Interval and dot at their places, the verdict's colour, equal compute apart, an arrow beyond the edge."""
    far = {**CLAIM, "gap": -50.0, "low": -60.0, "high": -40.0, "status": results.CLAIMED[2], "compute": True}
    plots.forest(tmp_path / "a.png", [CLAIM, {**CLAIM, "status": "not testable at this size (why)"}, far])
    epochs, compute = drawn[0].axes
    lines = {xs(line): (line.get_color(), line.get_marker()) for line in epochs.get_lines()[1:3]}
    assert lines == {(3.0, 7.0): (plots.GREEN, "None"), (5.0,): (plots.GREEN, "o")}
    assert [line.get_color() for line in epochs.get_lines()[3:]] == [plots.GREY] * 2
    assert [label.get_text() for label in epochs.get_yticklabels()] == [CLAIM["label"]] * 2
    _, interval, arrow = compute.get_lines()
    assert xs(interval) == (-60.0, -40.0) and interval.get_color() == plots.RED
    assert (xs(arrow), arrow.get_marker()) == ((-plots.EDGE,), "<")
    found = colours(tmp_path / "a.png")
    assert {rgb(plots.GREEN), rgb(plots.RED), rgb(plots.GREY)} <= found and rgb(plots.BLUE) not in found


def test_the_colours_are_those_of_the_statuses() -> None:
    assert list(plots.COLOURS) == list(results.CLAIMED)


def test_arms_show_every_seed_mean_interval_and_floor(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.arms(tmp_path / "a.png", SEEDS, {"ours": "MDP"}, "mIoU", "base")
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["base", "MDP"]  # an arm without seeds has no line
    base, ours = SEEDS["CamVid"]["base"], SEEDS["CamVid"]["ours"]
    seeds = [list(xs(line)) for line in axis.get_lines() if line.get_marker() == "o"]
    assert seeds == [base, ours]
    means = [xs(line)[0] for line in axis.get_lines() if line.get_marker() == "|"]
    assert means == pytest.approx([np.mean(base), np.mean(ours)])
    interval = xs(axis.get_lines()[0])
    half = 4.302653 * np.std(base, ddof=1) / 3**0.5  # t(2, 97.5 %)
    assert list(interval) == pytest.approx([np.mean(base) - half, np.mean(base) + half], rel=1e-6)
    floor = axis.get_lines()[-1]
    assert floor.get_color() == plots.RED and list(xs(floor)) == pytest.approx([np.mean(base)] * 2)


def test_curves_are_the_logged_losses(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.curves(tmp_path / "c.png", LOGS)
    (axis,) = drawn[0].axes
    (line,) = axis.get_lines()
    assert (xs(line), np.asarray(line.get_ydata()).tolist(), line.get_label()) == ((1, 3), [3.0, 1.0], "ours")


def test_the_command_draws_the_forest_and_finds_a_stale_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path, MEASURED)
    assert results.main(["--root", str(root)]) == 0
    file = root / "docs" / "claims.png"
    assert file.is_file() and not plots.stale(file, results.claims(root))
    assert results.main(["--root", str(root), "--check"]) == 0
    shutil.copy(ROOT / "docs" / "claims.png", file)  # of other numbers
    capsys.readouterr()
    assert results.main(["--root", str(root), "--check"]) == 1
    assert "docs/claims.png" in capsys.readouterr().out and plots.stale(file, results.claims(root))


def test_the_forest_of_this_tree_is_drawn_from_its_rows() -> None:
    assert not plots.stale(ROOT / "docs" / "claims.png", results.claims(ROOT))


def arm_plots() -> list[Path]:
    return sorted(file for kind in ("arms", "curves") for file in ROOT.glob(f"*/lab/{kind}*.png"))


@pytest.mark.parametrize("file", arm_plots(), ids=lambda file: "-".join(file.relative_to(ROOT).parts[::2]))
def test_plots_of_arms_carry_their_hash(file: Path) -> None:
    """Whoever draws or edits one by hand has nothing to tell a stale one by."""
    with Image.open(file) as image:
        assert len(image.info.get("Comment", "")) == 32
