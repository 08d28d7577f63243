"""The table of flat's arms: what is read of a run, the paired rule, the rows it writes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flat import arms
from shared_utils import checkpoint, results

ROOT = Path(__file__).resolve().parents[1]
SCORES = {"base": [30.0, 40.0, 35.0], "flat": [31.0, 41.5, 36.2], "shuffled": [31.0, 38.0, 35.5], "aug": [33.0]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Finished runs of four arms; `rotation` without its evaluation."""
    root = tmp_path / "small" / "cifarfs5"
    for arm, scores in SCORES.items():
        for seed, score in enumerate(scores):
            folder = root / arm / f"seed{seed}"
            folder.with_name(folder.name + "-test").mkdir(parents=True)
            result = {"1shot-proto_l2": score, "5shot-proto_l2": score + 10, "held_base_accuracy": 60.0 + seed}
            if arm != "base":
                result |= {"held_decoder_relative": 0.75, "novel_decoder_relative": 0.8 + seed / 100}
            each = torch.full((8,), score / 100, dtype=torch.float64) + torch.tensor([0.1, -0.1] * 4)
            accuracies = {"1shot-proto_l2": each, "5shot-proto_l2": each + 0.1}
            digests = {"1shot": "a", "5shot": "b"}
            (folder.with_name(folder.name + "-test") / "result.json").write_text(json.dumps(result))
            record = {"accuracies": accuracies, "digests": digests}
            checkpoint.save(folder.with_name(folder.name + "-test") / "episodes.pt", record)
            facts = {"git_commit": "0123456789ab", "hardware": "2 CPU cores", "date": "2026-11-26"}
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(facts))
            checkpoint.save(folder / "checkpoint.pth", {"progress": {"seconds": 90.0}})
            rows = [{"step": step, "loss": 3 - step / 100, "loss/cls": 1.0, "lr": 0.1} for step in range(10, 210, 10)]
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "rotation" / "seed0").mkdir(parents=True)
    return root


def test_what_is_read_of_a_run(tree: Path) -> None:
    found = arms.read(tree / "flat" / "seed1")
    assert found is not None and found["skill_held"] == pytest.approx(25) and found["skill"] == pytest.approx(19)
    assert found["one_shot_gain"] == pytest.approx(1.5) and found["one_shot_gain_ci"] == pytest.approx(0, abs=1e-9)
    base = arms.read(tree / "base" / "seed1")
    assert base is not None and "skill" not in base and "one_shot_gain" not in base
    assert arms.read(tree / "rotation" / "seed0") is None
    shutil.copytree(tree / "flat" / "seed0-test", tree / "rotation" / "seed0-test")
    turns = arms.read(tree / "rotation" / "seed0")
    assert turns is not None and "skill" not in turns and turns["one_shot"] == 31.0  # another target


def test_the_table(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arms.main([str(tree)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    assert "| 3 | 36.23 ± 5.25 | 46.23 ± 5.25 |" in row["FLAT, aet, lambda 1"]
    assert re.search(r"\| \+1.23 \(0.61 to 1.86\), p = 0.014 \|$", row["FLAT, aet, lambda 1"])  # paired
    assert re.search(r"p = 0\.\d+ \|$", row["FLAT with shuffled targets (control)"])
    assert row["transformed copies classified too (augmentation control)"].endswith("|  |")  # one seed
    assert "FLAT with quarter turns alone" not in row


def test_recorded_rows_are_valid(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy" / "flat"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "flat/results.csv", folder)
    if (ROOT / "flat/logs").is_dir():
        shutil.copytree(ROOT / "flat/logs", folder / "logs")
        for old in (folder / "logs").glob("cifarfs5-*"):
            old.unlink()
    monkeypatch.setattr(arms, "ARMS", dataclasses.replace(arms.ARMS, home=folder))
    for _ in range(2):
        assert arms.main([str(tree), "--record"]) == 0
    rows, problems = results.read(folder)
    assert problems == []
    ours = {row["id"]: row for row in rows if row["id"].startswith("small-cifarfs5-")}
    claim = ours["small-cifarfs5-flat-vs-base-one_shot"]
    assert (
        claim["status"].startswith("not testable at this size (3 seeds, 5 needed; no floor")
        and claim["minutes"] == "1.5"
        and claim["n_seeds"] == "3"
    )
    assert ours["small-cifarfs5-shuffled-vs-base-one_shot"]["status"] == "not as expected"
    assert "small-cifarfs5-flat-vs-base-skill" not in ours and "small-cifarfs5-flat-vs-shuffled-skill" in ours
    told = [row["status"] for name, row in ours.items() if "-aug-" in name]
    assert told == ["not run (needs further seeds, one says nothing)"]


def test_every_contrast_is_of_known_arms() -> None:
    named = {arm for pair in arms.ARMS.pairs for arm in pair}
    assert named == set(arms.ARMS.arms)
    script = (ROOT / "flat/run_arms.sh").read_text()
    assert all(arm in script for arm in arms.ARMS.arms)
