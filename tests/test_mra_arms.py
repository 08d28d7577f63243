"""What mra reads of its arms: the run's own result and its occlusion test; rows from the json files alone."""

import dataclasses
import json
from pathlib import Path

from mra.lab import arms
from shared_utils.lab import results


def finish(root: Path, arm: str, seed: int, top1: float) -> Path:
    folder = root / arm / f"seed{seed}"
    test = folder.with_name(f"seed{seed}-test")
    for path in (folder, test):
        path.mkdir(parents=True)
    own = {"top1": top1, "top1_best": 99.0, "test_a_top1": 70.0 + seed, "minutes": 1.5}
    (folder / "result.json").write_text(json.dumps(own))
    assert arms.read(folder) is None  # not before its occlusion test
    tested = {f"occlusion_{name}": 20.0 + seed for name in ("random", "salient", "nonsalient")}
    (test / "result.json").write_text(json.dumps(tested | {"kept_foreground": 97.0, "minutes": 1.5}))
    facts = {"git_commit": "0123456789ab", "git_dirty": False, "hardware": "2 CPU cores", "date": "2026-11-27"}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    return folder


def test_rows_come_from_json_files_alone(tmp_path: Path, monkeypatch) -> None:
    root, home = tmp_path / "small" / "texture", tmp_path / "mra"
    for seed, (base, mra) in enumerate([(30.0, 32.0), (36.0, 37.5), (33.0, 35.5)]):
        finish(root, "base", seed, base)
        folder = finish(root, "mra", seed, mra)
    found = arms.read(folder)
    assert found is not None and found["top1"] == 35.5 and found["test_a"] == 72.0 and found["kept_foreground"] == 97.0
    assert "mse" not in found
    home.mkdir()
    (home / "results.csv").write_text(",".join(results.COLUMNS) + "\n")
    monkeypatch.setattr(arms, "ARMS", dataclasses.replace(arms.ARMS, home=home))
    assert arms.main([str(root), "--record"]) == 0
    rows, problems = results.read(home)
    measured = [row for row in rows if not row["status"].startswith("not run")]
    left = (len(arms.ARMS.arms) - 2) + len(arms.ARMS.arms)  # of this set, and of the other one
    assert problems == [] and len(measured) == 5 and len(rows) == 5 + left
    claim = next(row for row in rows if row["id"] == "small-texture-mra-vs-base-top1")
    assert claim["status"].startswith("not testable at this size (3 seeds") and claim["minutes"] == "1.5"
    assert (claim["p"], claim["ci_low"], claim["ci_high"]) == ("0.02", "0.76", "3.24")  # paired: 2.0, 1.5, 2.5
    assert next(row for row in rows if row["metric"].startswith("top-1 on test A"))["status"] == "descriptive"
