"""Pretraining with FAME (paper 2109.15130): python -m fame.train DATA --dataset k400

Also torchrun --nproc-per-node 8 -m fame.train ...; the arms of the ablation are flags.
"""

import argparse
import math
import time
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from fame import augment
from fame.backbone import ARCHS, RELEASE, build
from fame.data import DATASETS, TwoClips, VideoSet, add_data_flags, check_data_flags, open_videos
from fame.fame import MASKS, Fame
from fame.moco.builder import QUEUE_ORDERS, MoCo, ReleaseKeys, contrast_rank, info_nce, passes
from fame.network import start_from
from shared_utils import UserError, distributed
from shared_utils.data import EpochSampler, Keyed, mix_key, sample_rng, tell
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_run_flags, natural, not_negative, positive
from shared_utils.layout import place
from shared_utils.pictures import make_grid
from shared_utils.preflight import ONE_NORM, about, seconds
from shared_utils.run import Run, cli


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="fame.train", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_data_flags(p)
    a("-a", "--arch", choices=ARCHS, default="I3D", help=f"not in the release: all but {' and '.join(RELEASE)}")
    a("--width", type=positive, default=16, help="channels of the first layer of tiny")
    a("--init", metavar="FILE|RUN|torchvision:NAME", help="start from these weights: a checkpoint or the folder of a "
      "run, a public file, or torchvision's network (Kinetics-400); heads of another kind start new")  # fmt: skip
    a("--mask", choices=MASKS, default="full", help="what is kept of a clip: the paper's mask; motion alone (seed), a "
      "Gaussian, a grid, blobs that ignore the clip (random); erase: a still frame blended in; none: MoCo")  # fmt: skip
    a("--beta", type=float, default=0.5, help="beta, share of the pixels that are foreground")
    a("--hue", choices=["release", "correct"], default="release", help="2 pi twice in the colour's angle, or once")
    a("--bins", type=positive, default=10, help="bins of a colour histogram along each of three axes (release: 10)")
    a("--laplace", type=float, default=1.0, help="added to each bin of the background's histogram (release: 1)")
    a("--alpha", type=float, default=1.0, help="opacity of the other clip's part (release: 1)")
    a("--merge_views", choices=["first", "both"], default="first", help="which of the two clips is merged")
    a("--queue_order", choices=QUEUE_ORDERS, default="release", help="the second pass sees the queue with the first "
      "pass's keys, a false negative for each clip; or both see it as it was (clean)")  # fmt: skip
    a("--moco_dim", type=positive, default=128, help="D, length of an embedding")
    a("--moco_k", type=positive, help="K, columns of the queue; default 65536 for k400, else 2048")
    a("--moco_m", type=float, default=0.999, help="m, momentum of the key encoder")
    a("--moco_t", type=float, default=0.1, help="T, temperature")
    a("--jitter", choices=["torchvision", "kornia_old"], default="torchvision", help="formulas of the colour jitter")
    a("--blur_sigma", type=float, help="of the blur, in pixels, for the whole run; default: drawn from U(0.1, 2) by "
      "--seed")  # fmt: skip
    a("--bn_splits", type=positive, default=1, help="batch norm and merge over so many shares of a process's batch, as "
      "if each were a process; on one GPU take 8 for the paper's setting")  # fmt: skip
    a(
        "-b",
        "--batch_size",
        type=positive,
        default=256,
        help="videos a step, all processes together; must divide --moco_k",
    )
    a("--epochs", type=natural, default=200, help="0: none, the network as it was initialised is stored")
    a("--lr", "--learning_rate", type=float, default=0.03)
    a("--cos", action=argparse.BooleanOptionalAction, default=False, help="cosine by epoch instead of --schedule")
    a(
        "--schedule",
        type=natural,
        nargs="*",
        default=[120, 160],
        help="epochs at which the rate is multiplied by --lr_decay",
    )
    a("--lr_decay", "--learning_rate_decay", type=float, default=0.1)
    a("--warmup", action="store_true", help="linear from --wp_lr to --lr up to the first entry of --schedule")
    a("--wp_lr", "--warmup_learning_rate", type=not_negative, default=0.0025)
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=1e-4)
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_run_flags(p, "fame/pretrain/default")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """Fill in what depends on other flags; UserError for flags that contradict each other, before data is opened."""
    args.moco_k = DATASETS[args.dataset].queue if args.moco_k is None else args.moco_k
    args.blur_sigma = augment.draw_sigma(args.seed) if args.blur_sigma is None else args.blur_sigma
    if not args.moco_t > 0 or not args.lr > 0 or not args.blur_sigma > 0 or args.laplace <= 0:
        raise UserError("--moco_t, --lr, --blur_sigma and --laplace must be above 0")
    if not 0 <= args.moco_m <= 1 or not 0 <= args.beta <= 1 or not 0 <= args.alpha <= 1:
        raise UserError("--moco_m, --beta and --alpha must lie in 0..1")
    check_optimizer(args)
    if args.warmup and not args.schedule:
        raise UserError("--warmup climbs up to the first entry of --schedule, which is empty")
    if args.batch_size % (world * args.bn_splits):
        raise UserError(
            f"--batch_size {args.batch_size} does not divide over {world} processes x {args.bn_splits} --bn_splits"
        )
    if args.batch_size // (world * args.bn_splits) < 2:
        raise UserError(
            "1 clip a process (or --bn_splits share): the background comes from another clip of it, so nothing would "
            "be merged; raise --batch_size or lower --bn_splits"
        )


