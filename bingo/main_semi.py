"""Semi-supervised evaluation: fine-tune the whole network on 1 % or 10 % of the labels (paper 2107.01691; no release).

    python -m bingo.main_semi --pretrained runs/bingo/pretrain/paper/checkpoint.pth --data_dir imagenet \
        --labels 1percent.txt

The protocol is not in the release; the defaults are inferred from the common one: SGD without weight decay, cosine, a
small learning rate for the backbone and a much larger one for the new classifier. The last epoch counts.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bingo.arch import CHOICES, STEMS, build
from shared_utils import UserError, distributed, feed
from shared_utils.augment import linear_train, plain
from shared_utils.data import EpochSampler, ImageList
from shared_utils.evaluation import (
    add_data_flags,
    add_network_flags,
    labelled_indices,
    load_backbone,
    open_splits,
    stream,
    subset,
    topk,
    write_result,
)
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.run import Run, cli

STORED = ("s_{}", "{}")  # names of the network's flags in a student's checkpoint, else in a teacher's
# [inferred] by share of labels: epochs, learning rate of the backbone, factor of the classifier's.
DEFAULTS = {"1%": (60, 0.02, 100.0), "10%": (30, 0.01, 20.0)}


def get_parser() -> Parser:
    p = Parser(prog="bingo.main_semi", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_network_flags(p, CHOICES, STEMS, "resnet18")
    add_data_flags(p)
    add_aug_flag(p)
    a(
        "--labels",
        type=Path,
        help="list of the labelled images, as SimCLR's 1percent.txt (default: drawn by --fraction)",
    )
    a("--fraction", type=float, default=0.01, help="share of each class that is labelled, drawn by --seed")
    a(
        "--init_lr",
        "--lr",
        type=float,
        help="of the backbone (default: .02 below 5 %% of the labels, else .01) [inferred]",
    )
    a("--head_lr_mult", type=float, help="the classifier's learning rate over it (default: 100, else 20) [inferred]")
    a("--end_epoch", "--epochs", type=positive, help="(default: 60, else 30) [inferred]")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=0.0)
    a(
        "--batch_size",
        type=positive,
        default=256,
        help="images a step, all processes together; at most the labelled ones",
    )
    add_run_flags(p, "bingo/semi", "pretrained")
    return p


def resolve(args: argparse.Namespace, labelled: int, total: int, world: int) -> None:
    """Fill in what depends on the labelled images, a batch at most; UserError for flags out of range."""
    epochs, lr, mult = DEFAULTS["1%" if labelled < 0.05 * total else "10%"]
    args.end_epoch = epochs if args.end_epoch is None else args.end_epoch
    args.init_lr = lr if args.init_lr is None else args.init_lr
    args.head_lr_mult = mult if args.head_lr_mult is None else args.head_lr_mult
    if not args.init_lr > 0 or not args.head_lr_mult > 0:
        raise UserError("--init_lr and --head_lr_mult must be above 0")
    if args.batch_size % world or args.batch_size // world < 2:
        raise UserError(f"--batch_size {args.batch_size} does not give each of {world} processes the same 2 or more")
    if labelled // world < 2:
        raise UserError(
            f"{labelled} labelled images are fewer than two for each of {world} processes: raise --fraction, or give a "
            "longer list as --labels"
        )
    args.batch_size = min(args.batch_size, labelled // world * world)


def classifier(encoder: Any, classes: int) -> Any:
    """The network with a new linear layer as `fc`, N(0, .01) and 0."""
    encoder.fc = nn.Linear(encoder.num_features, classes)
    nn.init.normal_(encoder.fc.weight, 0, 0.01)
    nn.init.zeros_(encoder.fc.bias)
    return encoder


def finetune(run: Run, network: Any, images: ImageList, facts: dict[str, Any]) -> None:
    """Train all of `network` on labelled images, new or from where the run was stopped."""
    args = run.args
    images.transform = linear_train(args.img_size, args.aug_backend)
    sampler = EpochSampler(len(images), args.batch_size // run.world, args.seed, run.rank, run.world, least=2)
    loader = run.loader(feed.keyed(images, args.seed, args.aug_backend, run.device), sampler)
    head = list(network.fc.parameters())
    body = [p for name, p in network.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": body, "scale": 1.0}, {"params": head, "scale": args.head_lr_mult}]
    optimizer = torch.optim.SGD(groups, args.init_lr, args.momentum, weight_decay=args.wd)
    net = distributed.wrap(network)
    run.track(state_dict=network, optimizer=optimizer)
    steps = sampler.steps_per_epoch
    run.reads(images)
    run.preflight(
        {
            **facts,
            "batch": f"{args.batch_size} x {steps} steps an epoch, {args.end_epoch} epochs",
            "learning rate": f"{args.init_lr} backbone, {args.init_lr * args.head_lr_mult} classifier, cosine to 0",
            "expected initial loss": f"about log {len(images.classes)} = {math.log(len(images.classes)):.2f}",
        }
    )
    network.train()
    for _, batch in run.batches(loader, sampler, args.end_epoch):
        lr = args.init_lr * (1 + math.cos(math.pi * run.step / (steps * args.end_epoch))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        x = follow(batch[0], network)
        target = batch[1].to(run.device, non_blocking=True)
        with run.autocast():
            logits = net(x).float()
        loss = F.cross_entropy(logits, target) * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched = {}
        if run.log_due():  # the GPU is waited for
            watched["acc1"] = 100 * float(topk(logits.detach(), target, (1,))[0]) / len(target)
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, **watched)


def predict(run: Run, network: Any, images: ImageList) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, classes] and labels of this process's share of the images, batch by batch.

    All processes predict with the network that the checkpoint holds, that of process 0.
    """
    images.transform = plain(run.args.img_size, run.args.aug_backend)
    distributed.same_buffers(network)
    network.eval()

    def logits(x: Tensor) -> list[Tensor]:
        with run.autocast():
            return [network(x)]

    for out, labels in stream(logits, images, run.device, run.args.batch_size, run.args.workers):
        yield out[0], labels


def accuracy(run: Run, network: Any, images: ImageList) -> list[float]:
    """Top-1 and top-5 in per cent."""
    hits = torch.zeros(2, dtype=torch.float64)
    for logits, labels in predict(run, network, images):
        hits += topk(logits, labels)
    return (100 * distributed.all_sum(hits.to(run.device)).cpu() / len(images)).tolist()


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "bingo", "semi")
    train, val = open_splits(args)
    chosen = labelled_indices(train, args.labels, args.fraction, Path(args.data_dir) / "train", args.seed)
    resolve(args, len(chosen), len(train), run.world)
    encoder, report = load_backbone(build, args, "resnet18", stored_as=STORED)
    network = place(classifier(encoder, len(train.classes)), run.device)
    labelled = subset(train, chosen)
    finetune(
        run,
        network,
        labelled,
        {
            "data": f"{args.data_dir}: {len(labelled)} of {len(train)} images labelled, {len(val)} val images, "
            f"{len(train.classes)} classes",
            "backbone": report,
        },
    )
    top1, top5 = accuracy(run, network, val)
    write_result(
        run.dir,
        {"semi": top1, "semi_top5": top5, "labelled": len(labelled), "of": len(train), "pretrained": args.pretrained},
    )
    run.finish()
    return 0


if __name__ == "__main__":
    cli(main)
