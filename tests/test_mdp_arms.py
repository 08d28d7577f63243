"""The table of the arms: what is collected, the acceptance rule, and the rows it writes."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from mdp.lab import arms
from shared_utils import UserError, checkpoint
from shared_utils.lab import results

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {"scratch": [10.0, 12.0, 11.0], "p2p": [15.0, 17.0, 16.0], "multi": [16.2, 17.2, 16.4]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Finished runs of three arms and seeds, and one that is not finished."""
    for arm, scores in MEASURED.items():
        for seed, score in enumerate(scores):
            folder = tmp_path / arm / f"seed{seed}-camvid"
            folder.mkdir(parents=True)
            record = {"iter": 30, "mIoU": score, "per_class": {"sky": 1.0}}
            result = {"early": record, "final": {**record, "iter": 300, "mIoU": 30.0 + seed}, "seconds": 60.0}
            (folder / "result.json").write_text(json.dumps(result))
            facts = {"git_commit": "0123456789ab", "hardware": "2 CPU cores", "date": "2026-11-22"}
            (folder / "config.json").write_text(json.dumps(facts))
            if arm != "scratch":
                pretrained = tmp_path / arm / f"seed{seed}"
                checkpoint.save(pretrained / "checkpoint.pth", {"progress": {"seconds": 120.0}})
                rows = [{"step": step, "loss": 3.0 - step / 100, "lr": 0.1} for step in range(10, 210, 10)]
                (pretrained / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mix" / "seed0-camvid").mkdir(parents=True)
    return tmp_path


def test_the_table_holds_every_finished_seed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arms.main([str(tree)]) == 0
    text = capsys.readouterr().out
    assert "| no pretraining | 3 | 11.00 ± 1.00 | 31.00 ± 1.00 |  |" in text
    assert "| pixel-to-pixel, both sets | 3 | 16.00 ± 1.00 | 31.00 ± 1.00 | +5.00 (5.00 to 5.00), p = 0 |" in text
    assert "mixing" not in text


def test_nothing_finished_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished arm .*run mdp/run_arms.sh first"):
        arms.collect(tmp_path)


def test_recorded_rows_are_valid_and_replace_older_ones(tree: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "copy" / "mdp"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "mdp/results.csv", folder)
    monkeypatch.setattr(arms.ARMS, "home", folder)
    for _ in range(2):
        arms.record(arms.collect(tree))
    rows, problems = results.read(folder)
    measured = {row["id"]: row for row in rows if row["ours_mean"]}
    assert problems == [] and len(measured) == 6  # multi and p2p against scratch, multi against p2p, at both ends
    with open(ROOT / "mdp/results.csv", newline="") as handle:
        published = [row for row in csv.DictReader(handle) if not row["id"].startswith("small-")]
    assert [row for row in rows if not row["id"].startswith("small-")] == published
    claim = measured["small-camvid-multi-vs-scratch-early"]
    assert (claim["ours_mean"], claim["ours_std"], claim["n_seeds"], claim["minutes"]) == ("16.60", "0.53", "3", "3.0")
    assert (claim["p"], claim["ci_low"], claim["ci_high"]) == ("0.003", "4.29", "6.91")  # paired: 6.2, 5.2, 5.4
    assert claim["status"].startswith("not testable at this size (3 seeds, 5 needed; no floor measured; no positive")
    assert measured["small-camvid-multi-vs-p2p-final"]["status"] == "descriptive"
    with pytest.raises(UserError, match="--record takes the small tier's folder"):
        arms.main([str(tree), "--record"])
    log = json.loads((folder / "lab/logs/camvid-multi.json").read_text())
    assert log["2"]["metrics"]["early"] == 16.4 and log["0"]["curve"][-1]["step"] == 200
    assert log["1"]["classes"]["final"] == {"sky": 1.0}
