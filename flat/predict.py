"""Label photos by a few of each class: python -m flat.predict --pretrained RUN --support DIR --query DIR

An episode of your own: DIR/CLASS/* of --support, as many photos of a class as there are, and every photo below --query
gets one of these classes. The classifier is that of the evaluation (flat.test): the head of the training method, fitted
on the features of the frozen network; backbone and size come from the checkpoint.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flat import data
from flat.backbone import MODELS
from flat.methods.baselinefinetune import HEADS, fit
from flat.options import METHODS
from flat.save_features import augmented_copies, extract, extract_augmented, load
from flat.test import default_head
from shared_utils import UserError, distributed
from shared_utils.data import ImageList, flat_folder, image_folder, per_class, tell
from shared_utils.flags import Parser, add_machine_flags, at_least, natural
from shared_utils.layout import place
from shared_utils.predictions import write_csv
from shared_utils.run import cli, set_threads

# The most support images of heads that solve for a number an image (lr: an image and class).
MOST = {"finetune": 10_000, "finetune_cosine": 10_000, "ridge": 10_000, "lr": 6_000}
VALUES = 1 << 26  # numbers of the queries in memory at a time: 512 MiB in float64


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="flat.predict", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("--pretrained", "--checkpoint", type=Path, required=True, help="run of flat.train, its checkpoint.pth, or a file "
      "of CloserLookFewShot")  # fmt: skip
    a("--support", type=Path, required=True, help="folder with a folder of photos for each class")
    a("--query", type=Path, required=True, help="folder of the photos to label, at any depth, or one photo; what "
      "supports a class is left out")  # fmt: skip
    a("--out", type=Path, default=Path("predictions.csv"), help="file, class, confidence of each photo")
    a("--shots", type=natural, default=0, help="first so many photos of each class in --support; 0: all")
    a("--eval_head", choices=HEADS, help="default: that of the training method, as in flat.test")
    a("--aug_support", type=at_least(-1), default=-1, help="so many augmented copies of a support photo in its place; "
      "-1: 5 after --recipe rfs, else 0")  # fmt: skip
    a("--seed", type=natural, default=0, help="of the heads that are trained by SGD")
    a("--model", choices=MODELS, help="this and the following default to the checkpoint's own flags")
    a("--width", type=natural)
    a("--image_size", "--img_size", type=natural)
    a("--mean_std", choices=list(data.MEAN_STD))
    a("--method", choices=METHODS)
    add_machine_flags(p, amp="none")
    return p


def read_query(path: Path, support: ImageList) -> ImageList:
    """The photos to label, without those that support a class. UserError: none."""
    images = ImageList([(path, -1)], []) if path.is_file() else flat_folder(path)
    taken = {os.path.realpath(file) for file in support.paths()}  # of a link in a circle `Path.resolve` raises
    left = [i for i, file in enumerate(images.paths()) if os.path.realpath(file) not in taken]
    if not left:
        raise UserError(f"{path}: holds the photos of --support and no others; --shots K leaves all but K of a class")
    return images.take(left)


def classify(head: str, x: Tensor, y: Tensor, q: Tensor, seed: int, device: torch.device) -> Tensor:
    """Logits [m, W] on the CPU of query features q [m, D] by support features x [n, D] of classes y [n]: episode 0."""
    x, y = x[None].to(device), y.to(device)
    rows = max(1, VALUES // sum(x.shape[1:]))  # a head is fitted anew, to the same weights, for each part
    parts = [fit(head, x, y, part[None].to(device), np.zeros(1, np.int64), seed)[0].cpu() for part in q.split(rows)]
    return torch.cat(parts)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    support = per_class(image_folder(args.support), args.shots)
    if len(support.classes) < 2:
        raise UserError(f"{args.support}: one class folder, {support.classes[0]}; at least two are needed")
    if args.shots > (fewest := int(support.labels.bincount().min())):
        name = support.classes[int(support.labels.bincount().argmin())]
        raise UserError(
            f"--shots {args.shots}: {name} in --support has {fewest} photos; give at most so many, or 0: all"
        )
    query = read_query(args.query, support)
    encoder, _, flags, _ = load(args.pretrained, args)
    head = args.eval_head or default_head(flags.method, flags.recipe)
    copies = augmented_copies(args.aug_support, flags.recipe)
    size = len(support) * max(1, copies) * (len(support.classes) if head == "lr" else 1)
    if size > MOST.get(head, size):
        raise UserError(
            f"--support: {len(support)} photos of {len(support.classes)} classes are too many for --eval_head {head}; "
            "--shots K takes the first K of each class, --eval_head proto_l2 any number"
        )
    counts = support.labels.bincount().tolist()
    each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    print(f"flat/predict: {len(support)} photos of {len(counts)} classes, {each} each, by {head} on features of "
          f"{flags.model} at {flags.image_size} pixels, {args.pretrained}", flush=True)  # fmt: skip
    for name, unread in (("--support", support.unread), ("--query", query.unread)):
        if unread:
            print(f"  not read: {tell(unread)} in {name}", flush=True)

    place(encoder, device)
    q = extract(encoder, query, flags, device)  # [m, D]
    if copies:
        x = extract_augmented(encoder, support, flags, device, copies).flatten(0, 1)  # [n A, D]
    else:
        x = extract(encoder, support, flags, device)
    logits = classify(head, x, support.labels.repeat_interleave(max(1, copies)), q, args.seed, device)
    files = query.paths()
    print(f"  {write_csv(args.out, args.query, files, support.classes, logits.softmax(1))}", flush=True)
    known = [(i, support.classes.index(f.parent.name)) for i, f in enumerate(files) if f.parent.name in support.classes]
    if known:
        right = sum(int(logits[i].argmax()) == label for i, label in known)
        print(f"  {right} of the {len(known)} photos in folders of these names went to the class of theirs", flush=True)
    return 0


if __name__ == "__main__":
    cli(main)