def check_optimizer(args: argparse.Namespace) -> None:
    """UserError for a flag of the schedule that is out of range."""
    if not args.lr_decay > 0:
        raise UserError(f"--lr_decay {args.lr_decay}: must be above 0")


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Cosine to 0, or warm-up and steps, or steps; by epoch, as in the release."""
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    if args.warmup and epoch < args.schedule[0]:
        return args.wp_lr + (args.lr - args.wp_lr) * epoch / args.schedule[0]
    milestones = args.schedule[1:] if args.warmup else args.schedule
    return args.lr * args.lr_decay ** sum(epoch >= milestone for milestone in milestones)


@torch.no_grad()
def telemetry(q: list[Tensor], k: list[Tensor], logits: list[tuple[Tensor, Tensor]], model: MoCo) -> dict[str, Tensor]:
    """What to watch, over all processes: the release's accuracies, signs of collapse.

    Args: q, k: unit embeddings [B, D] of views 0 and 1 of this process.
    """
    rank = distributed.gather(contrast_rank(logits))
    q, k = [distributed.gather(x) for x in q], [distributed.gather(x) for x in k]
    out = {f"moco_train/acc{n}": 100 * (rank < n).float().mean() for n in (1, 5)}
    out["feat/std"] = q[1].std(0).mean() * q[1].shape[1] ** 0.5  # 1: spread over the sphere, 0: collapsed
    out["sim/positive"], out["sim/negative"] = (q[0] * k[1]).sum(1).mean(), (q[0] @ model.queue.mean(1)).mean()
    out["sim/same_view"] = (q[1] * k[1]).sum(1).mean()  # of --queue_order release's false negatives
    return out


def picture(clips: list[Tensor], mask: Tensor, count: int = 8) -> Tensor:
    """Middle frames of raw clips [B, 3, T, H, W] and masks [B, H, W], a row each, as one picture."""
    rows = [clip[:count, :, clip.shape[2] // 2].float().cpu() for clip in clips]
    rows.insert(1, mask[:count, None].float().cpu().expand_as(rows[0]))
    return make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "fame", "pretrain")
    check_data_flags(args)
    check_flags(args, run.world)
    local, splits = args.batch_size // run.world, args.bn_splits

    # Data: two clips of each video, cropped and flipped by the loader
    videos = open_videos(args, train=True)
    clips = TwoClips(videos, args.crop_size, args.min_scale, args.hflip)
    if args.batch_size > len(videos):
        fits = len(videos) // (run.world * splits) * run.world * splits
        queue = max(2, min(args.moco_k, 2 * len(videos)) // max(1, fits)) * fits  # check_batch and the plan accept it
        raise UserError(
            f"--batch_size {args.batch_size}: the data has {len(videos)} videos; give --batch_size {fits} and "
            f"--moco_k {queue}"
            if fits >= 2 * run.world * splits
            else f"--batch_size {args.batch_size}: the data has {len(videos)} videos; give a lower --bn_splits too"
        )
    sampler = EpochSampler(len(clips), local, args.seed, run.rank, run.world)
    loader = run.loader(Keyed(clips, args.seed), sampler)

    # Model
    encoder = build(args.arch, args.moco_dim, width=args.width)
    start = {"start": start_from(encoder, args.init)} if args.init else {}
    model = MoCo(encoder, args.moco_dim, args.moco_k, args.moco_m, args.moco_t)
    model.check_batch(args.batch_size)
    distributed.convert_norm(model, "split" if splits > 1 else "local", splits)
    place(model, run.device, dims=3).train()
    query = distributed.wrap(model)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=run.device.type == "cuda"
    )
    fame = Fame(args.mask, args.beta, args.hue, args.bins, args.laplace, args.alpha, args.seed)
    colours = augment.Colours(args.crop_size, args.blur_sigma, args.jitter)
    shares = [run.rank * splits + n for n in range(splits)]
    run.track(state_dict=ReleaseKeys(model), optimizer=optimizer)
    run.reads([video.path for video in videos.videos])
    run.preflight(facts(run, videos, clips, model, sampler.steps_per_epoch) | start)

    wait, since = 0.0, time.perf_counter()
    for epoch, batch in run.batches(loader, sampler, args.epochs):
        wait += run.data_wait
        lr = learning_rate(args, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x0, x1 = batch["clips"].to(run.device, non_blocking=True).unbind(1)  # [B, 3, T, S, S] in [0, 1]

        # View 0 keeps its foreground on another clip's background, view 1 stays; then the colours.
        merged, mask = fame(x0, run.step, shares)
        other = fame(x1, ~run.step, shares)[0] if args.merge_views == "both" else x1
        if run.due(args.image_every):
            run.image("clips/first_mask_merged_second", picture([x0, merged, other], mask))
        orders = [torch.randperm(4, generator=keyed(args.seed, run.step, 3 + view)).tolist() for view in (0, 1)]
        views = [colours(x, batch["colours"][:, i], orders[i]) for i, x in enumerate((merged, other))]

        # Both views are query in turn; the key encoder follows once, by the weights of before this step's update.
        with run.autocast():
            q0, q1 = query(views)  # [B, D]
        model.update_key_encoder()
        with run.autocast():
            k1, k0 = (model.embed_keys(views[i], keyed(args.seed, run.step, i)) for i in (1, 0))
        logits = passes(model, q0, q1, k0, k1, args.queue_order)
        loss = (info_nce(*logits[0]) + info_nce(*logits[1])) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        watched: dict[str, Any] = {}
        if run.log_due():
            watched = dict(telemetry([q0.detach(), q1.detach()], [k0, k1], logits, model))
            watched["data_share"] = wait / max(1e-9, time.perf_counter() - since)  # of the time, spent on waiting
            wait, since = 0.0, time.perf_counter()
        model.enqueue([k1, k0])
        mean = distributed.all_sum(loss.detach()) / run.world
        run.log(mean, lr=lr, **watched)

    write_result(run.dir, {"minutes": round(run.minutes(), 2)})
    run.finish(*hints(args, videos, f"{run.dir}/checkpoint.pth"))
    return 0


def hints(args: argparse.Namespace, videos: VideoSet, weights: str) -> list[str]:
    """The next commands, with this run's checkpoint and data."""
    data = f"{quote(str(args.data))} --dataset {args.dataset} --pretrained {quote(weights)}"
    data += f" --fold {args.fold}" * (args.fold != 1) + " --bad_videos skip" * (args.bad_videos == "skip")
    retrieve = [f"retrieve: python -m fame.main_retrieve {data}"] if videos.classes else []
    return [*retrieve, f"look at: python -m fame.main_cam {data}"]


