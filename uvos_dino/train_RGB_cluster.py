"""Training of the spatio-temporal block: python -m uvos_dino.train_RGB_cluster --basepath VIDEOS --dino_path DINO

Also torchrun --nproc-per-node 8 -m uvos_dino.train_RGB_cluster ...; the arms of the small tier are flags.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EpochSampler, Keyed, mix_key, tell
from shared_utils.flags import Parser, add_run_flags, boolean, natural, not_negative, positive
from shared_utils.run import Run, cli
from uvos_dino import losses, metrics, vision_transformer
from uvos_dino.data import (
    ALL,
    LAYOUTS,
    ClipAugment,
    Clips,
    Video,
    name_of,
    open_videos,
    read_mask,
    read_names,
    read_video,
    said,
    source_of,
    training_videos,
)
from uvos_dino.inference import segment
from uvos_dino.model_cluster import AttEncoder


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.train_RGB_cluster", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--basepath", "--data_dir", type=Path, default=Path("data/ytvis/train/JPEGImages"), help="folders "
      "of frames, or videos, anywhere below it")  # fmt: skip
    a("--train_list", type=Path, help="file of the videos (folder names) to take; default: all")
    a("--cache", action="store_true", help="decode all frames once and keep them in memory, 8 bits")
    a(
        "--resolution",
        type=positive,
        nargs=2,
        default=[192, 384],
        metavar=("H", "W"),
        help="frames are stretched to this",
    )
    a("--num_frames", type=positive, default=3, help="T, frames of a clip")
    a("--gap", type=natural, default=4, help="frames between them; smaller in short videos")
    a("--augment", type=boolean, default=True, help="grey, colour jitter and blur")
    a("--dino_path", "--encoder", default="dino_deitsmall8_pretrain.pth", help="weights of DINO or DINOv2: a file "
      "(.pth, .onnx), timm:NAME, or none (random)")  # fmt: skip
    a("--arch", choices=list(vision_transformer.ARCHS), default="vit_small", help="for --dino_path none")
    a("--patch_size", type=positive, default=8, help="for --dino_path none")
    a("--num_t", type=positive, default=1, help="blocks")
    a("--num_heads", type=positive, default=8, help="heads of a block")
    a("--drop", type=float, default=0.1, help="dropout of projection and MLP")
    a("--attn_drop_t", type=float, default=0.4, help="dropout of the block's attention")
    a("--num_points", type=positive, default=8, help="n, query positions of a step")
    a("--counts", type=_counts, default="auto", help="semantic positives, negatives, motion positives, negatives; "
      "30,200,10,50 are the release's for 24 x 48 patches; auto: the same shares of the grid at hand")  # fmt: skip
    a("--semantic_weight", type=not_negative, default=1.0, help="of L_sem; 0: without")
    a("--motion_weight", type=not_negative, default=1.0, help="of L_mot; 0: without")
    a("--point_weights", choices=["entropy", "uniform"], default="entropy", help="w of L_mot")
    a("--batch_size", type=positive, default=2, help="clips a step and process")
    a("--num_train_steps", type=natural, default=60000, help="0: the random block, as it is")
    a("--lr", type=float, default=4e-5, help="peak; cosine to 1e-6 by iteration")
    a("--wd", "--weight_decay", type=not_negative, default=0.1, help="weight decay of matrices")
    a("--keep_every", type=natural, default=1000, help="iterations between checkpoint_N.pth files that stay; 0: none")
    a("--probe_every", type=natural, default=0, help="iterations between evaluations of a few sequences (clusters, J); "
      "0: none")  # fmt: skip
    a("--dataset", choices=list(LAYOUTS), default="DAVIS", help="layout of --val_basepath")
    a("--val_basepath", type=Path, help="benchmark that is probed")
    a("--split", default="val", help=f"a list of the publisher's, or {ALL}: every folder of frames")
    a("--probe_videos", type=positive, default=4, help="the first so many sequences")
    a("--ratio", type=positive, default=10, help="r: every r-th frame gives keys, when probing")
    a("--tau", type=float, default=1.0, help="threshold of the clustering, when probing")
    add_run_flags(p, "uvos_dino/train/default")
    return p


def _counts(text: str) -> str | list[int]:
    return text if text == "auto" else [int(x) for x in text.split(",")]


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that make no sense, before anything is loaded."""
    if not args.lr > 0 or not args.tau > 0 or not 0 <= args.drop < 1 or not 0 <= args.attn_drop_t < 1:
        raise UserError("--lr and --tau must be above 0, --drop and --attn_drop_t at least 0 and below 1")
    if not args.semantic_weight and not args.motion_weight:
        raise UserError("--semantic_weight 0 --motion_weight 0: no loss is left")
    if args.probe_every and not args.val_basepath:
        raise UserError("--probe_every: needs --val_basepath, the benchmark whose sequences are segmented")


