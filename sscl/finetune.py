"""Baseline: fine-tune a pretrained backbone on the labelled images alone: python -m sscl.finetune --pretrained RUN

Small learning rate for the backbone, large one for the new classifier, as the published MoCo v2 + fine-tune rows have
it. The labelled images are chosen by the same flags as in sscl.main.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shared_utils import UserError, distributed, feed
from shared_utils.augment import plain
from shared_utils.data import EpochSampler, ImageList
from shared_utils.evaluation import add_data_flags, open_splits, share, stream, subset, topk, write_result
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, natural, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.run import Run, cli
from sscl.data import augmentations, labelled_and_tests, labelled_images, split_hash
from sscl.weights import add_network_flags, load_encoder


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sscl.finetune", description=(__doc__ or "").splitlines()[0])
    add_network_flags(p.add_argument)
    add_data_flags(p)
    a = p.add_argument
    a("--labelled", type=Path, help="in place of --data_dir: CLASS/*.jpg of images with labels, all taken; "
      "the test images are --val_dir")  # fmt: skip
    a("--split_file", type=Path, help="list of the labelled images, as SimCLR's 1percent.txt")
    a("--labels_per_class", type=natural, default=0, help="so many of each class, drawn by --split")
    a("--split", type=natural, default=0)
    a("--fraction", type=float, default=0.01, help="this share of each class, where neither of the above is given")
    a("--weak", choices=["rrc", "shift"], default="rrc", help="augmentation")
    add_aug_flag(p)
    a("--no_flip", action="store_true", help="no mirror images (digits)")
    a("--min_scale", type=float, default=0.2, help="least area of a random resized crop")
    a("--lr", type=float, default=0.001, help="of the backbone")
    a("--lr_head", type=float, default=0.1, help="of the new classifier")
    a("--epochs", type=positive, default=50, help="of the labelled images")
    a("--drops", default="30,40", help="epochs at which both rates fall to a tenth")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=1e-4)
    a(
        "--batch_size",
        type=positive,
        default=256,
        help="images a step, all processes together; at most the labelled ones",
    )
    add_run_flags(p, "sscl/finetune", "pretrained")
    p.set_defaults(split_sha256="", no_labels=False, backbone_sha256="")
    return p


def check_flags(args: argparse.Namespace) -> list[int]:
    """The epochs of --drops. UserError for flags out of range, before anything is loaded."""
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min_scale {args.min_scale}: must lie above 0 and up to 1")
    if args.lr < 0 or not args.lr_head > 0:
        raise UserError("--lr must not be negative and --lr_head must be above 0")
    try:
        return [int(text) for text in args.drops.split(",") if text]
    except ValueError:
        raise UserError(f"--drops {args.drops}: must be epochs such as 30,40") from None


def open_images(args: argparse.Namespace) -> tuple[ImageList, ImageList, list[int]]:
    """Training and test images, and which of the former are labelled. UserError: flags that contradict --labelled."""
    if not args.labelled:
        train, val = open_splits(args)
        args.data = Path(args.data_dir)
        return train, val, labelled_images(args, train)
    others = ("data_dir", "dataset", "split_file", "labels_per_class", "split", "fraction", "per_class")
    if wrong := [name for name in others if name in args.given]:
        raise UserError(f"--labelled names the labelled images, all of them: leave --{wrong[0]} out")
    train, val = labelled_and_tests(args, args.labelled)
    chosen = list(range(len(train)))
    args.split_sha256 = split_hash(chosen)
    return train, val, chosen


def fit_batch(args: argparse.Namespace, labelled: int, world: int) -> None:
    """A batch becomes at most the labelled images. UserError: too few for a process."""
    args.batch_size = min(args.batch_size, labelled) // world * world
    if args.batch_size // world < 2:
        raise UserError(
            f"--batch_size gives each of {world} processes fewer than two of the {labelled} labelled images; raise it"
        )


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    drops = check_flags(args)
    run = Run(args, "sscl", "finetune")
    train, val, chosen = open_images(args)
    fit_batch(args, len(chosen), run.world)
    classes = len(train.classes)
    labelled = subset(train, chosen)
    labelled.transform = augmentations(args.img_size, args.weak, "moco", not args.no_flip, args.min_scale)["weak"]
    sampler = EpochSampler(len(labelled), args.batch_size // run.world, args.seed, run.rank, run.world, least=2)
    loader = run.loader(feed.keyed(labelled, args.seed, args.aug_backend, run.device), sampler)

    encoder, report = load_encoder(args, None)
    head = nn.Linear(encoder.backbone.num_features, classes)
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(encoder.backbone, head)
    place(network, run.device).train()
    net = distributed.wrap(network)
    groups: list[dict[str, Any]] = [
        {"params": list(encoder.backbone.parameters()), "peak": args.lr},
        {"params": list(head.parameters()), "peak": args.lr_head},
    ]
    fused = run.device.type == "cuda" or None
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.wd, fused=fused)
    run.track(state_dict=network, optimizer=optimizer)
    run.reads(labelled, val)
    run.preflight(
        {
            "data": f"{args.data_dir}: {len(chosen)} of {len(train)} images labelled (sha256 {args.split_sha256}), "
            f"{len(val)} val images, {classes} classes",
            "backbone": report,
            "batch": f"{args.batch_size}, {sampler.steps_per_epoch} steps an epoch, {args.epochs} epochs",
            "learning rate": f"{args.lr} backbone, {args.lr_head} classifier, a tenth after epochs {args.drops}",
            "expected initial loss": f"about log {classes} = {math.log(classes):.2f}",
        }
    )
    for epoch, batch in run.batches(loader, sampler, args.epochs):
        fall = 0.1 ** sum(epoch >= drop for drop in drops)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * fall
        x = follow(batch[0], network)
        y = batch[1].to(run.device, non_blocking=True)
        with run.autocast():
            logits = net(x).float()
        loss = F.cross_entropy(logits, y) * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched = {}
        if run.log_due():
            watched["acc1"] = 100 * float(topk(logits.detach(), y, (1,))[0]) / len(y)
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=optimizer.param_groups[1]["lr"], **watched)
    top1, top5 = accuracy(run, network, val)
    write_result(run.dir, {"top1": top1, "top5": top5, "labelled": len(chosen), "pretrained": args.pretrained})
    run.finish()
    return 0


def accuracy(run: Run, network: nn.Module, images: ImageList) -> list[float]:
    """Top-1 and top-5 in per cent; each process predicts its share."""
    images.transform = plain(run.args.img_size)
    distributed.same_buffers(network)
    network.eval()

    def logits(x: torch.Tensor) -> list[torch.Tensor]:
        with run.autocast():
            return [network(x)]

    hits = torch.zeros(2, dtype=torch.float64)
    if len(range(*share(len(images)))):
        for out, labels in stream(logits, images, run.device, run.args.batch_size, run.args.workers):
            hits += topk(out[0], labels)
    return (100 * distributed.all_sum(hits.to(run.device)).cpu() / len(images)).tolist()


if __name__ == "__main__":
    cli(main)
