"""Pretraining of SaGe, of its evaluator, and of the arms beside it (paper 2111.13163): python -m sage.train

    python -m sage.train --data_dir IMAGENET --mode byol                     # the evaluator
    python -m sage.train --data_dir IMAGENET --evaluator runs/.../checkpoint.pth

Also torchrun --nproc-per-node 8 -m sage.train ... A step of the log is one update: `update_interval` iterations.
"""

import argparse
import contextlib
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import nn

from sage import arch
from sage.builder import Evaluator, SaGe, calibrate, evaluator_weights, has_projector, load_evaluator
from sage.data import Views, drawn, normalise, plain, training_images
from sage.gallery import Gallery
from sage.lars import LARS, parameter_groups
from sage.losses import WEIGHTS
from sage.schedule import learning_rate, target_momentum
from sage.weights import DROP, NORMS, guess_network, resolve_norm
from shared_utils import UserError, checkpoint, distributed, feed
from shared_utils.data import EpochSampler, ImageList
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, natural, not_negative, positive
from shared_utils.init import HEADS, add_init_flag, initialise
from shared_utils.knn_watch import add_knn_flag, watch
from shared_utils.layout import follow, place
from shared_utils.pictures import make_grid
from shared_utils.preflight import check_images
from shared_utils.run import Run, cli

