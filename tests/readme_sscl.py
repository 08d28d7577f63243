"""What the mini runs of sscl's README must have shown; called by test_readme.py on the folder that they wrote."""

import csv
import json
from pathlib import Path
from statistics import fmean

from shared_utils import checkpoint


def check(runs: Path) -> None:
    def log(job: str) -> list[dict]:
        return [json.loads(line) for line in (runs / f"sscl/{job}/mini/log.jsonl").read_text().splitlines()]

    rows = log("train")
    first, last = fmean(row["loss/x"] for row in rows[:5]), fmean(row["loss/x"] for row in rows[-5:])
    assert first > 2 and last < 0.5, f"the loss of labelled images falls from {first:.2f} to {last:.2f} only"
    assert all(row["loss/u"] == 0 for row in rows if row["epoch"] < 2), "pseudo-labels count before --pl_start"
    assert rows[-1]["pl/coverage"] > 0.3 and rows[-1]["neighbours/num_pos"] > 1, "the exchange has not started"
    cosine = [row["proto/mean_offdiag_cos"] for row in rows]
    assert cosine[0] > 0.9 and cosine[-1] < 0.5, f"prototypes do not part: {cosine[0]} to {cosine[-1]}"
    state = checkpoint.load(runs / "sscl/train/mini/checkpoint.pth")["state_dict"]
    assert int(state["proto_epoch"]) == 8 and bool((state["queue_index"] >= 0).all())
    assert 0 < int(state["queue_labelled"].sum()) < 256

    moco = log("moco")
    assert moco[-1]["loss/x"] == moco[-1]["loss/u"] == 0 and moco[-1]["loss/c"] < 4.7, moco[-1]
    results = runs / "sscl/train/mini/eval"
    heads, feats = (json.loads((results / job / "result.json").read_text()) for job in ("cls", "features"))
    assert {"top1", "ema_top1", "raw@50", "aligned@50", "calib@50"} <= set(heads) and heads["unlabelled"] == 960
    assert feats["linear"] > 15 and feats["5way_5shot"] - feats["5way_5shot_ci"] > 22, feats  # chance: 10 and 20
    assert json.loads((runs / "sscl/moco/mini/eval/finetune/result.json").read_text())["labelled"] == 40
    with open(runs / "sscl/predictions.csv", newline="") as handle:
        predicted = list(csv.DictReader(handle))
    right = sum(Path(row["file"]).parent.name == row["class"] for row in predicted)
    assert abs(100 * right / len(predicted) - heads["top1"]) < 1, "the CSV is not what the evaluation counts"
