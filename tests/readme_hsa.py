"""What the mini runs of hsa's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
import math
from pathlib import Path
from statistics import fmean

from shared_utils import checkpoint


def check(runs: Path) -> None:
    pretrain = runs / "hsa/pretrain/mini"
    rows = [json.loads(line) for line in (pretrain / "log.jsonl").read_text().splitlines()]
    course = [row["loss"] for row in rows if row["step"] > 8]  # the queue of 512 keys is full after 8 steps
    start, end = fmean(course[:5]), fmean(course[-5:])
    assert end < min(start - 0.3, math.log(1 + 512) - 0.8), f"the loss falls from {start:.2f} to {end:.2f} only"
    assert rows[-1]["feat/std"] > 0.5, "the embeddings are collapsing"
    assert rows[-1]["sim/positive"] > rows[-1]["sim/negative"] + 0.3, "positives are no closer than negatives"
    saved = checkpoint.load(pretrain / "checkpoint.pth")
    assert saved["neighbours"]["epoch"] == 5 and tuple(saved["neighbours"]["index"].shape) == (1000, 5)