def keyed(*keys: int) -> torch.Generator:
    """The same generator on every process."""
    return torch.Generator().manual_seed(mix_key(*keys) >> 1)


def facts(run: Run, videos: VideoSet, clips: TwoClips, model: MoCo, steps: int) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    counts = sorted(videos.count(i) for i in range(len(videos)))
    chance = math.log(args.moco_k) + 1 / (2 * args.moco_dim * args.moco_t**2)
    of = f" of {len(videos.classes)} classes" if DATASETS[args.dataset].split else ""
    out = {
        "data": f"{args.data} ({args.dataset}): {len(videos)} videos{of}, {counts[0]} to {counts[-1]} frames; "
        f"a clip is {args.frame_per_clip} x {args.stride}",
        "loader": throughput(clips, args.workers),
        "batch": f"{args.batch_size} = {run.world} processes x {args.bn_splits} splits x "
        f"{args.batch_size // (run.world * args.bn_splits)}, {steps} steps an epoch",
        "learning rate": f"{args.lr}, {'cosine' if args.cos else 'steps'} by epoch; release: 0.01 for 64 videos",
        "parameters": f"{sum(p.numel() for p in model.encoder_q.parameters()) / 1e6:.2f} M trained",
        "queue": f"{args.moco_k} = {args.moco_k / (2 * len(videos)):.2f} epochs of keys, order {args.queue_order}",
        "mask": f"{args.mask}, beta {args.beta}, hue {args.hue}; blur sigma {args.blur_sigma}",
        "expected initial loss": f"at most {chance:.2f} = log K + 1 / (2 D T^2), lower as far as the views are alike; "
        "then up while keys fill the queue, and down",
        "estimated time": estimate(run, model, steps),
    }
    if videos.unread:
        out["not read"] = f"{tell(videos.unread)} between the videos"
    if args.batch_size // (run.world * args.bn_splits) == args.batch_size:
        out["caution"] = ONE_NORM
    if args.moco_k > 2 * len(videos):
        better = max(2, 2 * len(videos) // args.batch_size) * args.batch_size
        out["caution, queue"] = (
            f"--moco_k {args.moco_k} holds more than the {2 * len(videos)} keys of an epoch of {len(videos)} videos: "
            f"negatives are older clips of the same videos too; give --moco_k {better}"
        )
    return out


def throughput(clips: TwoClips, workers: int, items: int = 4) -> str:
    """Clips a second, from a few timed items; the global generators stay as they are."""
    with sample_rng(0):
        clips[0]
        started = time.perf_counter()
        for index in range(items):
            clips[index * len(clips) // items]
    rate = 2 * items / (time.perf_counter() - started)
    return f"about {rate:.0f} clips/s a process that loads, {max(1, workers)} of them"


@torch.no_grad()
def estimate(run: Run, model: MoCo, steps: int) -> str:
    """Minutes of the whole run from two timed forward passes; a step has 2 with gradient and 2 without: 8."""
    args, encoder = run.args, model.encoder_k
    shape = args.batch_size // run.world, 3, args.frame_per_clip, args.crop_size, args.crop_size
    x = torch.rand(shape, device=run.device)
    passed = seconds(run, encoder, lambda: encoder(x))
    steps *= args.epochs
    return about(passed * 8 * steps / 60, steps)


if __name__ == "__main__":
    cli(main)
