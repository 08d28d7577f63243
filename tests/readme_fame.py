"""What the mini runs of fame's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
from pathlib import Path


def check(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "fame/pretrain/mini/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60 and rows[-1]["feat/std"] > 0.2, "the embeddings are collapsing"
    assert rows[-1]["sim/positive"] > rows[-1]["sim/negative"] + 0.02, "positives are no closer than negatives"
    assert 0 <= rows[-1]["data_share"] < 1
    found = json.loads((runs / "fame/pretrain/mini/eval/finetune/result.json").read_text())
    assert found["acc1"] > found["chance"] + 15, f"fine-tuned: {found['acc1']:.1f}, chance is {found['chance']:.1f}"
    retrieved = json.loads((runs / "fame/pretrain/mini/eval/retrieve/result.json").read_text())
    assert retrieved["r1"] <= retrieved["r5"] <= retrieved["r50"] <= 100
    pictures = list((runs / "fame/cam").glob("*.png"))
    assert len(pictures) == 8
