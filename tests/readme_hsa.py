"""What the mini runs of hsa's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
import math
from pathlib import Path

from shared_utils import checkpoint


def check(runs: Path) -> None:
    pretrain = runs / "hsa/pretrain/mini"
    rows = [json.loads(line) for line in (pretrain / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < math.log(1 + 512) - 0.8, "the loss ends too close to log(1 + K)"
    assert rows[-1]["feat/std"] > 0.5, "the embeddings are collapsing"
    assert rows[-1]["sim/positive"] > rows[-1]["sim/negative"] + 0.3, "positives are no closer than negatives"
    saved = checkpoint.load(pretrain / "checkpoint.pth")
    assert saved["neighbours"]["epoch"] == 15 and tuple(saved["neighbours"]["index"].shape) == (1000, 5)
