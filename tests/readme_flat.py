"""What the mini runs of flat's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
from pathlib import Path
from statistics import fmean


def check(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "flat/train/mini/log.jsonl").read_text().splitlines()]
    for name, fall in (("loss/cls", 0.8), ("loss/at", 0.03)):  # both the classifier and the decoder learn
        course = [row[name] for row in rows]
        start, end = fmean(course[1:5]), fmean(course[-5:])
        assert end < start - fall, f"{name} falls from {start:.2f} to {end:.2f} only"
    result = json.loads((runs / "flat/eval/mini/result.json").read_text())
    for shots in (1, 5):
        key = f"{shots}shot-proto_l2"
        assert result[key] - result[f"{key}_ci"] > 45, f"{key}: {result[key]:.1f}, chance is 20"
    assert result["5shot-proto_l2"] > result["1shot-proto_l2"] and result["held_base_accuracy"] > 15
