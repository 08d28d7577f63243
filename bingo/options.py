"""Flags that several scripts of this folder have, and what they mean: the data, the schedule."""

import argparse
import math
import os
from pathlib import Path
from shlex import quote

from shared_utils import UserError
from shared_utils.data import ImageList, training_folder
from shared_utils.flags import Parser, ints, natural, positive
from shared_utils.init import HEADS

DROP = (*HEADS, "_fc.*")  # of a file for --init: EfficientNet's classifier too


def add_data_flags(p: Parser) -> None:
    """--data_dir holds train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet, or images of one's own."""
    a = p.add_argument
    a("--data_dir", type=Path, default=os.environ.get("DATA_ROOT", "data"), help="holds train/CLASS/*.jpg, "
      "or images of your own: class folders, or files without labels")  # fmt: skip
    a("--img_size", type=positive, default=224, help="pixels of a crop")
    a("--per_class", type=natural, default=0, help="first so many training images of each class; 0: all")
    a("--cache", action="store_true", help="decode all images once and keep them in memory")


def add_schedule_flags(p: Parser, init_lr: float, end_epoch: int, schedule: str) -> None:
    """The release's flags of the optimiser; momentum and weight decay stand with each script."""
    a = p.add_argument
    a("--init_lr", "--lr", type=float, default=init_lr, help="learning rate of the first epoch")
    a("--decay_method", choices=["step", "cos"], default="cos", help="by epoch: cosine to 0, or by --schedule")
    a("--schedule", type=ints, default=schedule, help="epochs at which `step` multiplies by --lr_decay")
    a("--lr_decay", type=float, default=0.1)
    a(
        "--end_epoch",
        "--epochs",
        type=natural,
        default=end_epoch,
        help="epochs of training; 0: none, the network as it was initialised is stored",
    )


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of a whole epoch (release utils.py): no warm-up, cosine to 0 or steps."""
    if args.decay_method == "cos":
        return args.init_lr * 0.5 * (1 + math.cos(math.pi * epoch / args.end_epoch))
    return args.init_lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)


def train_images(args: argparse.Namespace) -> ImageList:
    """The training images in the order that bags refer to: sorted classes, sorted files."""
    return training_folder(args.data_dir, args.per_class, args.cache)


def next_command(args: argparse.Namespace, images: ImageList, folder: Path) -> str:
    """The evaluation of what a run wrote into `folder`; network and image size are in the checkpoint."""
    weights = f"--pretrained {quote(f'{folder}/checkpoint.pth')}"
    if not images.has_labels:
        out = quote(f"{folder}/backbone.pth")
        return f"backbone: python -m bingo.lab.export_detection {weights} --format torchvision --out {out}"
    data = f"--data_dir {quote(str(args.data_dir))}" + f" --per_class {args.per_class}" * bool(args.per_class)
    return f"evaluate: python -m bingo.main_knn {weights} {data}"


def check_batch(batch_size: int, world: int, splits: int) -> None:
    """UserError unless the batch divides over the processes and their batch-norm splits, two images each at least."""
    if batch_size % (world * splits):
        raise UserError(f"--batch_size {batch_size} does not divide over {world} processes x {splits} --bn_splits")
    if batch_size // (world * splits) < 2:
        raise UserError(f"--batch_size {batch_size} leaves fewer than 2 images for a batch norm; raise it")
