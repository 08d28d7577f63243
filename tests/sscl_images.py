"""Small images and a run of sscl.main on them, for the tests of sscl."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sscl.main import main

CLASSES, EACH = 3, 16
SMALL = (
    "--img_size 16 --arch resnet10 --width 4 --stem cifar_pool --dim 8 --moco_k 32 --batch_labelled 4 --mu 2 "
    "--bn_splits 2 --moco_m 0.9 --lr 0.05 --lr_batch 0 --warmup_epochs 0 --lambda_u 1 --theta 0.34 --theta_on raw "
    "--labels_per_class 4 --pl_start 1 --proto_every 1 --num_nn 3 --da window --num_pos 2 --key_view weak --weak shift "
    "--workers 0 --threads 1 --log-every 1 --epochs 2 --cache"
).split()


def write_images(root: Path) -> Path:
    """Three classes of sixteen noisy images, and two of each for val: six steps an epoch with SMALL."""
    rng = np.random.default_rng(0)
    for i in range(CLASSES * (EACH + 2)):
        label, place = divmod(i, EACH + 2)
        noise = rng.integers(0, 120, (20, 20, 3)) + 60 * np.eye(3, dtype=np.int64)[label]
        path = root / ("train" if place < EACH else "val") / f"class{label}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.astype(np.uint8)).save(path)
    return root


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def train(data: Path, out: Path, *extra: str) -> list[dict]:
    """Run in this process; the rows of the log."""
    assert main([*SMALL, "--data", str(data), "--output-dir", str(out), *extra]) == 0
    return rows(out)
