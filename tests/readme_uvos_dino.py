"""What the mini runs of uvos_dino's README must have shown; called by test_readme.py on the folder that they wrote."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

MASKS = Path(__file__).resolve().parents[1] / "data/mini/davis/Annotations/480p/shape-val-00"


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

    # Masks of a clip in two windows, without its annotation: one number is the shape, from the first frame to the last.
    own = runs / "uvos_dino/segment"
    found, truth = (
        np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
        for folder in (own / "shape-val-00", MASKS)
    )
    J = max(((found == n) & (truth > 0)).sum() / ((found == n) | (truth > 0)).sum() for n in np.unique(found))
    assert found.shape == truth.shape and J > 0.6, f"J of the best number is {J:.2f}"
    assert (own / "shape-val-00.mp4").stat().st_size > 1000 and (own / "shape-val-00.csv").is_file()
