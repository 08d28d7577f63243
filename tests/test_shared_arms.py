"""Arms of the small tier: what is collected, the acceptance rule, the logs that stay and the rows they make."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest

from shared_utils import UserError, checkpoint
from shared_utils.lab import results, rule
from shared_utils.lab.arms import Anchor, Arms, replace_rows, thinned

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {"base": [20.0, 22.0, 21.0], "longer": [24.0, 26.0, 25.0], "full": [25.0, 25.5, 26.0], "control": [18.0]}
FACTS = {"git_commit": "0123456789ab", "hardware": "2 CPU cores", "date": "2026-11-22"}


def read(folder: Path) -> dict[str, float] | None:
    file = folder.with_name(f"{folder.name}-knn") / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def finish(folder: Path, metrics: dict[str, float], **facts: object) -> None:
    """A finished run, as a training script and an evaluation leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = folder.with_name(f"{folder.name}-knn")
    evaluation.mkdir(exist_ok=True)
    (evaluation / "result.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps(FACTS | facts))
    checkpoint.save(folder / "checkpoint.pth", {"progress": {"seconds": 120.0}})
    rows = [{"step": step, "loss": 7 - step / 100, "lr": 0.1} for step in range(10, 630, 10)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Finished runs of four arms, one without its evaluation, one of an arm that nobody knows."""
    root = tmp_path / "runs" / "small" / "cifar10"
    for arm, scores in MEASURED.items():
        for seed, score in enumerate(scores):
            finish(root / arm / f"seed{seed}", {"knn": score, "linear": 45.0 + seed})
    (root / "other" / "seed0").mkdir(parents=True)
    finish(root / "stranger" / "seed0", {"knn": 1.0, "linear": 1.0})
    return root


@pytest.fixture
def arms(tmp_path: Path) -> Arms:
    home = tmp_path / "paper"
    home.mkdir()
    (home / "results.csv").write_text(",".join(results.COLUMNS) + "\n")
    replace_rows(home / "results.csv", "none", [{"id": "small-other-row"}])
    return Arms(
        paper="paper",
        home=home,
        arms={"base": "baseline", "longer": "baseline, longer", "full": "method", "control": "control", "other": "o"},
        metrics={"knn": "20-NN", "linear": "linear"},
        shown={"gap": "gap of its own"},
        sets={"cifar10": "CIFAR-10, 4,000 images"},
        claim="knn",
        baseline="base",
        pairs=[("full", "base"), ("full", "longer"), ("full", "control")],
        claims=[("full", "base", "knn")],
        curve=("step", "loss"),
        command="SET={set} ARMS='{arms}' SEEDS='{seeds}' bash paper/run_arms.sh small",
        read=read,
    )


def test_paired_arms_are_compared_over_their_common_seeds(arms: Arms) -> None:
    one = {seed: {"metrics": {"m": float(seed)}} for seed in (0, 1, 2)}
    other = {seed: {"metrics": {"m": 10.0 * seed}} for seed in (1, 2, 3)}
    assert arms.compared(one, other, "m") == ([1.0, 2.0], [10.0, 20.0])
    apart = dataclasses.replace(arms, paired=False)
    assert apart.compared(one, other, "m") == ([0.0, 1.0, 2.0], [10.0, 20.0, 30.0])
    found = {"full": one, "base": other}
    paired, pooled = arms.compare(found, "full", "base", "m"), apart.compare(found, "full", "base", "m")
    assert paired is not None and (paired.difference, paired.n) == (-13.5, 2)
    assert pooled is not None and (pooled.difference, pooled.n) == (-19.0, 3)


def test_the_table_holds_every_finished_seed(arms: Arms, runs: Path) -> None:
    text = arms.table(arms.measured(runs))
    assert text.splitlines()[0] == "| arm | seeds | 20-NN | linear | 20-NN against baseline |"
    assert text.splitlines()[2:] == [
        "| baseline | 3 | 21.00 ± 1.00 | 46.00 ± 1.00 |  |",
        "| baseline, longer | 3 | 25.00 ± 1.00 | 46.00 ± 1.00 | +4.00 (4.00 to 4.00), p = 0 |",
        "| method | 3 | 25.50 ± 0.50 | 46.00 ± 1.00 | +4.50 (2.35 to 6.65), p = 0.012 |",
        "| control | 1 | 18.00 | 45.00 |  |",
    ]


def test_a_number_that_claims_nothing_is_shown_where_every_seed_has_it(arms: Arms, runs: Path) -> None:
    for seed in range(3):
        finish(runs / "full" / f"seed{seed}", {"knn": 25.0, "linear": 45.0, "gap": 0.25 + seed / 100})
    finish(runs / "base" / "seed0", {"knn": 20.0, "linear": 45.0, "gap": 0.5})  # one seed of three
    head, _, base, _, full, _ = arms.table(arms.measured(runs)).splitlines()
    assert head == "| arm | seeds | 20-NN | linear | gap of its own | 20-NN against baseline |"
    assert full.endswith(" | 0.26 ± 0.01 | +4.00 (1.52 to 6.48), p = 0.02 |") and base.endswith(
        " | 46.00 ± 1.00 |  |  |"
    )
    arms.record(runs)
    assert arms.logs("cifar10")["full"][1]["metrics"]["gap"] == 0.26
    assert {row["metric"] for row in arms.rows("cifar10")} == {"20-NN", "linear"}


def test_recorded_rows_are_valid_and_replace_older_ones(arms: Arms, runs: Path) -> None:
    assert arms.record(runs) == 6  # against two baselines; two arms have nothing to tell
    replace_rows(arms.home / "results.csv", "later", [{"id": "later"}])
    assert arms.record(runs) == 6 and results.read(arms.home)[0][-1]["id"] == "later"  # in their place, not at the end
    replace_rows(arms.home / "results.csv", "later", [])
    rows, problems = results.read(arms.home)
    assert [text for text in problems if "small-other-row" not in text] == []
    claim, *_ = (row for row in rows if row["id"] == "small-cifar10-full-vs-base-knn")
    assert (claim["ours_mean"], claim["ours_std"], claim["n_seeds"]) == ("25.50", "0.50", "3")
    assert (claim["baseline_mean"], claim["baseline_std"], claim["minutes"]) == ("21.00", "1.00", "2.0")
    assert (claim["p"], claim["ci_low"], claim["ci_high"]) == ("0.012", "2.35", "6.65")
    doubts = "3 seeds, 5 needed; no floor measured; no positive control measured"
    assert claim["status"] == f"not testable at this size ({doubts})" and claim["commit"] == "0123456789ab"
    assert claim["command"] == "SET=cifar10 ARMS='base full' SEEDS='0 1 2' bash paper/run_arms.sh small"
    assert [row["status"] for row in rows if "full-vs-longer-knn" in row["id"]] == ["descriptive"]
    assert len(rows) == 7 and rows[0]["id"] == "small-other-row"
    assert {row["id"]: row["status"] for row in rows[5:]} == {
        "small-cifar10-control-knn": "not run (needs further seeds, one says nothing)",
        "small-cifar10-other-knn": "not run (needs CPU time; left out so far)",
    }
    assert rows[6]["command"] == "SET=cifar10 ARMS='other' SEEDS='0 1 2' bash paper/run_arms.sh small"


def test_a_published_number_is_reproduced_within_its_margin(arms: Arms, runs: Path) -> None:
    def statuses() -> dict[str, tuple[str, str]]:
        rows, wrong = results.read(arms.home)
        assert [text for text in wrong if "small-other-row" not in text] == []
        return {row["id"]: (row["status"], row["experiment"]) for row in rows if "anchor" in row["id"]}

    near = [Anchor("cifar10", "base", "knn", value, "its README", 0.5) for value in (21.5, 20.5)]
    far = [Anchor("cifar10", "base", "knn", value, "its README", 0.5) for value in (21.6, 20.4)]
    for anchor in near + far:
        arms.anchors = [anchor, anchor._replace(arm="control", value=18.4), anchor._replace(arm="other")]
        arms.record(runs)
        found, alone = statuses().values()  # the third has not run
        assert found[0] == ("reproduced" if anchor in near else "not reproduced") and alone[0] == "reproduced"
        assert found[1] == "baseline; anchor, within 0.5 points of what is published"
    (row,) = [row for row in results.read(arms.home)[0] if row["id"] == "small-cifar10-base-anchor-knn"]
    assert (row["ours_mean"], row["ours_std"], row["n_seeds"]) == ("21.00", "1.00", "3")
    assert (row["paper_value"], row["paper_source"], row["log"]) == (
        "20.4",
        "its README",
        "lab/logs/cifar10-base.json",
    )


def test_new_seeds_and_arms_stand_beside_those_recorded_before(arms: Arms, runs: Path) -> None:
    arms.record(runs)
    for arm in MEASURED:
        shutil.rmtree(runs / arm)
    finish(runs / "full" / "seed3", {"knn": 27.5, "linear": 50.0}, git_commit="ba9876543210")
    finish(runs / "full" / "seed0", {"knn": 25.5, "linear": 50.0})  # measured anew: takes the place of the old one
    assert arms.record(runs) == 6
    full = arms.logs("cifar10")["full"]
    assert list(full) == [0, 1, 2, 3] and arms.values(full, "knn") == [25.5, 25.5, 26.0, 27.5]
    assert full[3]["facts"] == {
        "commit": "ba9876543210",
        "hardware": "2 CPU cores",
        "date": "2026-11-22",
        "minutes": 2.0,
    }
    assert len(full[3]["curve"]) == 22 and full[3]["curve"][-1]["step"] == 620 and "lr" not in full[3]["curve"][0]


def test_minutes_of_a_run_whose_checkpoint_was_not_kept(arms: Arms, runs: Path) -> None:
    (runs / "full" / "seed0" / "checkpoint.pth").unlink()
    with pytest.raises(UserError, match="neither a result beside it nor full-seed0.log tells its minutes"):
        arms.record(runs)
    (runs / "full-seed0.log").write_text(
        "  done: 620 steps in 4.2 min; /elsewhere/full/seed0/checkpoint.pth\n"
        "  done: 750 steps in 0.2 min; /elsewhere/full/seed0-linear/checkpoint.pth\n"
    )
    arms.record(runs)
    assert arms.logs("cifar10")["full"][0]["facts"]["minutes"] == 4.2
    result = runs / "full" / "seed0-knn" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"minutes": 3.5}))
    arms.record(runs)
    assert [run["facts"]["minutes"] for run in arms.logs("cifar10")["full"].values()] == [3.5, 2.0, 2.0]


def test_what_no_commit_names_is_no_row(arms: Arms, runs: Path) -> None:
    finish(runs / "full" / "seed0", {"knn": 25.0, "linear": 45.0}, git_dirty=True)
    before = (arms.home / "results.csv").read_text()
    with pytest.raises(UserError, match="full/seed0: made with uncommitted changes"):
        arms.record(runs)
    assert (arms.home / "results.csv").read_text() == before and not (arms.home / "lab/logs").exists()


def test_errors_name_the_cure(arms: Arms, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished arm .*run paper/run_arms.sh first"):
        arms.collect(tmp_path)
    elsewhere = shutil.copytree(runs, tmp_path / "mini")
    with pytest.raises(UserError, match="--record takes a data set's folder of the small tier"):
        arms.record(elsewhere)


def test_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": step, "other": 1}) for step in range(7)))
    assert thinned(log, ("step", "absent"), points=3) == [
        {"step": 0},
        {"step": 2},
        {"step": 4},
        {"step": 6},
        {"step": 6},
    ]


FOLDERS = [file.parents[1].name for file in sorted(ROOT.glob("*/lab/arms.py")) if "\nARMS = Arms(" in file.read_text()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_rows_of_the_tree_are_what_its_logs_say(folder: str) -> None:
    arms: Arms = importlib.import_module(f"{folder}.lab.arms").ARMS
    rows, _ = results.read(ROOT / folder)
    empty = dict.fromkeys(results.COLUMNS, "")
    for name in arms.sets:
        assert [row for row in rows if row["id"].startswith(f"small-{name}-")] == [empty | r for r in arms.rows(name)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_claims_of_paper_json_are_those_of_the_arms(folder: str) -> None:
    """Every claim of every set that has a row, in that order: none is left out on the front page."""
    arms: Arms = importlib.import_module(f"{folder}.lab.arms").ARMS
    ids = {row["id"] for row in results.read(ROOT / folder)[0]}
    named = [f"small-{name}-{one}-vs-{two}-{metric}" for name in arms.sets for one, two, metric in arms.claims]
    assert list(results.paper(ROOT / folder).claims) == [name for name in named if name in ids]


def finish_all(root: Path, scores: dict[str, list[float]]) -> None:
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            finish(root / arm / f"seed{seed}", {"knn": value, "linear": value})


def test_a_claim_is_tested_where_floor_and_positive_control_come_out(arms: Arms, tmp_path: Path) -> None:
    """Five seeds: above a baseline that clears the floor, where the known improvement shows; then each of them not."""
    base = [20.0, 22.0, 21.0, 20.5, 21.5]
    scores = {"base": base, "full": [x + 2 + i / 10 for i, x in enumerate(base)]}
    scores |= {"longer": [x + 3 - i / 10 for i, x in enumerate(base)], "other": [9.0, 10.0, 9.5, 10.5, 10.0]}
    whole = dataclasses.replace(
        arms, pairs=[*arms.pairs, ("longer", "base"), ("base", "other")], floor="other", positive=("longer", "base"),
        controls={("longer", "base"): "above", ("base", "other"): "above"}, claims=[("full", "base", "knn")],
    )  # fmt: skip

    def statuses(of: Arms) -> dict[str, str]:
        of.write()
        return {row["id"].removeprefix("small-cifar10-"): row["status"] for row in results.read(of.home)[0]}

    root = tmp_path / "again" / "small" / "cifar10"
    finish_all(root, scores)
    whole.record(root)
    found = statuses(whole)
    assert found["full-vs-base-knn"] == "effect shown at this scale" and found["longer-vs-base-knn"] == "as expected"
    assert found["base-vs-other-knn"] == "as expected" and found["full-vs-base-linear"] == "descriptive"
    finish_all(root, {"longer": base[::-1]})  # the assay does not see the known improvement
    whole.record(root)
    found = statuses(whole)
    assert found["full-vs-base-knn"] == "not testable at this size (the positive control fails, baseline, longer)"
    assert found["longer-vs-base-knn"] == "not as expected"
    finish_all(root, {"longer": scores["longer"], "other": [x - 0.1 for x in base[::-1]]})  # no better than the floor
    whole.record(root)
    assert statuses(whole)["full-vs-base-knn"] == "not testable at this size (baseline does not clear the floor, o)"


def test_holm_is_over_all_sets_of_a_folder(arms: Arms, tmp_path: Path) -> None:
    """A claim with p = .03 alone is shown, beside a second one without effect it is not."""
    base = [20.0, 22.0, 21.0, 20.5, 21.5]
    gaps = [0.2, 1.0, 0.3, 1.4, 0.9]
    scores = {"base": base, "full": [x + g for x, g in zip(base, gaps)], "other": [9.0, 10.0, 9.5, 10.5, 10.0]}
    scores |= {"longer": [x + 3 - i / 10 for i, x in enumerate(base)]}
    whole = dataclasses.replace(
        arms, pairs=[("full", "base"), ("longer", "base"), ("base", "other")], floor="other",
        positive=("longer", "base"), controls={("longer", "base"): "above"}, sets={"cifar10": "c", "second": "s"},
    )  # fmt: skip
    finish_all(tmp_path / "small" / "cifar10", scores)
    whole.record(tmp_path / "small" / "cifar10")
    key = ("cifar10", "full", "base", "knn")
    one = whole.compare(whole.logs("cifar10"), "full", "base", "knn")
    assert one is not None and 0.025 < one.p < 0.05 and whole.claimed()[key] == rule.EFFECT
    finish_all(tmp_path / "small" / "second", {**scores, "full": [x + g for x, g in zip(base, [1, -1, 0.5, -0.4, 0])]})
    whole.record(tmp_path / "small" / "second")
    assert whole.claimed() == {key: rule.NONE, ("second", *key[1:]): rule.NONE}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_comparison_is_of_arms_that_the_script_trains(folder: str) -> None:
    arms: Arms = importlib.import_module(f"{folder}.lab.arms").ARMS
    script = (ROOT / folder / "run_arms.sh").read_text()
    assert {arm for pair in arms.pairs for arm in pair} == set(arms.arms)
    cases = {
        name.strip()
        for line in script.splitlines()
        if line.startswith("    ")
        for name in line.split(")")[0].split("|")
    }
    assert set(arms.arms) <= cases
