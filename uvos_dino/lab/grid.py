"""A control that looks at nothing: every frame cut into the same cells, scored like any segmentation.

python -m uvos_dino.lab.grid --basepath DAVIS --dataset DAVIS2017 --rows 3 --cols 3 --save_path FOLDER
python -m uvos_dino.lab.grid --basepath DAVIS --clusters 10 --save_path FOLDER      # or --like RUN-test/result.json

A method that finds objects has to score above it at the number of clusters that it uses.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser, natural, positive, runs_root
from shared_utils.run import cli, plain, provenance
from uvos_dino import evaluate
from uvos_dino.data import LAYOUTS, Video, open_videos, read_mask, said


def add_flags(p: argparse.ArgumentParser, default: str) -> None:
    """Flags of a control: how many clusters a sequence has, and where its results go."""
    a = p.add_argument
    a("--clusters", type=positive, help="K, the same in every sequence")
    a("--like", type=Path, help="result.json of an evaluation: in each sequence as many clusters as were found there")
    a("--seed", type=natural, default=0)
    a("--save_path", type=Path, default=runs_root() / default, help="folder of the results")
    a("--run_dir", type=Path, help="also leave what a training run leaves, config.json and a log without lines")
    evaluate.add_flags(p)


def numbers(args: argparse.Namespace, videos: Sequence[Video]) -> dict[str, int]:
    """{sequence: K}. UserError for neither or both flags, and for a sequence that --like does not hold."""
    if (args.clusters is None) == (args.like is None):
        raise UserError("give --clusters K, or --like RESULT.json, and not both")
    if args.clusters:
        return {video.name: args.clusters for video in videos}
    try:
        found = json.loads(args.like.read_text())["sequences"]
        return {video.name: max(1, int(found[video.name]["clusters"])) for video in videos}
    except OSError as error:
        raise UserError(f"--like {args.like}: {error.strerror}; evaluate that run first") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--like {args.like}: no result.json of an evaluation of these sequences ({error})") from None


def cells(count: int, height: int, width: int) -> np.ndarray:
    """`count` cells of nearly one size and nearly square in a frame of this size, as a small label map [h, w] int16.

    Rows are of equal height; those below have a cell more where the count does not divide.
    """
    rows = min(count, max(1, round(math.sqrt(count * height / width))))
    few, more = divmod(count, rows)
    lines, first = [], 0
    for row in range(rows):
        inside = few + (row >= rows - more)
        lines.append(first + np.arange(few * (few + 1)) * inside // (few * (few + 1)))
        first += inside
    return np.stack(lines).astype(np.int16)


def leave(args: argparse.Namespace, videos: Sequence[Video], started: float) -> int:
    """Score what lies in --save_path, and leave config.json and log.jsonl in --run_dir."""
    made = {"flags": plain(args), **provenance()}
    if args.run_dir:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        (args.run_dir / "config.json").write_text(json.dumps(made, indent=1) + "\n")
        (args.run_dir / "log.jsonl").write_text("")
    return evaluate.score(
        args, list(videos), args.save_path, {"minutes": round((time.time() - started) / 60, 2), **made}
    )


def save(args: argparse.Namespace, video: Video, labels: np.ndarray, clusters: int) -> None:
    """Labels [T, h, w] as an evaluation reads them."""
    checkpoint.save(args.save_path / f"{video.name}.pth", {"labels": torch.from_numpy(labels), "clusters": clusters})


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.lab.grid", description=__doc__.splitlines()[0])
    p.add_argument("--rows", type=positive, help="of cells, instead of a number of clusters")
    p.add_argument("--cols", type=positive)
    add_flags(p, "uvos_dino/grid")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    started = time.time()
    fixed = args.rows or args.cols
    if fixed and (args.clusters or args.like or not (args.rows and args.cols)):
        raise UserError("give --rows R --cols C, or --clusters K, or --like RESULT.json")
    videos = open_videos(args.dataset, args.basepath, args.split, args.sequences)
    print(f"  data: {said(args.dataset, args.basepath, args.split, videos)}")
    wanted: Mapping[str, int] = {} if fixed else numbers(args, videos)
    for video in videos:
        if fixed:
            shown = np.arange(args.rows * args.cols, dtype=np.int16).reshape(args.rows, args.cols)
        else:
            shape = read_mask(next(iter(video.masks.values())), LAYOUTS[args.dataset].binary).shape
            shown = cells(wanted[video.name], *shape)
        save(args, video, np.broadcast_to(shown, (len(video.frames), *shown.shape)).copy(), int(shown.max()) + 1)
    return leave(args, videos, started)


if __name__ == "__main__":
    cli(main)
