"""What the mini runs of mdp's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
import math
from pathlib import Path


def check(runs: Path) -> None:
    pretrain = runs / "mdp/pretrain/mini"
    rows = [json.loads(line) for line in (pretrain / "log.jsonl").read_text().splitlines()]
    classes = rows[-1]["proto/valid"]
    assert classes == 15
    assert rows[-1]["loss"] < 0.7 * math.log(classes), "the pretraining loss ends too close to log|V|"

    tuned = runs / "mdp/finetune/mini"
    early = {
        name: json.loads((tuned / name / "result.json").read_text())["early"]["mIoU"]
        for name in ("mini-seed0", "mini-seed0-scratch")
    }
    assert early["mini-seed0"] > early["mini-seed0-scratch"] + 3, f"pretraining does not help: {early}"

    photos = list((runs / "mdp/maps/labels").rglob("*.png"))
    shares = (runs / "mdp/maps/shares.csv").read_text().splitlines()
    assert len(photos) == len(shares) - 1 > 10 and shares[0].startswith("file,road,sidewalk,")

    (evaluation,) = runs.glob("mdp/pretrain/mini/eval/prototype/eval.json")
    scores = json.loads(evaluation.read_text())["results"]
    # One guess for every pixel of 15 classes scores below 7; the nearest prototype must know far more.
    assert set(scores) == {"voc val", "ade val"} and all(score["mIoU"] > 10 for score in scores.values()), scores
