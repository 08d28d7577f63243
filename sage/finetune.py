"""Fine-tuning of the whole network with a new classifier: one cell (learning rate, factor of the head), and a grid."""

import argparse
import copy
import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage.data import linear_train, plain
from sage.options import backbone, normalisation
from shared_utils import UserError, distributed, feed
from shared_utils.data import EpochSampler, ImageList
from shared_utils.evaluation import stream, topk, write_result
from shared_utils.flags import floats, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.run import Run


def add_finetune_flags(p: argparse.ArgumentParser, **defaults: Any) -> None:
    """Learning rates and epochs of a fine-tuning; several rates or factors make a grid."""
    a = p.add_argument
    a("--lr", type=floats, help="of the backbone; several with commas: each is tried")
    a("--head_lr_mult", type=floats, help="the classifier's rate over it; several: each is tried")
    a("--momentum", type=not_negative, default=0.9)
    a("--weight_decay", "--wd", type=not_negative)
    a("--batch_size", type=positive, help="images a step, all processes together; at most the training images")
    a("--total_epochs", "--epochs", type=positive)
    a("--lr_policy", choices=["cosine", "step"], help="by step to 0, or x --gamma at each of --step, by epoch")
    a("--step", type=lambda text: [int(x) for x in text.split(",")], default="12,16")
    a("--gamma", type=float, default=0.2)
    p.set_defaults(**defaults)


class Classifier(nn.Module):
    """Backbone, average pooling and a new linear layer, N(0, .01) and 0."""

    def __init__(self, encoder: Any, classes: int):
        super().__init__()
        self.backbone = encoder
        self.fc = nn.Linear(encoder.num_features, classes)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> logits [B, classes]."""
        return self.fc(self.backbone.pooled(x))


def check_flags(args: argparse.Namespace, world: int, images: int) -> None:
    """UserError for flags out of range; the batch is at most the images."""
    if min(args.lr) <= 0 or min(args.head_lr_mult) <= 0:
        raise UserError("--lr and --head_lr_mult must be above 0")
    args.batch_size = min(args.batch_size, images // world * world)
    if args.batch_size % world or args.batch_size // world < 2:
        raise UserError(f"--batch_size {args.batch_size} does not give each of {world} processes the same 2 or more")


def learning_rate(args: argparse.Namespace, lr: float, step: int, per_epoch: int) -> float:
    """Of one update."""
    if args.lr_policy == "cosine":
        return lr * (1 + math.cos(math.pi * step / (per_epoch * args.total_epochs))) / 2
    return lr * args.gamma ** sum(step // per_epoch >= milestone for milestone in args.step)


def accuracy(run: Run, network: nn.Module, images: ImageList, norm: str = "half") -> list[float]:
    """Top-1 and top-5 in per cent of the network that the checkpoint holds, that of process 0."""
    images.transform = plain(run.args.img_size, norm, run.args.aug_backend)
    distributed.same_buffers(network)
    network.eval()

    def logits(x: Tensor) -> list[Tensor]:
        with torch.no_grad(), run.autocast():
            return [network(x)]

    hits = torch.zeros(2, dtype=torch.float64)
    for out, labels in stream(logits, images, run.device, run.args.batch_size, run.args.workers):
        hits += topk(out[0], labels)
    return (100 * distributed.all_sum(hits.to(run.device)).cpu() / len(images)).tolist()


def one_cell(args: argparse.Namespace, job: str, train: ImageList, val: ImageList) -> dict[str, Any]:
    """Fine-tune all of the network at `args.lr`, `args.head_lr_mult` (one each); its accuracy after the last epoch."""
    run = Run(args, "sage", job)
    torch.manual_seed(args.seed)
    encoder, report = backbone(args)
    network: Any = Classifier(encoder, len(train.classes))
    distributed.convert_norm(network, "sync")
    place(network, run.device)
    norm = normalisation(args)
    train.transform = linear_train(args.img_size, norm, args.aug_backend)
    sampler = EpochSampler(len(train), args.batch_size // run.world, args.seed, run.rank, run.world, least=2)
    loader = run.loader(feed.keyed(train, args.seed, args.aug_backend, run.device), sampler)
    groups = [
        {"params": list(network.backbone.parameters()), "scale": 1.0},
        {"params": list(network.fc.parameters()), "scale": args.head_lr_mult},
    ]
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay)
    net = distributed.wrap(network)
    run.track(state_dict=network, optimizer=optimizer)
    per_epoch = sampler.steps_per_epoch
    run.reads(train, val)
    run.preflight(
        {
            "data": f"{args.data_dir}: {len(train)} labelled / {len(val)} val images, {len(train.classes)} classes",
            "backbone": report,
            "batch": f"{args.batch_size} x {per_epoch} steps an epoch, {args.total_epochs} epochs",
            "learning rate": f"{args.lr} backbone, {args.lr * args.head_lr_mult:.4g} classifier, {args.lr_policy}",
            "expected initial loss": f"about log {len(train.classes)} = {math.log(len(train.classes)):.2f}",
        }
    )
    network.train()
    for _, batch in run.batches(loader, sampler, args.total_epochs):
        lr = learning_rate(args, args.lr, run.step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        x = follow(batch[0], network)
        target = batch[1].to(run.device, non_blocking=True)
        with run.autocast():
            logits = net(x).float()  # [B, classes]
        loss = F.cross_entropy(logits, target) * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched = {}
        if run.log_due():
            watched["acc1"] = 100 * float(topk(logits.detach(), target, (1,))[0]) / len(target)
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, **watched)
    top1, top5 = accuracy(run, network, val, norm)
    run.finish()
    return {"top1": top1, "top5": top5, "lr": args.lr, "head_lr_mult": args.head_lr_mult}


def grid(args: argparse.Namespace, job: str, train: ImageList, val: ImageList, extra: dict[str, Any]) -> None:
    """Every cell in a folder of its own; the best by validation accuracy, as the protocol asks, beside all of them."""
    if args.resume:
        raise UserError("--resume: a grid of trainings follows here; the same command goes on by itself")
    out, cells = Path(args.output_dir), []
    for lr, mult in itertools.product(args.lr, args.head_lr_mult):
        cell = copy.copy(args)
        cell.lr, cell.head_lr_mult, cell.output_dir = lr, mult, out / f"lr{lr:g}-head{mult:g}"
        cells.append(one_cell(cell, job, train, val))
    best = max(cells, key=lambda cell: cell["top1"])
    write_result(
        args,
        {"top1": best["top1"], "top5": best["top5"], "best": best, "cells": cells, "normalise": normalisation(args)}
        | extra,
    )
