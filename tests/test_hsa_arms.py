"""The table of the arms: what is collected, the acceptance rule, and the rows it writes."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from hsa import arms
from hsa.main_knn import load_bags
from shared_utils import UserError, checkpoint, results

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {"moco": [20.0, 22.0, 21.0], "moco_eq": [24.0, 26.0, 25.0], "full": [25.0, 25.5, 26.0], "random": [18.0]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Finished runs of four arms, and one without its linear evaluation."""
    root = tmp_path / "small" / "cifar10"
    for arm, scores in MEASURED.items():
        for seed, score in enumerate(scores):
            folder = root / arm / f"seed{seed}"
            for part in ("", "-knn", "-linear"):
                folder.with_name(folder.name + part).mkdir(parents=True)
            knn = {"knn": score + 10, "few_shot": score, "purity": 30.0 + seed, "knn10": 0.0}
            blocks = {"5": {"last": 45.0 + seed}, "4": {"last": 40.0 + seed}}
            (root / arm / f"seed{seed}-knn" / "result.json").write_text(json.dumps(knn))
            linear = {"linear_last": 45.0 + seed, "blocks": blocks}
            (root / arm / f"seed{seed}-linear" / "result.json").write_text(json.dumps(linear))
            facts = {"git_commit": "0123456789ab", "hardware": "2 CPU cores", "date": "2026-11-22"}
            (folder / "config.json").write_text(json.dumps(facts))
            checkpoint.save(folder / "checkpoint.pth", {"progress": {"seconds": 120.0}})
            rows = [{"step": step, "loss": 7 - step / 100, "lr": 0.1, "feat/std": 0.5} for step in range(10, 630, 10)]
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "cross" / "seed0-knn").mkdir(parents=True)
    (root / "cross" / "seed0-knn" / "result.json").write_text(json.dumps({"knn": 1.0, "few_shot": 1.0, "purity": 1.0}))
    return root


def test_the_rule_needs_more_than_the_pooled_deviation() -> None:
    base = [10.0, 12.0, 11.0]  # deviation 1
    assert arms.verdict([11.8, 11.8, 11.8], base) == "above"  # pooled 0.71
    assert arms.verdict([11.5, 11.5, 11.5], base) == "no difference"
    assert arms.verdict([9.0, 9.5, 8.5], base) == "below"
    assert arms.verdict([50.0], base) == arms.verdict(base, [1.0]) == "one seed, no verdict"


def test_the_table_holds_every_finished_seed(tree: Path) -> None:
    text = arms.table(arms.collect(tree))
    assert (
        "| MoCo v2, equal epochs | 3 | 21.00 ± 1.00 | 31.00 ± 1.00 | 31.00 ± 1.00 | 46.00 ± 1.00 | 41.00 ± 1.00 |  |"
        in text
    )
    assert "| HSA, the release's loss | 3 | 25.50 ± 0.50 |" in text and text.count("| above |") == 2
    assert "| HSA with random neighbours (control) | 1 | 18.00 | " in text and "one seed, no verdict" in text
    assert "no CutMix" not in text
    assert text.splitlines()[2].startswith("| MoCo v2, equal epochs")


def test_the_gap_is_shown_for_the_arms_that_have_it_and_claims_nothing(tree: Path, tmp_path: Path, monkeypatch) -> None:
    assert arms.GAP_TITLE not in arms.table(arms.collect(tree))
    for seed in range(3):
        file = tree / "full" / f"seed{seed}-knn" / "result.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "bag_gap": 0.25 + seed / 100}))
    other = tree / "moco" / "seed0-knn" / "result.json"  # one seed of three
    other.write_text(json.dumps({**json.loads(other.read_text()), "bag_gap": 0.5}))
    found = arms.collect(tree)
    head, _, moco, _, full, *_ = arms.table(found).splitlines()
    assert head.endswith(f"| {arms.GAP_TITLE} | 10-shot against MoCo v2 |")
    assert full.endswith(" | 0.26 ± 0.01 | above |") and moco.endswith(" | 41.00 ± 1.00 |  |  |")
    assert {line.count("|") for line in arms.table(found).splitlines()} == {head.count("|")}
    assert arms.compact(found["full"])["1"]["metrics"]["bag_gap"] == 0.26
    folder = tmp_path / "copy" / "hsa"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "hsa/results.csv", folder)
    if (ROOT / "hsa/logs").is_dir():  # of the rows that are measured
        shutil.copytree(ROOT / "hsa/logs", folder / "logs")
    monkeypatch.setattr(arms, "HERE", folder)
    assert arms.main([str(tree), "--record"]) == 0
    assert not any("bag_gap" in row["id"] for row in results.read(folder)[0])


def test_neighbours_of_a_run_become_bags(tmp_path: Path) -> None:
    index = torch.tensor([[1, 2], [2, 0], [0, 1]])
    for name, parts in (("full", {"neighbours": {"index": index, "epoch": 5}}), ("moco", {})):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "checkpoint.pth", {"progress": {"seconds": 1.0}, **parts})
        assert arms.main([str(tmp_path / name), "--bags", str(tmp_path / f"{name}.npy")]) == 0
    assert torch.equal(load_bags(tmp_path / "full.npy", 3, 2), index)
    assert not (tmp_path / "moco.npy").exists()


def test_nothing_finished_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished arm .*run hsa/run_arms.sh first"):
        arms.collect(tmp_path)


def test_recorded_rows_are_valid_and_replace_older_ones(tree: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "copy" / "hsa"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "hsa/results.csv", folder)
    if (ROOT / "hsa/logs").is_dir():  # of the rows that are measured
        shutil.copytree(ROOT / "hsa/logs", folder / "logs")
    monkeypatch.setattr(arms, "HERE", folder)
    for _ in range(2):
        assert arms.main([str(tree), "--record"]) == 0
    rows, problems = results.read(folder)
    assert problems == []
    ours = {r["id"]: r for r in rows if r["id"].startswith("small-cifar10-")}
    assert len(ours) == 2 * len(arms.METRICS)  # full against both baselines; one seed of random claims nothing
    with open(ROOT / "hsa/results.csv", newline="") as handle:
        others = [row for row in csv.DictReader(handle) if not row["id"].startswith("small-cifar10-")]
    assert len(rows) == len(others) + len(ours)
    claim = ours["small-cifar10-full-vs-moco-few_shot"]
    assert (claim["ours_mean"], claim["ours_std"], claim["baseline_mean"], claim["minutes"]) == (
        "25.50",
        "0.50",
        "21.00",
        "2.0",
    )
    assert claim["status"] == "effect shown at small scale"
    assert ours["small-cifar10-full-vs-moco_eq-few_shot"]["status"] == "no effect at small scale"
    log = json.loads((folder / "logs/cifar10-full.json").read_text())
    assert log["2"]["metrics"]["linear3"] == 42.0 and log["0"]["curve"][-1]["step"] == 620
    elsewhere = shutil.copytree(tree, tmp_path / "mini")
    with pytest.raises(UserError, match="--record takes a data set's folder of the small tier"):
        arms.main([str(elsewhere), "--record"])


def test_every_contrast_is_of_known_arms() -> None:
    named = {arm for pair in [*arms.ACCEPTANCE, *arms.CONTRASTS] for arm in pair}
    assert named == set(arms.ARMS)
    script = (ROOT / "hsa/run_arms.sh").read_text()
    assert all(f"\n    {arm}) " in script for arm in arms.ARMS)
