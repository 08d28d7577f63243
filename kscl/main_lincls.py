"""Linear evaluation: classifiers on the frozen backbone's block outputs, the protocol of the authors' MoCo code.

    python -m kscl.main_lincls --pretrained runs/kscl/pretrain/paper/checkpoint.pth --data_dir imagenet

The last block (17 of ResNet-50), pooled, by default; several blocks get a classifier each and are trained at once.
Training images are augmented and go through the backbone at every step. Validation images are not augmented and the
backbone is frozen, so their features are computed once: the same numbers as a pass an epoch, which is what
--recompute_val does where memory is short.
"""

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kscl.arch import ARCHS, DROP, STEMS, build
from shared_utils import UserError, checkpoint, distributed, feed
from shared_utils.augment import linear_train, plain
from shared_utils.checkpoint import ReleaseKeys
from shared_utils.data import EpochSampler
from shared_utils.evaluation import (
    add_data_flags,
    add_network_flags,
    collect,
    freeze,
    load_backbone,
    open_splits,
    topk,
    unchanged,
    write_result,
)
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, ints, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.probe import (
    FeatureBatches,
    Features,
    Probes,
    Scores,
    Validation,
    block_ids,
    check_batch,
    check_memory,
    evaluate,
    facts,
    words,
)
from shared_utils.run import Run, cli


def get_parser() -> Parser:
    p = Parser(prog="kscl.main_lincls", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_network_flags(p, ARCHS, STEMS, "resnet50")
    add_data_flags(p)
    add_aug_flag(p)
    a("--selected_feat_id", type=words, default="last", help="comma-separated block ids, or last, layer1 to layer4; "
      "a classifier each, trained at once")  # fmt: skip
    a("--pool_type", choices=["avg", "max"], default="avg")
    a("--init_lr", "--lr", type=float, default=30.0, help="learning rate of the first epoch")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=0.0)
    a("--batch_size", type=positive, default=256, help="images a step, all processes together")
    a("--end_epoch", "--epochs", type=positive, default=100, help="epochs of training")
    a("--decay_method", choices=["step", "cos"], default="step", help="by epoch")
    a("--schedule", type=ints, default="60,80", help="epochs at which `step` multiplies by --lr_decay")
    a("--lr_decay", type=float, default=0.1)
    a("--min_lr", type=float, default=0.01, help="end of `cos`")
    a("--drop_last", action="store_true", help="leave out the last, smaller batch of an epoch (rows of 2026-11)")
    a("--cached_train", action="store_true", help="a cheap probe: train on features of unaugmented images, computed "
      "once; not equal to the protocol")  # fmt: skip
    a("--recompute_val", action="store_true", help="validation images through the backbone every epoch, nothing "
      "kept: same numbers")  # fmt: skip
    add_run_flags(p, "kscl/lincls", "pretrained")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range, before anything is loaded."""
    if not args.init_lr > 0 or args.min_lr < 0:
        raise UserError("--init_lr must be above 0 and --min_lr not below")
    check_batch(args.batch_size, world)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of a whole epoch: steps, or cosine from --init_lr to --min_lr."""
    if args.decay_method == "cos":
        return args.min_lr + (args.init_lr - args.min_lr) * (1 + math.cos(math.pi * epoch / args.end_epoch)) / 2
    return args.init_lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "kscl", "lincls")
    check_flags(args, run.world)
    train, val = open_splits(args)
    train.transform = linear_train(args.img_size, args.aug_backend)
    val.transform = plain(args.img_size, args.aug_backend)

    # Frozen backbone, in eval mode throughout
    encoder, report = load_backbone(build, args, "resnet50", DROP, ("{}",))
    before = freeze(encoder)
    encoder = place(encoder, run.device)
    ids = block_ids(args.selected_feat_id, encoder)
    backbone = Features(encoder, ids, args.pool_type)

    def embed(x: Tensor) -> list[Tensor]:
        with run.autocast():
            return backbone(x)

    sizes = [f.shape[1] for f in embed(torch.zeros(1, 3, args.img_size, args.img_size, device=run.device))]

    check_memory(run, train, val, sum(sizes))

    # Classifiers
    probes = Probes(sizes, len(train.classes)).to(run.device)
    net = distributed.wrap(probes)
    optimizer = torch.optim.SGD(probes.parameters(), args.init_lr, args.momentum, weight_decay=args.wd)
    scores = Scores(ids)
    sampler = EpochSampler(
        len(train), args.batch_size // run.world, args.seed, run.rank, run.world, least=None if args.drop_last else 0
    )
    run.track(state_dict=ReleaseKeys(probes), optimizer=optimizer, scores=scores)
    run.reads(train, val)
    blocks = {"blocks": ", ".join(f"{n} ({s} features)" for n, s in zip(ids, sizes))}
    run.preflight(facts(run, train, val, report, sampler.steps_per_epoch, args.end_epoch, len(ids)) | blocks)
    validation = Validation(embed, val, run, args.recompute_val)
    batches: Any = None
    if args.cached_train and run.epoch < args.end_epoch:
        train.transform = plain(args.img_size, args.aug_backend)
        feats, labels = collect(embed, train, run.device, args.batch_size, args.workers, everything=True)
        batches = FeatureBatches(feats, labels, sampler)
    elif not args.cached_train:
        batches = run.loader(feed.keyed(train, args.seed, args.aug_backend, run.device), sampler)

    for epoch, batch in run.batches(batches, sampler, args.end_epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch)
        if args.cached_train:
            f, target = [x.to(run.device) for x in batch[0]], batch[1].to(run.device)
        else:
            f = embed(follow(batch[0], encoder))
            target = batch[1].to(run.device, non_blocking=True)
        logits = net(f)  # [B, classes] each
        loss = torch.stack([F.cross_entropy(out, target) for out in logits]).sum() * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched: dict[str, float] = {}
        tested: dict[str, float] = {}
        if run.log_due():  # the GPU is waited for
            watched = {f"acc1_{n}": 100 * float(topk(out, target)[0]) / len(target) for n, out in zip(ids, logits)}
        if run.step_in_epoch + 1 == sampler.steps_per_epoch:
            scores.history.append(evaluate(probes, validation, len(ids), len(val), run.device))
            tested = {f"val/top1_{n}": pair[0] for n, pair in zip(ids, scores.history[-1])}
            if scores.improved() and run.rank == 0:
                checkpoint.save(
                    run.dir / "best.pth",
                    {"state_dict": ReleaseKeys(probes).state_dict(), "epoch": epoch + 1, "args": {"block_ids": ids}},
                )
            if epoch == 0:
                unchanged(encoder, before)
        mean = distributed.all_sum(loss.detach()) / run.world
        run.log(mean, lr=optimizer.param_groups[0]["lr"], evaluated=tested, **watched)

    unchanged(encoder, before)
    told = {"epochs": args.end_epoch, "cached_train": args.cached_train, "pretrained": args.pretrained}
    write_result(run.dir, scores.result() | told)
    run.finish()
    return 0


if __name__ == "__main__":
    cli(main)
