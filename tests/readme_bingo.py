"""What the mini runs of bingo's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
from pathlib import Path
from statistics import fmean

import numpy as np


def check(runs: Path) -> None:
    bingo = runs / "bingo"
    teacher, student = (
        [json.loads(line) for line in (bingo / name / "mini/log.jsonl").read_text().splitlines()]
        for name in ("teacher", "pretrain")
    )
    # The queue starts with random keys, so the loss is compared from where it is full: 512 keys are 8 steps.
    for name, rows, drop, spread in (("teacher", teacher, 0.3, 0.5), ("student", student, 0.15, 0.2)):
        course = [row["loss"] for row in rows if row["step"] > 8]
        start, end = fmean(course[:5]), fmean(course[-5:])
        assert end < start - drop, f"the {name}'s loss falls from {start:.2f} to {end:.2f} only"
        assert rows[-1]["feat/std"] > spread, f"the {name}'s embeddings are collapsing"
        assert rows[-1]["sim/positive"] > rows[-1]["sim/negative"] + 0.1, f"{name}: positives no closer than negatives"

    bags = np.load(bingo / "imgs_corr/mini.npy", allow_pickle=False)
    assert bags.shape == (1000, 5) and bags.dtype == np.int64 and bags.min() >= 0 and bags.max() < 1000
    assert not (bags == np.arange(1000)[:, None]).any(), "an image is in its own bag"

    linear = json.loads((bingo / "pretrain/mini/eval/lincls/result.json").read_text())
    assert linear["linear"] > 13, f"the linear evaluation is near chance, 10 %: {linear['linear']}"
    (knn,) = bingo.glob("pretrain/mini/eval/knn/result.json")
    scores = json.loads(knn.read_text())
    assert scores["bag_gap"] > 0.02, f"the student does not keep the teacher's bags together: {scores}"
