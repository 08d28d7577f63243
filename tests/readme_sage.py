"""What the mini runs of sage's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
from pathlib import Path
from statistics import fmean

from shared_utils import checkpoint


def check(runs: Path) -> None:
    def log(job: str) -> list[dict]:
        return [json.loads(line) for line in (runs / f"sage/{job}/mini/log.jsonl").read_text().splitlines()]

    def drop(rows: list[dict], name: str) -> float:
        return fmean(row[name] for row in rows[-5:]) / fmean(row[name] for row in rows[:5])

    evaluator, pretrain = log("evaluator"), log("pretrain")
    for rows in (evaluator, pretrain):
        assert rows[-1]["feat/std"] > 0.3, "the embeddings are collapsing"
        assert drop(rows, "loss1") < 0.9, "the loss of the two views does not fall"
    for name in ("loss_mse", "loss_f1", "loss_f7", "loss_f14", "loss_f28"):
        assert drop(pretrain, name) < 0.9, f"{name} does not fall"
    saved = checkpoint.load(runs / "sage/pretrain/mini/checkpoint.pth")
    stages = saved["gallery"]["stages"]
    errors = [float(stage["error"].mean()) for stage in stages]
    # the first is nearly blank, what follows starts as noise and gets better
    assert len(errors) == 5 and errors[-1] < 0.9 * errors[1], f"recovered images do not get better: {errors}"
    frozen = checkpoint.load(runs / "sage/evaluator/mini/checkpoint.pth")["state_dict"]["online_net.0.conv1.weight"]
    assert saved["state_dict"]["r_function.0.conv1.weight"].equal(frozen)
