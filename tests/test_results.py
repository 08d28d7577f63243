"""Results tables and the bench driver."""

from __future__ import annotations

import csv
import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_utils import UserError
from shared_utils.lab import results
from shared_utils.lab.results import BEGIN, COLUMNS, END

ROOT = Path(__file__).resolve().parent.parent
bench: Any = importlib.import_module("tests.bench")

MEASURED = {
    "id": "t1-all-200-voc12aug",  # the paper's headline number
    "table": "Table 1",
    "experiment": "MDP",
    "dataset": "CamVid",
    "metric": "mIoU",
    "paper_value": "71.9",
    "paper_source": "table 1",
    "tier": "small",
    "ours_mean": "40.5",
    "ours_std": "0.4",
    "n_seeds": "3",
    "baseline_mean": "38.0",
    "baseline_std": "0.5",
    "p": "0.0004",
    "ci_low": "1.9",
    "ci_high": "3.1",
    "status": "effect shown at this scale",
    "command": "bash mdp/run_arms.sh small",
    "commit": "0123456789abcdef",
    "hardware": "2 cores",
    "minutes": "12.5",
    "date": "2026-11-22",
    "log": "logs/a.jsonl",
}
NOT_RUN = {
    **dict.fromkeys(COLUMNS, ""),
    **{key: MEASURED[key] for key in ("table", "experiment", "dataset", "metric", "paper_value")},
    "id": "b",
    "paper_source": "recalled",
    "status": "not run (needs ADE20K and 8 GPUs)",
}


ABOUT = {
    "name": "MDP",
    "title": "Multi-dataset Pretraining",
    "venue": "arXiv 2021",
    "arxiv": "2106.04121",
    "idea": "pixel-to-prototype contrast",
    "release": "none",
    "headline": MEASURED["id"],
    "claims": [MEASURED["id"]],
}


def make(root: Path, *rows: dict[str, str], columns: list[str] = COLUMNS, **about: object) -> Path:
    (root / "mdp" / "logs").mkdir(parents=True)
    (root / "mdp" / "logs" / "a.jsonl").write_text("{}\n")
    (root / "mdp" / "paper.json").write_text(json.dumps({**ABOUT, **about}))
    for readme in (root / "README.md", root / "mdp" / "README.md"):
        readme.write_text(f"# before\n{BEGIN}\n{END}\nafter\n")
    with (root / "mdp" / "results.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *([row[name] for name in COLUMNS] for row in rows)])
    return root


def test_this_tree_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert (ROOT / "README.md").is_file()
    assert results.main(["--check"]) == 0, capsys.readouterr()


def test_rendered_then_fresh_then_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path, NOT_RUN, MEASURED)
    assert results.main(["--root", str(root), "--check"]) == 1
    assert "stale" in capsys.readouterr().out and BEGIN + "\n" + END in (root / "README.md").read_text()
    assert results.main(["--root", str(root)]) == 0
    assert results.main(["--root", str(root), "--check"]) == 0
    paper, front = (root / "mdp" / "README.md").read_text(), (root / "README.md").read_text()
    table = (root / "mdp" / "RESULTS.md").read_text()
    assert paper.startswith("# before\n") and paper.endswith(f"{END}\nafter\n")
    told = (
        "| MDP against the baseline | CamVid, mIoU | +2.50 (1.9 to 3.1) | below .001 | 3 | effect shown at this scale |"
    )
    assert told in paper and "recalled" not in paper  # the claims alone
    for text in ("71.9 (table 1)", "40.5 ± 0.4", "38.0 ± 0.5", "3 seeds", "[log](logs/a.jsonl)", "1.9 to 3.1"):
        assert text in table
    assert "71.9 (recalled, unverified)" in table and "`bash mdp/run_arms.sh small`" in table
    measured, published = table.index("## Measured here"), table.index("## Published, not measured here")
    assert measured < table.index("40.5 ± 0.4") < published < table.index("recalled")  # measured first
    row = next(line for line in front.splitlines() if "[mdp](mdp/README.md)" in line)
    assert row.endswith("| MDP, arXiv 2021 | pixel-to-prototype contrast | none | 71.9 mIoU | shown |")
    (root / "mdp" / "README.md").write_text(paper.replace("2.50", "5.50"))
    capsys.readouterr()
    assert results.main(["--root", str(root), "--check"]) == 1
    assert "mdp/README.md" in capsys.readouterr().out
    results.main(["--root", str(root)])
    (root / "mdp" / "RESULTS.md").write_text(table.replace("40.5", "45.0"))
    assert results.main(["--root", str(root), "--check"]) == 1
    assert "mdp/RESULTS.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "word"),
    [
        ([results.CLAIMED[0]], "shown"),
        ([results.CLAIMED[0], "not testable at this size (3 seeds, 5 needed)"], "shown"),
        ([results.CLAIMED[1], results.CLAIMED[1]], "no effect"),
        ([results.CLAIMED[2]], "contradicted"),
        ([results.CLAIMED[1], results.CLAIMED[0]], "shown, no effect"),
        (["not testable at this size (no floor measured)"], "untested"),
        ([], "untested"),
    ],
)
def test_the_verdict_is_of_the_claims_that_could_be_tested(statuses: list[str], word: str, tmp_path: Path) -> None:
    """A row that is no claim does not count, whatever its status."""
    rows = [{**MEASURED, "id": f"claim{i}", "status": status} for i, status in enumerate(statuses)]
    other = {**MEASURED, "status": results.CLAIMED[2]}
    about = results.paper(make(tmp_path, claims=[row["id"] for row in rows]) / "mdp")
    assert results.word([other, *rows], about) == word


