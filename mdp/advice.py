"""What pretraining says of small data, before it starts, and of what it has made, at its end."""

import argparse
from pathlib import Path
from shlex import quote

from torch import Tensor

from mdp.own import own_folders
from shared_utils import UserError

COLLAPSED = 0.05  # feat/std below it: 1 is spread over the sphere, 0 one point


def check_size(args: argparse.Namespace, images: int, world: int) -> None:
    """UserError where the data is smaller than a batch."""
    if images >= args.batch_size:
        return
    fits = images // world * world
    cure = f"take --batch-size {fits} --bank-size {fits}, or more images" if fits >= 2 * world else "add images"
    raise UserError(f"--batch-size {args.batch_size}: the data has {images} images; {cure}")


def larger_bank(args: argparse.Namespace, images: int) -> str:
    """A caution for the preflight: prototypes would average over embeddings of earlier epochs."""
    if args.objective != "contrast" or args.bank_size <= images:
        return ""
    fits = images // args.batch_size * args.batch_size
    return f"; CAUTION: more than the data's {images}, so embeddings are several epochs old: --bank-size {fits}"


def collapse(last: dict[str, Tensor | float]) -> list[str]:
    """Lines at the end of a run whose embeddings were all the same in its last logged step."""
    std = float(last.get("feat/std", 1.0))
    if std >= COLLAPSED:
        return []
    return [f"COLLAPSED: all pixels have one embedding (feat/std {std:.3f}); try a lower --lr, or another --init"]


def hints(args: argparse.Namespace, out: Path) -> list[str]:
    """What can come next, as commands for this run's checkpoint and data."""
    file, data = quote(str(out / "checkpoint.pth")), f"--data-root {quote(str(args.data_root))}"
    lines = [
        f"python -m mdp.finetune --datasets {quote(f'{name}={folder}')} --checkpoint {file}"
        for name, folder in own_folders(args.data).items()
        if name in args.datasets.split(",")
    ][:1]
    if args.objective == "contrast":
        lines.append(f"python -m mdp.eval_seg --protocol prototype --checkpoint {file} {data}")
    lines.append(f"python -m mdp.predict PHOTO_OR_FOLDER --pretrained {quote(str(out))} --out maps")
    lines.append(f"python -m mdp.lab.export_mmseg {file} --out backbone_and_head.pth")
    return [f"next: {line}" for line in lines]
