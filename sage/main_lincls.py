"""Linear evaluation of the frozen backbone's pooled feature (release configs r50_last_byol and r50_last).

    python -m sage.main_lincls --pretrained runs/sage/pretrain/paper/checkpoint.pth --data_dir imagenet

Also of fine-grained sets (--dataset cub, cars, aircraft). Images are scaled to -1..1, as in pretraining, or as the
file of another network wants (--normalise).
"""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage.data import linear_train, plain
from sage.finegrained import open_images
from sage.options import add_flags, backbone, normalisation
from shared_utils import UserError, distributed, feed
from shared_utils.data import EpochSampler
from shared_utils.evaluation import check_cache, collect, freeze, topk, unchanged, write_result
from shared_utils.flags import Parser, add_run_flags, ints, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.probe import FeatureBatches, Validation, check_batch, evaluate, facts
from shared_utils.run import Run, cli


def get_parser() -> Parser:
    p = Parser(prog="sage.main_lincls", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    add_flags(p)
    a("--lr", type=float, default=0.2, help="learning rate of the first epoch")
    a("--momentum", type=not_negative, default=0.9)
    a("--weight_decay", "--wd", type=not_negative, default=0.0)
    a("--batch_size", type=positive, default=256, help="images a step, all processes together")
    a("--total_epochs", "--epochs", type=positive, default=80)
    a("--lr_policy", choices=["cosine", "step"], default="cosine", help="by epoch: to 0, or x .1 at each of --step")
    a("--step", type=ints, default="60,80", help="epochs of --lr_policy step (release r50_last: lr 30, 100 epochs)")
    a("--drop_last", action="store_true", help="leave out the last, smaller batch of an epoch (rows of 2026-11)")
    a("--cached_train", action="store_true", help="a cheap probe: train on features of unaugmented images, computed "
      "once; not equal to the protocol")  # fmt: skip
    add_run_flags(p, "sage/lincls", "pretrained")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range, before anything is loaded."""
    if not args.lr > 0:
        raise UserError(f"--lr {args.lr}: must be above 0")
    check_batch(args.batch_size, world)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of a whole epoch."""
    if args.lr_policy == "cosine":
        return args.lr * (1 + math.cos(math.pi * epoch / args.total_epochs)) / 2
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.step)


class Scores:
    """Top-1 and top-5 in per cent after each epoch."""

    def __init__(self) -> None:
        self.history: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [list(pair) for pair in state["history"]]

    def result(self) -> dict[str, Any]:
        """After the last epoch, and the best epoch beside it."""
        best = max(range(len(self.history)), key=lambda e: self.history[e][0])
        last = self.history[-1]
        return {"linear": last[0], "linear_top5": last[1], "linear_best": self.history[best][0], "best_epoch": best}


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "sage", "lincls")
    check_flags(args, run.world)
    norm = normalisation(args)
    train, val = open_images(args)
    train.transform = linear_train(args.img_size, norm, args.aug_backend)
    val.transform = plain(args.img_size, norm, args.aug_backend)

    # Frozen backbone, in eval mode throughout
    encoder, report = backbone(args)
    before = freeze(encoder)
    encoder = place(encoder, run.device)

    def embed(x: Tensor) -> list[Tensor]:
        with torch.no_grad(), run.autocast():
            return [encoder.pooled(x)]

    size = encoder.num_features
    wanted = {"lower --per_class": (len(val), size)}
    if args.cached_train:
        wanted["leave --cached_train away"] = (len(train), size)
    check_cache(wanted)

    # Classifier, N(0, .01) and 0
    probe = nn.Linear(size, len(train.classes))
    nn.init.normal_(probe.weight, 0, 0.01)
    nn.init.zeros_(probe.bias)
    probe.to(run.device)
    net = distributed.wrap(probe)
    optimizer = torch.optim.SGD(probe.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    scores = Scores()
    sampler = EpochSampler(
        len(train), args.batch_size // run.world, args.seed, run.rank, run.world, least=None if args.drop_last else 0
    )
    run.track(state_dict=probe, optimizer=optimizer, scores=scores)
    run.reads(train, val)
    run.preflight(facts(run, train, val, report, sampler.steps_per_epoch, args.total_epochs))
    validation = Validation(embed, val, run)
    batches: Any = None
    if args.cached_train and run.epoch < args.total_epochs:
        train.transform = plain(args.img_size, norm, args.aug_backend)
        feats, labels = collect(embed, train, run.device, args.batch_size, args.workers, everything=True)
        batches = FeatureBatches(feats, labels, sampler)
    elif not args.cached_train:
        batches = run.loader(feed.keyed(train, args.seed, args.aug_backend, run.device), sampler)

    for epoch, batch in run.batches(batches, sampler, args.total_epochs):
        lr = learning_rate(args, epoch)
        optimizer.param_groups[0]["lr"] = lr
        if args.cached_train:
            x = batch[0][0].to(run.device, non_blocking=True)
        else:
            x = embed(follow(batch[0], encoder))[0].float()
        target = batch[1].to(run.device, non_blocking=True)
        logits = net(x)  # [B, classes]
        loss = F.cross_entropy(logits, target) * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched: dict[str, float] = {}
        tested: dict[str, float] = {}
        if run.log_due():
            watched["acc1"] = 100 * float(topk(logits.detach(), target, (1,))[0]) / len(target)
        if run.step_in_epoch + 1 == sampler.steps_per_epoch:
            scores.history += evaluate(lambda feats: [probe(feats[0])], validation, 1, len(val), run.device)
            tested = {"val/top1": scores.history[-1][0], "val/top5": scores.history[-1][1]}
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, evaluated=tested, **watched)

    unchanged(encoder, before)
    told = {"epochs": args.total_epochs, "cached_train": args.cached_train, "pretrained": args.pretrained,
            "normalise": norm}  # fmt: skip
    write_result(run.dir, scores.result() | told)
    run.finish()
    return 0


if __name__ == "__main__":
    cli(main)