def resolve_counts(args: argparse.Namespace, patches: int) -> losses.Counts:
    """Positives and negatives for this grid. UserError where they do not fit into a frame."""
    if args.counts == "auto":
        counts = losses.Counts().scaled(patches)
    elif len(args.counts) == 4 and min(args.counts) > 0:
        counts = losses.Counts(*args.counts)
    else:
        raise UserError(f"--counts {args.counts}: must be auto or four numbers above 0, such as 30,200,10,50")
    if max(counts.sem_pos + counts.sem_neg, counts.mot_pos + counts.mot_neg) > patches:
        raise UserError(f"--counts {','.join(map(str, counts))}: more than the {patches} patches of a frame; give auto")
    if args.num_points > patches:
        raise UserError(f"--num_points {args.num_points}: a frame has {patches} patches")
    return counts


def param_groups(block: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, biases and norms without."""
    named = list(block.named_parameters())
    plain = [p for name, p in named if name.endswith(".bias") or p.dim() == 1]
    return [{"params": [p for name, p in named if not (name.endswith(".bias") or p.dim() == 1)]},
            {"params": plain, "weight_decay": 0.0}]  # fmt: skip


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Cosine from --lr to 1e-6, by iteration."""
    return 1e-6 + 0.5 * (args.lr - 1e-6) * (1 + math.cos(math.pi * step / args.num_train_steps))


class Iteration:
    """`iteration` of the checkpoint, which the release's evaluation reads."""

    def __init__(self, run: Run):
        self.run = run

    def state_dict(self) -> int:
        return self.run.step

    def load_state_dict(self, _: int) -> None:
        """The run's own progress counts."""


class Probe:
    """A few sequences with their annotations, in memory: number of clusters and J while training goes on."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.pictures: list[Tensor] = []  # of the last evaluation, one a sequence
        videos: list[Video] = open_videos(args.dataset, args.val_basepath, args.split)
        self.data = said(args.dataset, args.val_basepath, args.split, videos)
        videos = videos[: args.probe_videos]
        self.files = [path for video in videos for path in (*video.frames, *video.masks.values())]
        layout, self.videos = LAYOUTS[args.dataset], []
        for video in videos:
            masks = {t: read_mask(path, layout.binary) for t, path in video.masks.items()}
            truth = [masks[t] for t in sorted(masks)]
            numbers, starts = metrics.counted(truth, truth[0], layout.late)
            if not numbers:
                file = video.masks[min(masks)]
                later = " or later" * (layout.late != "background")
                raise UserError(
                    f"{file}: no object in the first annotated frame{later}, --probe_every has nothing to match"
                )
            known = {t: metrics.renumber(mask, numbers) for t, mask in masks.items()}
            present = {t: [start <= i for start in starts] for i, t in enumerate(sorted(masks))}  # objects that count
            self.videos.append((read_video(video.frames, tuple(args.resolution)), known, present))

    def __call__(self, model: AttEncoder, device: torch.device) -> dict[str, float]:
        """`probe/clusters`, mean number of them, and `probe/J`, mean over objects and frames, matched by frame."""
        model.eval()
        counts, scores = [], []
        self.pictures = []
        for frames, masks, present in self.videos:
            found = segment(model, frames, device, "imagenet", self.args.ratio, self.args.tau)
            counts.append(found.number)
            labels = found.labels.view(len(frames), -1, frames.shape[-1] // model.encoder.patch_size).numpy()
            self.pictures.append(self.picture(frames, labels))
            for t, mask in masks.items():
                shown = metrics.upsample(labels[t], *mask.shape)
                J = metrics.frame_ious(shown, mask, found.number, len(present[t]))[:, present[t]]
                if any(present[t]):
                    scores.append(metrics.best_mean(J))
        model.train()
        return {"probe/clusters": sum(counts) / len(counts), "probe/J": 100 * sum(scores) / len(scores)}

    @staticmethod
    def picture(frames: Tensor, labels: np.ndarray, count: int = 6) -> Tensor:
        """Frames [T, 3, H, W] in 0..1 and below them their clusters [T, h, w] in colours: [3, 2 H, count W]."""
        chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
        found = [metrics.coloured(labels[t], *frames.shape[2:]) for t in chosen]
        colours = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255
        return torch.cat([torch.cat(list(x), 2) for x in (frames[torch.from_numpy(chosen)], colours)], 1)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "uvos_dino", "train")
    check_flags(args)
    T, steps = args.num_frames, args.num_train_steps

    # Model: the encoder is frozen, the block is trained
    encoder, loaded = vision_transformer.load(args.dino_path, args.arch, args.patch_size)
    grid = encoder.grid(*args.resolution)
    counts = resolve_counts(args, math.prod(grid))
    if encoder.embed_dim % args.num_heads:
        raise UserError(f"--num_heads {args.num_heads}: does not divide the encoder's {encoder.embed_dim} channels")
    torch.manual_seed(mix_key(args.seed, 3) % 2**63)  # the block's start does not depend on the encoder's size
    model = AttEncoder(encoder, args.num_t, args.num_heads, args.drop, args.attn_drop_t).to(run.device)
    trained = distributed.wrap(model)
    optimizer = torch.optim.AdamW(
        param_groups(model.temporal_transformer), args.lr, weight_decay=args.wd, fused=run.device.type == "cuda"
    )

    # Data: virtual clips, drawn by (seed, index) alone
    unread = Counter[str]()
    videos = chosen_videos(args.basepath, args.train_list, unread)
    augment = ClipAugment(tuple(args.resolution), args.seed, args.augment)
    items = max(1, steps) * args.batch_size * run.world
    clips = Clips(videos, items, T, args.gap, tuple(args.resolution), augment, args.cache)
    sampler = EpochSampler(items, args.batch_size, args.seed, run.rank, run.world, shuffle=False)
    loader = run.loader(Keyed(clips, args.seed), sampler)
    probe = Probe(args) if args.probe_every else None

    run.track(model_state_dict=model, optimizer_state_dict=optimizer, iteration=Iteration(run))
    run.reads([path for video in videos for path in video], *([probe.files] if probe else []))
    told = facts(run, videos, sum(clips.lengths), model, counts, grid, loaded)
    if unread:
        told["not read"] = tell(unread)
    run.preflight({**told, "probed": f"the first {len(probe.videos)} of {probe.data}"} if probe else told)
    if not steps:  # the random block
        run.save()

    for _, clip in run.batches(loader, sampler, 1 if steps else 0):
        lr = learning_rate(args, run.step)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        with run.autocast():
            z, A = trained(clip.to(run.device, non_blocking=True))  # [B, T, N, C], [B, T N, T N]
        # The same positions for every frame, clip and process.
        dealt = torch.Generator().manual_seed(mix_key(args.seed, run.step, 1) % 2**63)
        P = losses.sample_points(z.shape[2], args.num_points, dealt).to(run.device)
        slot_loss = losses.semantic(z, A, P, counts.sem_pos, counts.sem_neg)
        motion_loss = losses.motion(A, P, T, counts.mot_pos, counts.mot_neg, weights=args.point_weights)
        loss = args.semantic_weight * slot_loss + args.motion_weight * motion_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        watched = losses.watch(A.detach(), T) if run.log_due() else {}
        probed: dict[str, float] = {}
        if probe and (run.step == 0 or (run.step + 1) % args.probe_every == 0):
            probed = probe(model, run.device)
            if run.rank == 0:
                run.image("probe/frames_clusters", torch.cat(probe.pictures, 1))
        each = distributed.all_sum(torch.stack([loss, slot_loss, motion_loss]).detach()) / run.world
        watched |= {"slot_loss": each[1], "motion_loss": each[2], "train/loss": each[0]}
        run.log(each[0], lr=lr, evaluated=probed, **watched)
        if args.keep_every and (run.step + 1) % args.keep_every == 0 and run.rank == 0:
            kept = {"iteration": run.step + 1, "model_state_dict": model.state_dict(), "loss": float(loss.detach())}
            checkpoint.save(run.dir / f"checkpoint_{run.step + 1}.pth", {**kept, "args": {"num_heads": args.num_heads}})

    file = quote(f"{run.dir}/checkpoint.pth")
    hint = f"segment {quote(str(source_of(videos[0])))}"
    if probe:
        hint = f"eval_oneshot --basepath {quote(str(args.val_basepath))} --dataset {args.dataset}"
        hint += (
            f" --split {quote(args.split)} --resolution {args.resolution[0]} {args.resolution[1]} --eval_norm imagenet"
        )
    run.finish(f"next: python -m uvos_dino.{hint} --resume_path {file} --ratio {args.ratio} --tau {args.tau}")
    return 0


def chosen_videos(root: Path, file: Path | None, unread: Counter[str] | None = None) -> list[list[Path]]:
    """Frames of the training videos, of those that `file` names. UserError for a name without frames."""
    videos = training_videos(root, unread)
    if file is None:
        return videos
    if not file.is_file():
        raise UserError(f"--train_list {file}: no such file")
    by_name: dict[str, list[Path]] = {}
    for video in videos:
        name = name_of(video)
        if name in by_name:
            raise UserError(
                f"--train_list {file}: {video[0].parent} and {by_name[name][0].parent} have {name} both; give "
                "--basepath the folder that holds one of them"
            )
        by_name[name] = video
    names = read_names(file)
    absent = [name for name in names if name not in by_name]
    if absent or not names:
        raise UserError(f"--train_list {file}: {absent[0] if absent else 'nothing'}: no such video below {root}")
    return [by_name[name] for name in names]


def facts(
    run: Run,
    videos: list[list[Path]],
    frames: int,
    model: AttEncoder,
    counts: losses.Counts,
    grid: tuple[int, int],
    loaded: str,
) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    return {
        "data": f"{args.basepath}: {len(videos)} videos"
        f"{f' named by {args.train_list}' if args.train_list else ''}, {frames} frames, stretched to "
        f"{args.resolution[0]} x {args.resolution[1]} = {grid[0]} x {grid[1]} patches",
        "encoder": loaded,
        "batch": f"{args.batch_size * run.world} clips of {args.num_frames} frames = {run.world} processes x "
        f"{args.batch_size}, {args.num_train_steps} iterations",
        "learning rate": f"{args.lr}, cosine to 1e-6; the release's script: 1e-5 for 8 clips",
        "parameters": f"{sum(p.numel() for p in model.temporal_transformer.parameters()) / 1e6:.2f} M trained, "
        f"{sum(p.numel() for p in model.encoder.parameters()) / 1e6:.2f} M frozen",
        "positives and negatives": f"semantic {counts.sem_pos}/{counts.sem_neg}, motion {counts.mot_pos}/"
        f"{counts.mot_neg}, {args.num_points} points",
        "expected initial loss": f"about {0.8 * args.semantic_weight + args.motion_weight:.1f}: while the attention is "
        "diffuse, L_mot is its margin 1 and L_sem (0.9 - c) + (c - 0.1) for a cosine c",
        "estimated time": estimate(run, model),
    }  # fmt: skip


def estimate(run: Run, model: AttEncoder) -> str:
    """Minutes of the whole run from a timed forward pass; a step is about three."""
    args = run.args
    clip = torch.zeros(args.batch_size, args.num_frames, 3, *args.resolution, device=run.device)
    state = torch.get_rng_state()
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad(), run.autocast():
            out: Tensor = model(clip).A
        out.sum().item()
        seconds = time.perf_counter() - started
    torch.set_rng_state(state)
    return f"about {max(1, round(3 * seconds * args.num_train_steps / 60))} min if data loading keeps up"


if __name__ == "__main__":
    cli(main)
