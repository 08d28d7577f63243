"""Action recognition with a pretrained network (paper section 4): python -m fame.eval DATA --pretrained FILE --finetune

`--finetune` trains everything, `--freeze` a linear classifier on the frozen network, `--evaluate` only tests. Also
torchrun --nproc-per-node 4 -m fame.eval ...
"""

import argparse
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fame import augment
from fame.backbone import build
from fame.data import OneClip, VideoSet, add_data_flags, check_data_flags, open_videos
from fame.moco.builder import ReleaseKeys
from fame.network import add_network_flags, load, outputs, resolve, trunk
from fame.train import check_optimizer, keyed, learning_rate
from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EpochSampler, Keyed
from shared_utils.evaluation import freeze, topk, unchanged, write_result
from shared_utils.flags import Parser, add_run_flags, natural, not_negative, positive
from shared_utils.run import Run, cli


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="fame.eval", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_data_flags(p)
    add_network_flags(p)
    a("--finetune", action="store_true", help="train the whole network")
    a("--freeze", action="store_true", help="train a linear classifier on the frozen network")
    a("-e", "--evaluate", action="store_true", help="only test; --pretrained holds a classifier too")
    a("--normalise", choices=["none", "l2"], default="none", help="features before the linear classifier: as "
      "they are, or unit vectors (--freeze)")  # fmt: skip
    a("--num_class", type=natural, default=0, help="checked against the data; 0: whatever they are")
    a("--dropout", type=float, default=0.7, help="before the classifier (--finetune)")
    a("--jitter", choices=["torchvision", "kornia_old"], default="torchvision", help="formulas of the colour jitter")
    a("-b", "--batch_size", type=positive, default=256, help="clips a step, all processes together")
    a("--epochs", type=positive, default=100)
    a("--lr", "--learning_rate", type=float, default=30.0)
    a("--cos", action=argparse.BooleanOptionalAction, default=False, help="cosine by epoch instead of --schedule")
    a(
        "--schedule",
        type=natural,
        nargs="*",
        default=[60, 80],
        help="epochs at which the rate is multiplied by --lr_decay",
    )
    a("--lr_decay", "--learning_rate_decay", type=float, default=0.1)
    a("--warmup", action="store_true", help="linear from --wp_lr to --lr up to the first entry of --schedule")
    a("--wp_lr", "--warmup_learning_rate", type=not_negative, default=0.0025)
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=0.0)
    a("--eval_every", type=positive, default=10, help="epochs between tests; the last epoch is tested in any case")
    add_run_flags(p, "fame/finetune", "pretrained")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that contradict each other or are out of range, before data is opened."""
    if args.finetune + args.freeze + args.evaluate != 1:
        raise UserError("give one of --finetune, --freeze and --evaluate")
    if args.evaluate and args.pretrained == "none":
        raise UserError("--evaluate tests the classifier of a checkpoint; give --pretrained")
    if not args.freeze and args.normalise != "none":
        raise UserError("--normalise belongs to --freeze")
    if not args.lr > 0 or not 0 <= args.dropout < 1:
        raise UserError("--lr must be above 0, and --dropout from 0 to below 1")
    check_optimizer(args)
    if args.batch_size % world:
        raise UserError(f"--batch_size {args.batch_size} does not divide over {world} processes")
    if args.warmup and not args.schedule:
        raise UserError("--warmup climbs up to the first entry of --schedule, which is empty")


class Classifier(nn.Module):
    """Linear classifier of features [N, C], with `--normalise` before it; `fc` as in the release."""

    def __init__(self, features: int, classes: int, normalise: str):
        super().__init__()
        self.kind = normalise
        self.fc = nn.Linear(features, classes)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.normalize(x, dim=1) if self.kind == "l2" else x)


class Scores:
    """(epoch, top-1, top-5) in per cent of each test, for the checkpoint."""

    def __init__(self) -> None:
        self.history: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [list(row) for row in state["history"]]


@torch.no_grad()
def accuracy(batches: Any, count: int, device: torch.device) -> list[float]:
    """Top-1 and top-5 in per cent of the mean output of each video's clips.

    Args:
        batches: (outputs [V, clips, classes], labels [V]) of this process's share of `count` videos.
    """
    hits = torch.zeros(2, dtype=torch.float64)
    for out, labels in batches:
        hits += topk(out.mean(1), labels)
    return (100 * distributed.all_sum(hits.to(device)).cpu() / count).tolist()


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "fame", "eval")
    check_flags(args, run.world)
    resolve(args)
    check_data_flags(args, split=True)
    train, val = open_videos(args, train=True), open_videos(args, train=False)
    classes = len(train.classes)
    if args.num_class not in (0, classes):
        raise UserError(f"--num_class {args.num_class}: {args.data} has {classes}")

    # The network with its classifier; frozen, the network is a function of clips and the classifier stands apart.
    frozen: nn.Module | None = None
    before: dict[str, Tensor] = {}
    model: nn.Module
    if args.freeze:
        frozen, report = trunk(args, run.device)
        before = freeze(frozen)
        model = Classifier(frozen.num_features, classes, args.normalise)  # type: ignore[arg-type]
    else:
        model = build(args.arch, classes=classes, dropout=args.dropout, width=args.width)
        report = load(args, model, head=args.evaluate)
    model.to(run.device)

    def embed(x: Tensor) -> Tensor:
        with run.autocast():
            return x if frozen is None else frozen(x)

    def predict(x: Tensor) -> Tensor:
        with run.autocast():
            return model(x)

    def test() -> list[float]:
        distributed.same_buffers(model)
        model.eval()
        return accuracy(outputs(lambda x: predict(embed(x)), val, args, run.device), len(val), run.device)

    if args.evaluate:
        top1, top5 = test()
        run.say(f"fame/eval: {args.data} fold {args.fold}, {len(val)} videos x {args.clip_per_video} clips; {report}")
        write_result(run.dir, {"acc1": top1, "acc5": top5, "pretrained": args.pretrained})
        return 0

    if args.batch_size > len(train):
        fits = len(train) // run.world * run.world
        raise UserError(
            f"--batch_size {args.batch_size}: the data has {len(train)} training videos; give --batch_size {fits}"
        )
    sampler = EpochSampler(len(train), args.batch_size // run.world, args.seed, run.rank, run.world)
    clips = OneClip(train, args.crop_size, args.min_scale, args.hflip)
    loader = run.loader(Keyed(clips, args.seed), sampler)
    net = distributed.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.wd)
    colours, scores = augment.Colours(args.crop_size, None, args.jitter), Scores()
    run.track(state_dict=ReleaseKeys(model), optimizer=optimizer, scores=scores)
    run.reads(*([video.path for video in part.videos] for part in (train, val)))
    run.preflight(
        {
            "data": f"{args.data} ({args.dataset}) fold {args.fold}: {len(train)} train / {len(val)} test videos, "
            f"{classes} values of {args.target}",
            "network": report,
            "trained": "a linear classifier on frozen features" if args.freeze else "everything",
            "batch": f"{args.batch_size} x {sampler.steps_per_epoch} steps an epoch, {args.epochs} epochs",
            "protocol": f"one random clip a video and epoch; test: {args.clip_per_video} clips a video",
            "expected initial loss": f"about {math.log(classes):.2f}, log of the classes",
        }
    )
    for epoch, batch in run.batches(loader, sampler, args.epochs):
        lr = learning_rate(args, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        target = batch["label"].to(run.device, non_blocking=True)
        # Crops in [0, 1] -> colours, no blur -> normalised; the release leaves this out, and with it the normalisation,
        # where the network is frozen.
        order = torch.randperm(4, generator=keyed(args.seed, run.step, 3)).tolist()
        x = embed(colours(batch["clip"].to(run.device, non_blocking=True), batch["colours"], order))
        with run.autocast():
            logits = net(x).float()  # [B, classes]
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched: dict[str, float] = {}
        tested: dict[str, float] = {}
        if run.log_due():  # the GPU is waited for
            hits = distributed.all_sum(topk(logits, target).to(run.device))
            watched = {"lincls_train/acc1": 100 * float(hits[0]) / args.batch_size}
        last = run.step_in_epoch + 1 == sampler.steps_per_epoch
        if last and (epoch % args.eval_every == 0 or epoch + 1 == args.epochs):
            scores.history.append([epoch, *test()])
            tested = {"lincls_val/acc1": scores.history[-1][1], "lincls_val/acc5": scores.history[-1][2]}
            if frozen is not None:
                unchanged(frozen, before)
            if run.rank == 0 and scores.history[-1][1] >= max(row[1] for row in scores.history):
                checkpoint.save(
                    run.dir / "best.pth", {"state_dict": ReleaseKeys(model).state_dict(), "epoch": epoch + 1}
                )
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, evaluated=tested, **watched)

    best = max(scores.history, key=lambda row: row[1])
    result: dict[str, Any] = {"acc1": scores.history[-1][1], "acc5": scores.history[-1][2], "best_acc1": best[1]}
    result |= {"history": scores.history}  # epoch, top-1, top-5 of each test
    result |= {"best_epoch": int(best[0]), "chance": 100 * majority(val), "epochs": args.epochs}
    write_result(run.dir, result | {"pretrained": args.pretrained})
    run.finish()
    return 0


def majority(videos: VideoSet) -> float:
    """Share of the most frequent label."""
    return int(np.bincount(videos.labels).max()) / len(videos)


if __name__ == "__main__":
    cli(main)
