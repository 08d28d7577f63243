"""What the mini runs of flat's README must have shown; called by test_readme.py on the folder that they wrote."""

import csv
import json
from pathlib import Path
from statistics import fmean


def check(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "flat/train/mini/log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss/cls" in row]  # an evaluation's row has no telemetry of its step
    first, last = fmean(row["loss/cls"] for row in rows[1:5]), fmean(row["loss/cls"] for row in rows[-5:])
    assert last < first - 0.8, f"the classifier's loss falls from {first:.2f} to {last:.2f} only"
    # 225 steps teach the decoder the mean of the targets (0.50), from 0.7 or more of its first weights
    at = fmean(row["loss/at"] for row in rows[-5:])
    assert rows[0]["loss/at"] > 0.6 and at < 0.54, f"the decoder's loss goes from {rows[0]['loss/at']} to {at:.3f}"
    result = json.loads((runs / "flat/train/mini/eval/episodes/result.json").read_text())
    for shots in (1, 5):
        key = f"{shots}shot-proto_l2"
        assert result[key] - result[f"{key}_ci"] > 45, f"{key}: {result[key]:.1f}, chance is 20"
    assert result["5shot-proto_l2"] > result["1shot-proto_l2"] and result["held_base_accuracy"] > 15
    with open(runs / "flat/predictions.csv", newline="") as handle:
        labelled = list(csv.DictReader(handle))
    right = fmean(Path(row["file"]).parent.name == row["class"] for row in labelled)
    assert len(labelled) == 8 * 25 and right > 0.3, f"{100 * right:.0f} % of {len(labelled)}, chance is 12.5"
