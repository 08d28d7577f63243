"""Linear evaluation: classifiers on the frozen backbone's block outputs (release main_lincls.py, classifiers/).

    python -m hsa.main_lincls --pretrained runs/hsa/pretrain/paper/checkpoint.pth --data_dir imagenet

Two classifiers by default, trained at once: on layer3's last block (14 of ResNet-50), where the paper claims more
discriminative features, and on layer4's (17), which the release evaluates.
Training images are augmented and go through the backbone at every step, as in the release. Validation images are not
augmented and the backbone is frozen, so their features are computed once: the same numbers as a pass an epoch, which is
what --recompute_val does where memory is short.
"""

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa.arch import DEPTHS, STEMS, Encoder, build
from hsa.lab.export_detection import DROP
from shared_utils import UserError, checkpoint, distributed, feed
from shared_utils.augment import linear_train, plain
from shared_utils.data import EpochSampler
from shared_utils.evaluation import (
    add_data_flags,
    add_network_flags,
    check_cache,
    collect,
    freeze,
    load_backbone,
    open_splits,
    stream,
    topk,
    unchanged,
    write_result,
)
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, ints, natural, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.run import Run, cli


def get_parser() -> Parser:
    p = Parser(prog="hsa.main_lincls", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_network_flags(p, list(DEPTHS), STEMS, "resnet50")
    add_data_flags(p)
    add_aug_flag(p)
    a("--selected_feat_id", type=_words, default="layer3,last", help="comma-separated block ids, or last, layer1 to "
      "layer4; a classifier each, trained at once (release: 17)")  # fmt: skip
    a("--pool_type", choices=["avg", "max"], default="avg")
    a(
        "--nchannels",
        type=natural,
        default=0,
        help="channels of the last block asked for, checked; 0: whatever they are",
    )
    a("--init_lr", "--lr", type=float, default=30.0, help="learning rate of the first epoch")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=0.0)
    a("--batch_size", type=positive, default=256, help="images a step, all processes together")
    a("--end_epoch", "--epochs", type=positive, default=100, help="epochs of training")
    a("--decay_method", choices=["step", "cos"], default="step", help="by epoch")
    a("--schedule", type=ints, default="60,80", help="epochs at which `step` multiplies by --lr_decay")
    a("--lr_decay", type=float, default=0.1)
    a("--min_lr", type=float, default=0.01, help="end of `cos`")
    a("--cached_train", action="store_true", help="a cheap probe: train on features of unaugmented images, computed "
      "once; not equal to the protocol")  # fmt: skip
    a("--recompute_val", action="store_true", help="validation images through the backbone every epoch, nothing "
      "kept: same numbers")  # fmt: skip
    add_run_flags(p, "hsa/lincls/default")
    return p


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range, before anything is loaded."""
    if not args.init_lr > 0 or args.min_lr < 0:
        raise UserError("--init_lr must be above 0 and --min_lr not below")
    if args.batch_size % world:
        raise UserError(f"--batch_size {args.batch_size} does not divide over {world} processes")


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of a whole epoch: steps, or cosine from --init_lr to --min_lr."""
    if args.decay_method == "cos":
        return args.min_lr + (args.init_lr - args.min_lr) * (1 + math.cos(math.pi * epoch / args.end_epoch)) / 2
    return args.init_lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)


def stage_ends(encoder: Encoder) -> dict[str, int]:
    """Id of the last block of each stage; `last` is layer4's."""
    ends, number = {}, 1
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        number += len(getattr(encoder, stage))
        ends[stage] = number
    return ends | {"last": number}


def block_ids(words: list[str], encoder: Encoder) -> list[int]:
    """Ids of --selected_feat_id; `layerN` is the last block of that stage, `last` the map that is pooled."""
    ends = stage_ends(encoder)
    for word in words:
        if word not in ends and not (word.isdecimal() and int(word) <= ends["last"]):
            raise UserError(
                f"--selected_feat_id {word}: no such block; choose from 0 to {ends['last']}, {', '.join(ends)}"
            )
    ids = [ends[word] if word in ends else int(word) for word in words]
    if len(set(ids)) < len(ids):
        raise UserError(f"--selected_feat_id {','.join(words)} names a block twice")
    return ids


