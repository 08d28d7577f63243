"""What the mini runs of mra's README must have shown; called by test_readme.py on the folder that they wrote."""

import csv
import json
from pathlib import Path
from statistics import fmean

from PIL import Image


def check(runs: Path) -> None:
    def log(job: str) -> list[dict]:
        return [json.loads(line) for line in (runs / f"mra/{job}/mini/log.jsonl").read_text().splitlines()]

    def result(job: str) -> dict:
        return json.loads((runs / f"mra/{job}/mini/result.json").read_text())

    pretrain = [row["loss"] for row in log("pretrain")]
    assert fmean(pretrain[-3:]) < 1.0 < pretrain[0], f"the autoencoder's loss goes from {pretrain[0]} to {pretrain[-1]}"
    supervised = [row["loss"] for row in log("supervised")]
    assert fmean(supervised[-5:]) < fmean(supervised[:5]), "the classifier's loss does not fall"
    assert 0 <= [row["mra/entropy"] for row in log("supervised") if "mra/entropy" in row][-1] <= 1
    assert result("supervised")["test"] == "test_b" and len(result("fixmatch")["mae_md5"]) == 32
    few = result("fewshot")
    assert few["5shot"] - few["5shot_ci"] > 25, f"5-shot accuracy {few['5shot']:.1f}, chance is 20"
    occlusion = json.loads((runs / "mra/supervised/mini/eval/occlusion/result.json").read_text())
    assert set(occlusion["curves"]) == {"random", "salient", "nonsalient"}
    # random masks keep 21 of 36 patches; what the attention keeps is printed whatever it is
    assert 50 < occlusion["kept_random"] < 66 and 0 <= occlusion["kept_foreground"] <= 100
    assert Image.open(runs / "mra/occlusion/mini/mra.png").width == 2 * (8 * 50 + 2)
    made = Image.open(next((runs / "mra/augmented/ring").iterdir()))
    assert made.size == (48, 48) and len(list((runs / "mra/augmented").rglob("*.png"))) == 1000
    with open(runs / "mra/predictions.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    right = [row["file"].split("/")[0] == row["class"] for row in rows]
    assert len(rows) == 1000 and abs(100 * fmean(right) - result("fixmatch")["top1"]) < 1e-6, (
        "not what the run has measured"
    )