MODES = {"sage": list(WEIGHTS), "pixel": ["w_pix"], "byol": []}  # terms that have a weight


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sage.train", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("--data_dir", type=Path, default=os.environ.get("DATA_ROOT", "data"), help="holds train/CLASS/*.jpg, "
      "or images of your own: class folders, or files without labels")  # fmt: skip
    a("--list_file", type=Path, help="train on these images: CLASS/image.jpg a line, below --data_dir/train")
    a("--img_size", type=positive, default=224, help="pixels of a crop")
    a("--per_class", type=natural, default=0, help="first so many training images of each class; 0: all")
    a("--cache", action="store_true", help="decode all images once and keep them in memory")
    a("--blur_max", type=float, default=2.0, help="largest sigma of the blur, pixels")
    a("--arch", choices=list(arch.DEPTHS), default="resnet50", help="f_E")
    a("--width", type=positive, default=64, help="channels of the first stage")
    a("--stem", choices=arch.STEMS, default="imagenet")
    a("--hid_channels", type=positive, default=4096, help="of projector and predictor")
    a("--out_channels", type=positive, default=256, help="D, of z and q")
    a(
        "--mode",
        choices=list(MODES),
        default="sage",
        help="sage; pixel, generation by pixels alone; byol, no generation",
    )
    for flag, weight in WEIGHTS.items():
        a(
            f"--{flag}",
            type=not_negative,
            help=f"weight of the term (default: {weight:.4g} where --mode has it, else 0)",
        )
    a("--gen_target", choices=["self", "other", "clean"], default="self", help="what is recovered from a view: itself, "
      "the other view, or the image without augmentation")  # fmt: skip
    a("--decoder_width", type=natural, default=0, help="channels of the bottleneck; 0: 8 x --width")
    a("--stem_bn", choices=["local", "sync"], default="local", help="batch norm behind the bottleneck, over one "
      "process (release) or all")  # fmt: skip
    a("--evaluator", default="", help="h_G: a checkpoint of a BYOL network, or random")
    a("--evaluator_bn", choices=["frozen", "batch"], default="frozen", help="eval mode; or batch statistics and "
      "drifting buffers, as in the release")  # fmt: skip
    a("--evaluator_norm", choices=["auto", *NORMS], default="auto", help="mean and standard deviation of its own "
      "training: 0.5, ImageNet's, or as its file tells (half for a run of ours)")  # fmt: skip
    a("--base_momentum", type=float, default=0.99, help="m at the start")
    a("--imgs_per_gpu", type=positive, default=64, help="images a process and iteration")
    a("--update_interval", type=positive, default=2, help="iterations whose gradients are accumulated for an update")
    a(
        "--total_epochs",
        "--epochs",
        type=natural,
        default=300,
        help="0: none, the network as it was initialised is stored",
    )
    a("--lr", type=float, default=4.8, help="LARS, everything but the decoder")
    a("--momentum", type=not_negative, default=0.9)
    a("--weight_decay", "--wd", type=not_negative, default=1e-6)
    a("--eta", type=float, default=0.001, help="of LARS")
    a("--lars_release_groups", action="store_true", help="exclude from decay and scaling by the release's names, which "
      "miss downsample.1; default: all one-dimensional parameters")  # fmt: skip
    a("--warmup_iters", type=not_negative, default=10, help="epochs of linear warm-up, of both optimisers")
    a("--warmup_ratio", type=float, default=1e-4)
    a("--decoder_lr", type=float, default=0.048, help="Adam; take 1e-3 for small batches")
    a("--decoder_lr_policy", choices=["const", "cosine"], default="const", help="after the warm-up (release: constant)")
    a(
        "--gallery",
        type=natural,
        default=4,
        help="images whose views are shown beside what is recovered from them; 0: none",
    )
    a("--stages", type=positive, default=5, help="how often, evenly over the run")
    add_aug_flag(p)
    add_knn_flag(p)
    p.set_defaults(normalise="half")  # of its input, for who reads the checkpoint
    add_init_flag(p)
    add_run_flags(p, "sage/pretrain/default")
    p.set_defaults(evaluator_sha256="")
    return p


def resolve(args: argparse.Namespace) -> None:
    """Weights that were not given follow --mode."""
    for flag, weight in WEIGHTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, weight if flag in MODES[args.mode] else 0.0)


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that contradict each other, before anything is loaded."""
    for name in ("lr", "decoder_lr", "eta"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if not 0 <= args.base_momentum <= 1 or not 0 <= args.momentum < 1 or not 0 < args.warmup_ratio <= 1:
        raise UserError("--base_momentum must lie in 0..1, --momentum below 1, --warmup_ratio above 0 and up to 1")
    if args.blur_max < 0.1:
        raise UserError(f"--blur_max {args.blur_max}: the blur begins at 0.1 pixels")
    if args.imgs_per_gpu < 2:
        raise UserError("batch norm needs at least 2 images a process; raise --imgs_per_gpu")
    if args.decoder_width % 16:
        raise UserError(f"--decoder_width {args.decoder_width}: must be a multiple of 16, or 0")
    needs = [flag for flag in WEIGHTS if flag != "w_pix" and getattr(args, flag)]
    if needs and not args.evaluator:
        raise UserError(
            "the terms of the evaluator need --evaluator CHECKPOINT (bash sage/run_evaluator.sh trains one), or "
            "--evaluator random, or --mode pixel"
        )
    if args.evaluator and not needs:
        raise UserError(
            f"--evaluator {args.evaluator}: no term of the loss uses it; leave it away (run_pretrain.sh: EVALUATOR= "
            "before the command) or give --w_f1"
        )


def make_evaluator(args: argparse.Namespace) -> tuple[Evaluator, str]:
    """h_G of --evaluator and a line about it; a run of ours names its own architecture, other files show theirs.

    The hash of its weights and its input's normalisation enter the flags, so that a run says what it was trained with.
    """
    name, width, stem, hid, out = (getattr(args, k) for k in ("arch", "width", "stem", "hid_channels", "out_channels"))
    args.evaluator_norm = resolve_norm(args.evaluator, args.evaluator_norm, "--evaluator_norm")
    if args.evaluator == "random":
        backbone = arch.build(name, width, stem)
        evaluator = Evaluator(backbone, arch.Neck(backbone.num_features, hid, out), args.evaluator_norm)
        return evaluator, f"{name}, width {width}, stem {stem}, random"
    weights = evaluator_weights(args.evaluator)
    loaded = checkpoint.load(args.evaluator)
    stored = loaded.get("args") if isinstance(loaded, Mapping) else None
    del loaded
    if isinstance(stored, Mapping):
        name, width, stem = (stored.get(k, v) for k, v in (("arch", name), ("width", width), ("stem", stem)))
    elif found := guess_network({k.removeprefix("0."): v for k, v in weights.items() if k.startswith("0.")}):
        name, width, imagenet_stem = found
        stem = "imagenet" if imagenet_stem else stem
    backbone, projector = arch.build(name, width, stem), None
    if args.w_f1 or has_projector(weights):
        first, last = (weights.get(f"1.{layer}.weight") for layer in ("fc0", "fc1"))
        hid, out = hid if first is None else first.shape[0], out if last is None else last.shape[0]
        projector = arch.Neck(backbone.num_features, hid, out)
    evaluator = Evaluator(backbone, projector, args.evaluator_norm)
    report = load_evaluator(evaluator, args.evaluator, weights)
    digest = hashlib.sha256()
    for key, value in sorted(evaluator.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    args.evaluator_sha256 = digest.hexdigest()[:16]
    return evaluator, f"{name}, width {width}, stem {stem}, {args.evaluator}: {report}"


def make_model(args: argparse.Namespace, views: Views) -> tuple[SaGe, str, str]:
    """The networks, equal on every process; a line about --init, and one about the evaluator.

    The online network starts from the same numbers in every mode.
    """
    weights = {flag: getattr(args, flag) for flag in WEIGHTS}
    backbone = arch.build(args.arch, args.width, args.stem)
    started = initialise(backbone, args.init, drop=(*HEADS, *DROP)) if args.init else ""
    model = SaGe(backbone, args.hid_channels, args.out_channels)
    decoder = evaluator = None
    report = "none"
    if any(weights.values()):
        decoder = arch.decoder_for(args.arch, args.width, args.stem, args.img_size, args.decoder_width)
    if not args.evaluator:
        args.evaluator_norm = "half" if args.evaluator_norm == "auto" else args.evaluator_norm  # none: nothing to know
    else:
        evaluator, report = make_evaluator(args)
        if args.evaluator == "random":
            images = drawn(views, range(min(512, len(views))), args.seed, args.aug_backend)["x1"]
            calibrate(evaluator, (normalise(images[i : i + 64]) for i in range(0, len(images) - 1, 64)))
    model.add_generation(decoder, evaluator, weights, args.evaluator_bn)
    if model.decoder is not None and args.stem_bn == "local":
        stem = model.decoder.stem
        model.decoder.stem = nn.Sequential()
        distributed.convert_norm(model, "sync")
        model.decoder.stem = stem
    else:
        distributed.convert_norm(model, "sync")
    return model, started, report


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "sage", "pretrain")
    resolve(args)
    check_flags(args, run.world)

    # Data. A batch of the loader is what one update takes: `interval` micro-batches of imgs_per_gpu.
    b, interval = args.imgs_per_gpu, args.update_interval
    images = training_images(Path(args.data_dir), args.list_file, args.per_class, args.cache)
    check_images(len(images), "--imgs_per_gpu", b, each=interval * run.world)
    views = Views(images, args.img_size, args.gen_target == "clean", args.blur_max)
    sampler = EpochSampler(len(views), b * interval, args.seed, run.rank, run.world)
    loader = run.loader(feed.keyed(views, args.seed, args.aug_backend, run.device), sampler)
    per_epoch = sampler.steps_per_epoch * interval  # iterations
    total = per_epoch * args.total_epochs

    # Model: the decoder belongs to Adam alone, everything else that is trained to LARS.
    model, started, evaluator_report = make_model(args, views)
    place(model, run.device).train()
    net = distributed.wrap(model)
    trained = nn.ModuleDict({"online_net": model.online_net, "head": model.head})
    groups = parameter_groups(trained, args.weight_decay, args.lars_release_groups)
    optimizer = LARS(groups, args.lr, args.momentum, eta=args.eta)
    optimizer_decoder = None
    run.track(state_dict=model, optimizer=optimizer)
    if model.decoder is not None:
        optimizer_decoder = torch.optim.Adam(model.decoder.parameters(), args.decoder_lr)
        run.track(optimizer_decoder=optimizer_decoder)
    gallery = None
    if model.decoder is not None and args.gallery:
        chosen = np.linspace(0, len(views) - 1, min(args.gallery, len(views))).astype(int)
        gallery = Gallery(drawn(views, chosen, args.seed, args.aug_backend), total // interval, args.stages)
        run.track(gallery=gallery)
    run.reads(images)
    backbone: Any = model.online_net[0]
    watch(run, backbone, images, plain(args.img_size, "half", args.aug_backend), backbone.pooled)
    run.preflight(
        facts(run, images, model, sampler.steps_per_epoch, evaluator_report) | ({"init": started} if started else {})
    )

    for _, batch in run.batches(loader, sampler, args.total_epochs):
        k = (run.step + 1) * interval - 1  # the iteration of the update, from 0; schedules count iterations
        lr, decoder_lr = learning_rates(args, k, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms: dict[str, torch.Tensor] = {}
        for micro in range(interval):
            rows = slice(micro * b, (micro + 1) * b)
            x = {
                name: follow(normalise(view[rows].to(run.device, non_blocking=True)), model)
                for name, view in batch.items()
            }  # [B, 3, S, S] in -1..1
            targets = None
            if args.gen_target != "self":
                targets = [x["x2"], x["x1"]] if args.gen_target == "other" else [x["clean"], x["clean"]]
            last = micro + 1 == interval
            with contextlib.ExitStack() as stack:
                if run.world > 1 and not last:  # gradients of all processes are averaged once an update
                    stack.enter_context(net.no_sync())  # type: ignore[operator]
                with run.autocast():
                    losses, z = net(x["x1"], x["x2"], targets)
                loss = torch.stack(list(losses.values())).sum()
                (loss / interval).backward()
            for name, value in {"loss": loss, **losses}.items():
                terms[name] = terms.get(name, 0) + value.detach() / interval

        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if optimizer_decoder is not None:
            optimizer_decoder.param_groups[0]["lr"] = decoder_lr
            optimizer_decoder.step()
            optimizer_decoder.zero_grad(set_to_none=True)
        m = target_momentum(args.base_momentum, k, total)
        model.momentum_update(m)

        mean = distributed.all_sum(torch.stack(list(terms.values()))) / run.world
        watched: dict[str, Any] = {}
        if run.log_due():
            unit = nn.functional.normalize(z.float(), dim=1)
            watched["feat/std"] = unit.std(0).mean() * unit.shape[1] ** 0.5  # 1: spread over the sphere, 0: collapsed
            if optimizer_decoder is not None:
                watched["decoder_lr"] = decoder_lr
            if "loss_mse" in terms:  # of a value in -1..1, a view
                watched["gen/pixel_mse"] = mean[list(terms).index("loss_mse")] / args.w_pix / 2
            watched |= dict(zip(terms, mean)) | {"train/loss": mean[0], "target_momentum": m}
            watched.pop("loss")
        run.log(mean[0], lr=lr, **watched)
        if run.step == 0 and run.rank == 0:
            shown = torch.cat([batch["x1"][:8], batch["x2"][:8]]).cpu().float() / 255
            run.image("views/x1_x2", make_grid(shown, nrow=8))
        if gallery is not None and gallery.due(run.step + 1):
            gallery.add(model, run.device, run.step + 1)
            if run.rank == 0:
                run.image("recovered/input_and_stages", gallery.picture())

    run.finish(next_command(args, images, run))
    return 0


def learning_rates(args: argparse.Namespace, k: int, per_epoch: int) -> tuple[float, float]:
    """Of LARS and of the decoder's Adam at iteration k."""
    common = (args.total_epochs, args.warmup_iters, args.warmup_ratio)
    return (
        learning_rate(args.lr, k, per_epoch, *common),
        learning_rate(args.decoder_lr, k, per_epoch, *common, args.decoder_lr_policy),
    )


def next_command(args: argparse.Namespace, images: ImageList, run: Run) -> str:
    """What to do with the checkpoint."""
    weights = quote(f"{run.dir}/checkpoint.pth")
    if images.has_labels:
        data = f"--data_dir {quote(str(args.data_dir))}"
        out = f"evaluate: python -m sage.main_knn --pretrained {weights} {data} --img_size {args.img_size}"
    else:
        out = f"backbone: python -m sage.lab.export --pretrained {weights} --out {quote(f'{run.dir}/backbone.pth')}"
    if args.mode == "byol":
        again = f"--config {quote(f'{run.dir}/config.json')} --mode sage --evaluator {weights}"
        out += f"; or train SaGe with it: python -m sage.train {again}"
    return out


def facts(run: Run, images: ImageList, model: SaGe, steps: int, evaluator: str) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    batch = args.imgs_per_gpu * run.world * args.update_interval
    trained = sum(p.numel() for p in [*model.online_net.parameters(), *model.head.parameters()])
    out = {
        "data": f"{args.data_dir}: {images.told()}",
        "batch": f"{batch} = {run.world} processes x {args.imgs_per_gpu} x {args.update_interval} accumulated, {steps} "
        "updates an epoch",
        "learning rate": f"LARS {args.lr}, 0.3 x batch / 256 would be {0.3 * batch / 256:.3g}",
        "parameters": f"{trained / 1e6:.2f} M of LARS",
        "loss": "loss1" + "".join(f" + {w:.4g} x {term}" for term, w in model.terms.items()),
        "expected initial loss": "loss1 about 4 (predictions at right angles to targets); 8 is the most, 0 the least",
        "estimated time": estimate(run, model, steps),
    }
    if model.decoder is not None:
        out["parameters"] += f", {sum(p.numel() for p in model.decoder.parameters()) / 1e6:.2f} M of the decoder's Adam"
        out["decoder learning rate"] = f"{args.decoder_lr}, {args.decoder_lr_policy}"
        if batch < 1024 and args.decoder_lr > 0.01:
            out["caution"] = f"Adam at {args.decoder_lr} is aggressive for a batch of {batch}; --decoder_lr 1e-3"
    if model.r_function is not None:
        out["evaluator"] = f"{evaluator}; batch norm {args.evaluator_bn}, input {args.evaluator_norm}"
    return out


@torch.no_grad()
def estimate(run: Run, model: SaGe, steps: int) -> str:
    """Minutes of the whole run from timed forward passes; a backward pass counts as two, for weights left out one."""
    args = run.args
    x = follow(torch.randn(args.imgs_per_gpu, 3, args.img_size, args.img_size, device=run.device), model)
    model.eval()

    def seconds(network: nn.Module, *inputs: Any) -> float:
        for _ in range(2):
            started = time.perf_counter()
            with run.autocast():
                out = network(*inputs)
            float((out[-1] if isinstance(out, list) else out).float().sum())
        return time.perf_counter() - started

    encoder = seconds(model.online_net[0], x)
    each = 8 * encoder  # two views: forward and backward online, forward of the target
    if model.decoder is not None:
        each += 6 * seconds(model.decoder, model.online_net[0](x)[-1])
    if model.r_function is not None:
        each += 6 * seconds(model.r_function[0], x)  # two real views, two recovered with a backward pass
    model.train()
    minutes = each * args.total_epochs * steps * args.update_interval / 60
    return f"about {max(1, round(minutes))} min for {args.total_epochs * steps} updates if data loading keeps up"


if __name__ == "__main__":
    cli(main)
