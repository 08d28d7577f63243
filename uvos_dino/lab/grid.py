"""A control that looks at nothing: every frame cut into the same ROWS x COLS cells, scored like any segmentation.

python -m uvos_dino.lab.grid --basepath DAVIS --dataset DAVIS2017 --rows 3 --cols 3 --save_path FOLDER

A method that finds objects has to score above it at the number of clusters that it uses.
"""

import argparse
from pathlib import Path

import torch

from shared_utils import checkpoint
from shared_utils.flags import Parser, positive, runs_root
from shared_utils.run import cli
from uvos_dino import evaluate
from uvos_dino.data import open_videos, said


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.lab.grid", description=__doc__.splitlines()[0])
    p.add_argument("--rows", type=positive, default=3)
    p.add_argument("--cols", type=positive, default=3)
    p.add_argument("--save_path", "--output-dir", type=Path, default=runs_root() / "uvos_dino/grid")
    evaluate.add_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    videos = open_videos(args.dataset, args.basepath, args.split, args.sequences)
    print(f"  data: {said(args.dataset, args.basepath, args.split, videos)}")
    cells = torch.arange(args.rows * args.cols, dtype=torch.int16).view(args.rows, args.cols)
    for video in videos:
        labels = cells.expand(len(video.frames), -1, -1).clone()  # [T, rows, cols]
        checkpoint.save(args.save_path / f"{video.name}.pth", {"labels": labels, "clusters": cells.numel()})
    return evaluate.score(args, videos, args.save_path, {})


if __name__ == "__main__":
    cli(main)
