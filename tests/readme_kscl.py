"""What the mini runs of kscl's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
import math
from pathlib import Path
from statistics import fmean

from shared_utils import checkpoint


def check(runs: Path) -> None:
    pretrain = runs / "kscl/pretrain/mini"
    rows = [json.loads(line) for line in (pretrain / "log.jsonl").read_text().splitlines()]
    course = [row["loss"] for row in rows if row["step"] > 8]  # the queue of 512 subspaces is full after 8 steps
    start, end = fmean(course[:5]), fmean(course[-5:])
    assert end < min(start - 0.3, math.log(1 + 512) - 0.8), f"the loss falls from {start:.2f} to {end:.2f} only"
    last = rows[-1]
    assert last["feat/std"] > 0.4, "the embeddings are collapsing"
    assert last["subspace/pos_sim"] > last["subspace/neg_sim"] + 0.2, "positives are no closer than negatives"
    assert last["subspace/pos_cos"] > 0.2, "queries point away from their keys"
    state = checkpoint.load(pretrain / "checkpoint.pth")["state_dict"]
    assert tuple(state["module.queue"].shape) == (5, 128, 512) and 1 <= int(state["module.queue_rank"].min())