def test_no_cell_of_the_front_page_is_long(tmp_path: Path) -> None:
    root = make(tmp_path, {**MEASURED, "metric": "mIoU " * 30}, idea="word " * 40)
    assert results.main(["--root", str(root)]) == 0
    row = next(line for line in (root / "README.md").read_text().splitlines() if "[mdp]" in line)
    assert max(len(cell) for cell in row.split(" | ")) <= 60 and " ... |" in row
    tree = (ROOT / "README.md").read_text()
    rows = [line for line in tree[tree.index(BEGIN) : tree.index(END)].splitlines() if line.startswith("| <img")]
    assert len(rows) == 10 and all(len(cell.strip(" |")) <= 60 for row in rows for cell in row.split(" | ")[1:])


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (MEASURED, {"status": "works"}, "unknown status 'works'"),
        (MEASURED, {"status": "not run"}, "unknown status 'not run'"),
        (MEASURED, {"status": "not run (needs GPUs)"}, "has a value in ours_mean"),
        (MEASURED, {"ours_mean": "about 40"}, "ours_mean is not a number"),
        (MEASURED, {"baseline_std": "nan"}, "baseline_std is not a number"),
        (MEASURED, {"ours_mean": ""}, "needs ours_mean"),
        (MEASURED, {"n_seeds": ""}, "needs n_seeds"),
        (MEASURED, {"n_seeds": "0"}, "n_seeds is not"),
        (MEASURED, {"n_seeds": "2.5"}, "n_seeds is not"),
        (MEASURED, {"ours_std": ""}, "several seeds need ours_std"),
        (MEASURED, {"command": ""}, "needs command"),
        (MEASURED, {"commit": ""}, "needs commit"),
        (MEASURED, {"commit": "main"}, "commit is not a hash"),
        (MEASURED, {"log": ""}, "needs log"),
        (MEASURED, {"log": "logs/b.jsonl"}, "logs/b.jsonl does not exist"),
        (MEASURED, {"log": "logs/a.jsonl; logs/b.jsonl"}, "logs/b.jsonl does not exist"),
        (MEASURED, {"log": "../README.md"}, "does not exist in the tree"),
        (MEASURED, {"date": "22.11.2026"}, "date is not"),
        (MEASURED, {"tier": "huge"}, "unknown tier"),
        (MEASURED, {"p": ""}, "a claim needs p, ci_low and ci_high"),
        (MEASURED, {"ci_low": "-inf"}, "ci_low is not a number"),
        (MEASURED, {"status": "not testable at this size"}, "unknown status 'not testable at this size'"),
        (MEASURED, {"id": "c"}, "no row t1-all-200-voc12aug with the paper's number"),
        (MEASURED, {"id": "c"}, "no row t1-all-200-voc12aug, which paper.json names as a claim"),
        (MEASURED, {"paper_value": "", "paper_source": ""}, "no row t1-all-200-voc12aug with the paper's number"),
        (NOT_RUN, {"paper_source": ""}, "needs a paper_source"),
        (NOT_RUN, {"status": "paper value unknown"}, "a status other than"),
        (NOT_RUN, {"experiment": ""}, "experiment is empty"),
        (NOT_RUN, {"experiment": "<!-- results:end -->"}, "holds an HTML comment"),
        (NOT_RUN, {"id": MEASURED["id"]}, "id t1-all-200-voc12aug is not unique"),
    ],
)
def test_invalid_rows_are_named(
    base: dict[str, str], change: dict[str, str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = NOT_RUN if base is MEASURED else MEASURED
    root = make(tmp_path, {**base, **change}, other)
    assert results.main(["--root", str(root), "--check"]) == 1
    said = capsys.readouterr().err
    assert "mdp/results.csv" in said and expected in said
    assert results.main(["--root", str(root)]) == 2
    assert BEGIN + "\n" + END in (root / "mdp" / "README.md").read_text()


def test_invalid_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "columns", MEASURED, columns=[*COLUMNS[:-1], "logs"])
    assert results.main(["--root", str(root), "--check"]) == 1
    assert "columns must be exactly" in capsys.readouterr().err
    root = make(tmp_path / "cells", MEASURED)
    (root / "mdp" / "results.csv").write_text(",".join(COLUMNS) + "\na,b\n")
    assert results.main(["--root", str(root), "--check"]) == 1
    assert "row 2 has 2 cells" in capsys.readouterr().err
    root = make(tmp_path / "about", MEASURED)
    (root / "mdp" / "paper.json").unlink()
    with pytest.raises(UserError, match=r"mdp/paper\.json: missing"):
        results.main(["--root", str(root), "--check"])
    for text, error in (("{", "not JSON"), ("[]", "fields must be exactly name, title"), ('{"name": "x"}', "exactly")):
        (root / "mdp" / "paper.json").write_text(text)
        with pytest.raises(UserError, match=error):
            results.main(["--root", str(root), "--check"])
    root = make(tmp_path / "markers", MEASURED)
    (root / "mdp" / "README.md").write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(UserError, match=r"mdp/README\.md: needs one line"):
        results.main(["--root", str(root)])


def test_a_folder_copied_out_renders_alone(tmp_path: Path) -> None:
    root = make(tmp_path, MEASURED)
    (root / "README.md").unlink()
    assert results.main(["--root", str(root)]) == 0
    assert "40.5 ± 0.4" in (root / "mdp" / "RESULTS.md").read_text() and not (root / "README.md").exists()
    (root / "mdp" / "README.md").unlink()
    with pytest.raises(UserError, match=r"mdp/README\.md: missing"):
        results.main(["--root", str(root)])


def test_unknown_paper_value_may_be_measured(tmp_path: Path) -> None:
    row = {**MEASURED, "paper_value": "", "paper_source": "", "status": "paper value unknown"}
    assert results.row_problems(row, make(tmp_path, row) / "mdp") == []


@given(st.text(alphabet="ab |\\`<>&-!\n\r\t\u2028*", max_size=30))
def test_no_cell_breaks_a_table(text: str) -> None:
    rows = [{**NOT_RUN, "experiment": text, "dataset": text}]
    lines = results.render_results(rows, results.Paper("mdp", "", "", "", "", "", "", "", ()), Path("mdp")).splitlines()
    assert {line.count("|") for line in lines[lines.index("### Table 1") + 2 :] if line} == {7}
    assert END not in "\n".join(lines)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes while somebody sleeps, and only then: other work on the machine does not count."""
    now = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def cases(**change: Any) -> list[dict[str, Any]]:
    def work(seconds: float) -> Any:
        return lambda: time.sleep(seconds)

    case = {"name": "slow", "items": 3, "note": "", "floor": work(0.02), "step": work(0.03)}
    return [{key: value for key, value in {**case, **change}.items() if value is not None}]


@pytest.mark.parametrize(
    ("change", "overhead"),
    [
        ({}, 50.0),
        ({"step": None, "method": lambda: time.sleep(0.01)}, 50.0),
        ({"floor_scale": 1.2}, 25.0),
    ],
)
def test_overhead_is_the_share_of_the_floor(change: dict[str, Any], overhead: float, clock: None) -> None:
    (case,) = cases(**change)
    row = bench.measure(case, torch.device("cpu"), repeats=7, budget=2.0)
    assert float(row["overhead %"]) == pytest.approx(overhead)
    assert float(row["items/s"]) == pytest.approx(3e3 / float(row["step ms"]), rel=1e-2)
    assert row["x release"] == "-"


def test_ratio_to_the_release(clock: None) -> None:
    (case,) = cases(release=lambda: time.sleep(0.06))
    row = bench.measure(case, torch.device("cpu"), repeats=5, budget=2.0)
    assert float(row["x release"]) == pytest.approx(0.5)


def test_peak_memory_of_a_call() -> None:
    peak = bench.peak_mib(lambda: torch.ones(256 * 2**18).sum(), torch.device("cpu"))
    assert peak != peak or 200 <= peak <= 350  # 256 MiB; not a number where the system does not tell


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"floor": None}, "missing keys"),
        ({"step": None}, "either step"),
        ({"method": print}, "either step"),
        ({"step": 3}, "wrong kind"),
        ({"speed": 1}, "unknown keys"),
    ],
)
def test_bad_bench_cases_are_named(change: dict[str, Any], expected: str) -> None:
    (case,) = cases(**change)
    with pytest.raises(UserError, match=expected):
        bench.validate(case)


def test_bench_of_an_unknown_folder() -> None:
    with pytest.raises(UserError, match="nosuch: no such folder"):
        bench.main(["nosuch", "--device", "cpu"])
