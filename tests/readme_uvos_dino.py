"""What the mini runs of uvos_dino's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
from pathlib import Path


def check(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "uvos_dino/train/mini/log.jsonl").read_text().splitlines()]
    assert rows[0]["motion_loss"] > 0.8 and rows[-1]["motion_loss"] < 0.7, "the motion loss stays at its margin"
    start = rows[0]["probe/J"]  # after one step: still one cluster, as by chance
    assert rows[0]["probe/clusters"] < 2
    masks = runs / "uvos_dino/train/mini/eval/segment"
    result = json.loads((masks / "result.json").read_text())
    end = result["frame"]["J-Mean"]
    assert end > start + 30, f"J is {start:.1f} after one iteration and {end:.1f} at the end"
    assert 2 <= result["clusters"] <= 10, f"{result['clusters']} clusters a sequence"
    assert (masks / "frame/global_results-val.csv").is_file()
    assert (masks / "shape-val-00/00011.png").is_file()
