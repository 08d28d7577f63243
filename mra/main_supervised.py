"""Supervised training with MRA or a baseline: python -m mra.main_supervised --mae_ckpt MAE.pth --data_path IMAGENET

ImageNet, CIFAR, fine-grained and long-tailed sets; without --mae_ckpt the baseline. Also by torchrun.
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from mra import data, engine, nets, transforms
from mra.mra import add_mra_flags, build
from shared_utils import distributed
from shared_utils.data import EpochSampler, Keyed
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_run_flags, not_negative, positive
from shared_utils.layout import place
from shared_utils.run import Run, cli

# The community's recipes, the paper's own are not known. FILLED: flags without a default of their own, see `resolve`.
FILLED = ("epochs", "batch_size", "lr", "decay", "schedule", "wd")
OWN: dict[str, Any] = {
    "warmup_epochs": 0, "lr_decay": 0.1, "nesterov": False, "color_jitter": 0.0, "lighting": 0.0,
    "padding_mode": "reflect",
}  # fmt: skip
CUTMIX_PROB = {"cifar": 0.5, "longtail_cifar": 0.5}  # CutMix's release: half of CIFAR's batches, all of ImageNet's
PRESETS: dict[str, tuple[tuple[int, int, float, str, str, float], dict[str, Any]]] = {
    # CutMix's ImageNet recipe, whose baseline is 76.3 (clovaai/CutMix-PyTorch, train.py)
    "cutmix": (
        (300, 256, 0.1, "step", "75,150,225", 1e-4),
        {"nesterov": True, "color_jitter": 0.4, "lighting": 0.1},
    ),
    "short": ((100, 256, 0.1, "cos", "", 1e-4), {}),
    "cifar": ((200, 128, 0.1, "cos", "", 5e-4), {"padding_mode": "constant"}),
    "finegrained": ((100, 64, 0.01, "cos", "", 5e-4), {}),
    # LDAM-DRW's recipe (kaidic/LDAM-DRW, cifar_train.py): 0.01 of the learning rate from epoch 160, 0.0001 from 180
    "longtail_cifar": (
        (200, 128, 0.1, "step", "160,180", 2e-4),
        {"warmup_epochs": 5, "lr_decay": 0.01, "padding_mode": "constant"},
    ),
    "longtail_imagenet": ((100, 256, 0.1, "cos", "", 5e-4), {}),
}


def get_parser() -> Parser:
    p = Parser(prog="mra.main_supervised", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    data.add_data_flags(p)
    data.add_label_flags(p)
    add_mra_flags(p)
    engine.add_training_flags(p)
    a("--preset", choices=list(PRESETS), default="short", help="defaults of the flags that follow, and of "
      "--warmup_epochs, --lr_decay, --nesterov, --color_jitter, --lighting, --padding_mode, --mix_prob")  # fmt: skip
    a("--epochs", type=positive)
    a("--batch_size", type=positive, help="images a step, all processes together")
    a("--drop_last", action="store_true", help="leave out the last, smaller batch of an epoch (rows of 2026-11)")
    a("--lr", type=float)
    a("--decay", choices=["cos", "step"])
    a("--schedule", help="epochs of --decay step, with commas")
    a("--wd", "--weight_decay", type=not_negative)
    add_run_flags(p, "mra/supervised/default")
    p.older(**OWN)  # before presets filled them
    p.set_defaults(mix_prob=None, **dict.fromkeys(OWN))
    return p


def resolve(args: argparse.Namespace) -> None:
    """Fill in --preset's defaults."""
    recipe, more = PRESETS[args.preset]
    values: dict[str, Any] = dict(zip(FILLED, recipe, strict=True)) | OWN | more
    values["mix_prob"] = CUTMIX_PROB.get(args.preset, 1.0) if args.mix == "cutmix" else 1.0
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.schedule = engine.epochs_of(args.schedule)


def shot_groups(table: Tensor, counts: Tensor) -> dict[str, float]:
    """Accuracy in per cent of classes with many (> 100), medium (20 to 100) and few (< 20) training images.

    Args:
        table: [2, C], right test images and all; counts: [C], training images.
    """
    masks = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    by_class = 100 * table[0] / table[1].clamp_min(1)
    return {name: float(by_class[mask].mean()) for name, mask in masks.items() if bool(mask.any())}


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    args.init = args.init or args.pretrained
    run = Run(args, "mra", "supervised")
    resolve(args)
    engine.check_training_flags(args, run.world)

    # Frozen autoencoder; data: geometry and colour here, MRA on the device
    operator, about_mra = build(args, args.input_size, run.device, transforms.STATS[args.mean_std])
    engine.settle(args, operator)
    train, tests = data.open_sets(args)
    train.transform = engine.training_transform(args)
    for images in tests.values():
        images.transform = transforms.test_transform(args.input_size, args.mean_std)
    sampler = EpochSampler(
        len(train), args.batch_size // run.world, args.seed, run.rank, run.world, least=None if args.drop_last else 2
    )
    loader = run.loader(Keyed(train, args.seed), sampler)
    counts = torch.bincount(train.labels, minlength=len(train.classes))
    tailed = bool(args.imbalance or args.train_list)

    # Classifier
    network = nets.build(args.arch, len(train.classes), args.width, args.stem)
    started = nets.start(network, args.init)
    distributed.convert_norm(network, "sync" if args.sync_bn else "local")
    place(network, run.device)
    net = distributed.wrap(network)
    optimizer = engine.optimizer_of(args, network, args.nesterov)
    info = engine.Info(train.classes)
    run.track(state_dict=network, optimizer=optimizer, info=info)
    steps = sampler.steps_per_epoch
    run.reads(train, *tests.values())
    run.preflight(
        {
            "data": f"{args.data_path} ({args.dataset}): {engine.describe(train)}, "
            f"{int(counts.min())} to {int(counts.max())} each; tests "
            + (", ".join(f"{name} {len(images)}" for name, images in tests.items()) or data.UNTESTED),
            "MRA": about_mra,
            "classifier": f"{args.arch}, {sum(q.numel() for q in network.parameters()) / 1e6:.2f} M, {started}",
            "batch": f"{args.batch_size} x {steps} steps an epoch, {args.epochs} epochs",
            "learning rate": f"{args.lr}, {args.decay} ({args.preset}); linear layer x {args.head_lr_mult}",
            "expected initial loss": f"about log {len(train.classes)} = {math.log(len(train.classes)):.2f}",
            "estimated time": engine.estimate(run, network, operator, steps * args.epochs),
        }
    )

    def evaluate() -> dict[str, float]:
        scores: dict[str, float] = {}
        for i, (name, images) in enumerate(tests.items()):
            found = engine.accuracy(run, network, images, per_class=tailed)
            prefix = "" if i == 0 else f"{name}_"
            scores |= {f"{prefix}{k}": found[k] for k in ("top1", "top5")}
            if tailed and i == 0:
                scores |= shot_groups(found["table"], counts)
        return scores

    engine.fit(run, network, net, loader, sampler, operator, optimizer, info, evaluate if tests else None)
    result: dict[str, Any] = info.result("top1")
    result |= {
        "minutes": run.minutes(),
        "epochs": args.epochs,
        "mae_md5": args.mae_md5,
        "test": next(iter(tests), None),
    }
    write_result(run.dir, result)
    run.finish(*engine.hints(run, tests))
    return 0


if __name__ == "__main__":
    cli(main)