def pooled_size(number: int, encoder: Encoder) -> int:
    """Side of the pooled map: 14 up to layer1, 7 above, 1 for the last block (release classifiers/cls_opt.py)."""
    ends = stage_ends(encoder)
    if number == ends["last"]:
        return 1
    return 14 if number <= ends["layer1"] else 7


class Features(nn.Module):
    """Images -> the pooled and flattened maps [B, C * s * s] of the chosen blocks, float32."""

    def __init__(self, encoder: Encoder, ids: list[int], pool_type: str):
        super().__init__()
        self.encoder, self.ids = encoder, ids
        self.pool = F.adaptive_avg_pool2d if pool_type == "avg" else F.adaptive_max_pool2d

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.encoder.maps(x, self.ids)
        out = []
        for number in self.ids:
            side = min(pooled_size(number, self.encoder), *maps[number].shape[2:])
            out.append(self.pool(maps[number].float(), side).flatten(1))
        return out


class Probes(nn.Module):
    """A linear classifier for each block, N(0, .01) and 0; names of the release."""

    def __init__(self, sizes: list[int], classes: int):
        super().__init__()
        layers = []
        for size in sizes:  # one after the other: a block's start does not depend on the blocks after it
            layers.append(nn.Linear(size, classes))
            nn.init.normal_(layers[-1].weight, 0, 0.01)
            nn.init.zeros_(layers[-1].bias)
        self.classifiers = nn.ModuleList(
            nn.ModuleDict({"classifier": nn.ModuleDict({"LinearClassifier": layer})}) for layer in layers
        )

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        return [probe["classifier"]["LinearClassifier"](f) for probe, f in zip(self.classifiers, feats, strict=True)]  # type: ignore[index, operator]


class ReleaseKeys:
    """The probes for `Run.track`, under the release's names `module.classifiers.*`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {f"module.{key}": value for key, value in self.model.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        checkpoint.load_strict(self.model, {key.removeprefix("module."): value for key, value in state.items()})


class Scores:
    """Top-1 and top-5 in per cent of each block after each epoch: [epoch][block] (top-1, top-5)."""

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.history: list[list[list[float]]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [[list(pair) for pair in epoch] for epoch in state["history"]]

    def improved(self) -> bool:
        """Whether the latest epoch has the highest top-1 of any classifier (what the release keeps)."""
        tops = [max(pair[0] for pair in epoch) for epoch in self.history]
        return tops[-1] > max(tops[:-1], default=-1.0)

    def result(self) -> dict[str, Any]:
        blocks = {}
        for i, number in enumerate(self.ids):
            best = max(range(len(self.history)), key=lambda e: self.history[e][i][0])  # the first of equals
            top1, top5 = self.history[best][i]
            last1, last5 = self.history[-1][i]
            blocks[str(number)] = {
                "best": top1, "best_top5": top5, "best_epoch": best, "last": last1, "last_top5": last5,
            }  # fmt: skip
        deepest = blocks[str(max(self.ids))]
        return {
            "linear": deepest["best"],
            "linear_top5": deepest["best_top5"],
            "linear_last": deepest["last"],
            "linear_last_top5": deepest["last_top5"],
            "blocks": blocks,
        }


class FeatureBatches:
    """Batches of features that are in memory, in the order of a sampler."""

    def __init__(self, feats: list[Tensor], labels: Tensor, sampler: EpochSampler):
        self.feats, self.labels, self.sampler = feats, labels, sampler

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for keys in self.sampler:
            rows = torch.tensor([index for _, index in keys])
            yield [f[rows] for f in self.feats], self.labels[rows]


def slices(feats: list[Tensor], labels: Tensor, size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Features in memory in batches, as `shared_utils.evaluation.stream` gives them."""
    for start in range(0, len(labels), size):
        yield [f[start : start + size] for f in feats], labels[start : start + size]


@torch.no_grad()
def evaluate(
    probes: nn.Module, batches: Iterable[tuple[list[Tensor], Tensor]], heads: int, count: int, device: torch.device
) -> list[list[float]]:
    """(top-1, top-5) in per cent of each of `heads` classifiers.

    Args:
        batches: features of each block and labels, of this process's share of `count` images.
    """
    hits = torch.zeros(heads, 2, dtype=torch.float64)
    for feats, labels in batches:
        hits += torch.stack([topk(logits, labels) for logits in probes([f.to(device) for f in feats])])
    return (100 * distributed.all_sum(hits.to(device)).cpu() / count).tolist()


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "hsa", "lincls")
    check_flags(args, run.world)
    train, val = open_splits(args)
    train.transform, val.transform = (
        linear_train(args.img_size, args.aug_backend),
        plain(args.img_size, args.aug_backend),
    )

    # Frozen backbone, in eval mode throughout
    encoder, report = load_backbone(build, args, "resnet50", DROP, ("{}",))
    before = freeze(encoder)
    encoder = place(encoder, run.device)
    ids = block_ids(args.selected_feat_id, encoder)
    backbone = Features(encoder, ids, args.pool_type)

    def embed(x: Tensor) -> list[Tensor]:
        with run.autocast():
            return backbone(x)

    channels = encoder.maps(torch.zeros(1, 3, args.img_size, args.img_size, device=run.device), ids)[max(ids)].shape[1]
    if args.nchannels and args.nchannels != channels:
        raise UserError(f"--nchannels {args.nchannels}: block {max(ids)} of {args.arch} has {channels}")
    sizes = [f.shape[1] for f in embed(torch.zeros(1, 3, args.img_size, args.img_size, device=run.device))]

    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine, which share its memory
    wanted = {}
    if args.cached_train:  # all of them in each process
        wanted["leave --cached_train away"] = (len(train) * local, sum(sizes))
    if not args.recompute_val:
        wanted["give --recompute_val, the numbers are the same"] = (-(-len(val) * local // run.world), sum(sizes))
    check_cache(wanted)

    # Classifiers
    probes = Probes(sizes, len(train.classes)).to(run.device)
    net = distributed.wrap(probes)
    optimizer = torch.optim.SGD(probes.parameters(), args.init_lr, args.momentum, weight_decay=args.wd)
    scores = Scores(ids)
    sampler = EpochSampler(len(train), args.batch_size // run.world, args.seed, run.rank, run.world, least=0)
    run.track(state_dict=ReleaseKeys(probes), optimizer=optimizer, scores=scores)
    run.reads(train, val)
    run.preflight(
        {
            "data": f"{args.data_dir}: {len(train)} train / {len(val)} val images, {len(train.classes)} classes",
            "backbone": report,
            "blocks": ", ".join(f"{n} ({s} features)" for n, s in zip(ids, sizes)),
            "batch": f"{args.batch_size} x {sampler.steps_per_epoch} steps an epoch, {args.end_epoch} epochs",
            "protocol": "features of unaugmented images (cheap probe, not equal)" if args.cached_train else "augmented",
            "expected initial loss": f"about {len(ids) * math.log(len(train.classes)):.2f}, log of the classes a block",
        }
    )
    cached: tuple[list[Tensor], Tensor] | None = None

    def val_batches() -> Iterator[tuple[list[Tensor], Tensor]]:
        nonlocal cached
        if args.recompute_val:
            return stream(embed, val, run.device, args.batch_size, args.workers)
        cached = cached or collect(embed, val, run.device, args.batch_size, args.workers)
        return slices(*cached, args.batch_size)

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
            scores.history.append(evaluate(probes, val_batches(), len(ids), len(val), run.device))
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
    result = scores.result() | {
        "epochs": args.end_epoch,
        "cached_train": args.cached_train,
        "pretrained": args.pretrained,
    }
    write_result(run.dir, result)
    run.finish()
    return 0


if __name__ == "__main__":
    cli(main)
