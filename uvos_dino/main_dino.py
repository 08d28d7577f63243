"""A small DINO of our own on images, frames or videos: python -m uvos_dino.main_dino --data_dir FOLDER

Self-distillation with multi-crop, small enough for one CPU core, without labels; `--dino_path RUN/checkpoint.pth` takes
the teacher.
"""

import argparse
import copy
import math
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared_utils import UserError, augment, distributed
from shared_utils.data import EpochSampler, mix_key, tell
from shared_utils.flags import Parser, add_run_flags, natural, not_negative, positive
from shared_utils.init import add_init_flag
from shared_utils.pictures import make_grid
from shared_utils.preflight import about, seconds
from shared_utils.run import Run, cli
from uvos_dino import vision_transformer
from uvos_dino.data import decoded, training_videos
from uvos_dino.dino import DinoLoss, Network, views


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.main_dino", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--data_dir", type=Path, default=Path("data/frames"), help="holds train/, or "
      "images and videos anywhere below it")  # fmt: skip
    a(
        "--image_size",
        type=positive,
        nargs=2,
        default=[120, 214],
        metavar=("H", "W"),
        help="images are kept at this size",
    )
    a("--every", type=positive, default=1, help="take every so many-th image of a folder, or of a video")
    a("--arch", choices=list(vision_transformer.ARCHS), default="vit_little")
    a("--patch_size", type=positive, default=8)
    a("--drop_path", type=float, default=0.1, help="stochastic depth of the student")
    a("--out_dim", type=positive, default=1024, help="K, prototypes")
    a("--hidden_dim", type=positive, default=512)
    a("--bottleneck_dim", type=positive, default=128)
    a("--global_size", type=positive, default=96, help="pixels of the two global crops")
    a("--local_size", type=positive, default=48, help="pixels of the local crops")
    a("--local_crops", type=natural, default=4)
    a("--global_scale", type=float, nargs=2, default=[0.25, 1.0], help="area of a global crop")
    a("--local_scale", type=float, nargs=2, default=[0.05, 0.25], help="area of a local crop")
    a("--student_temp", type=float, default=0.1)
    a("--teacher_temp", type=float, default=0.04)
    a("--momentum_teacher", type=float, default=0.99, help="of the teacher's weights, cosine to 1")
    a("--batch_size", type=positive, default=64, help="images a step, all processes together")
    a("--epochs", type=positive, default=100)
    a("--lr", type=float, default=5e-4, help="peak, cosine to 1e-6")
    a("--warmup", type=float, default=0.1, help="share of the steps with a rising rate")
    a("--freeze_last", type=float, default=0.02, help="share of the steps in which the prototypes stay")
    a("--wd", "--weight_decay", type=not_negative, default=0.04)
    a("--clip_grad", type=float, default=3.0)
    add_init_flag(p)
    add_run_flags(p, "uvos_dino/dino/default")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that make no sense, before anything is loaded."""
    for name in ("global_size", "local_size"):
        if getattr(args, name) < args.patch_size or getattr(args, name) % args.patch_size:
            raise UserError(f"--{name} {getattr(args, name)}: must be a multiple of --patch_size {args.patch_size}")
    for name in ("global_scale", "local_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            raise UserError(f"--{name} {low} {high}: must rise, above 0 and up to 1")
    if not args.lr > 0 or not args.student_temp > 0 or not args.teacher_temp > 0:
        raise UserError("--lr, --student_temp and --teacher_temp must be above 0")
    if args.batch_size % world:
        raise UserError(f"--batch_size {args.batch_size} does not divide over {world} processes")


class Frames(Dataset):
    """All images in memory, 8 bits [N, 3, H, W]; indexed by the sampler's (epoch, index). UserError if too many."""

    def __init__(self, videos: list[list[Path]], size: tuple[int, int], every: int):
        self.paths = [path for files in videos for path in files[::every]]
        self.parts = decoded(videos, size, every)  # one a folder or video
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        part = bisect_right(self.ends, key[1])
        return self.parts[part][key[1] - self.ends[part]]  # from its end


def start(args: argparse.Namespace) -> tuple[vision_transformer.VisionTransformer, str]:
    """The student's backbone and a line about its weights: new, or those of --init, whose position table it then has.

    UserError where --arch and --patch_size do not name the network of the file.
    """
    if not args.init:
        return vision_transformer.build(args.arch, args.patch_size, args.global_size, args.drop_path), "new weights"
    given, loaded = vision_transformer.load(args.init, args.arch, args.patch_size, "--init")
    if (given.embed_dim, given.depth) != vision_transformer.ARCHS[args.arch] or given.patch_size != args.patch_size:
        fitting = [name for name, size in vision_transformer.ARCHS.items() if size == (given.embed_dim, given.depth)]
        name = fitting[0] if fitting else f"of width {given.embed_dim} and depth {given.depth}, which is none of these"
        raise UserError(f"--init {args.init}: give --arch {name} --patch_size {given.patch_size}")
    side = math.isqrt(given.pos_embed.shape[1] - 1) * given.patch_size
    backbone = vision_transformer.build(args.arch, args.patch_size, side, args.drop_path)
    backbone.load_state_dict(given.state_dict())
    return backbone, loaded


def schedule(args: argparse.Namespace, step: int, steps: int) -> tuple[float, float]:
    """Learning rate (linear warm-up, cosine to 1e-6) and the teacher's momentum (cosine to 1)."""
    warm = max(1, round(args.warmup * steps))
    lr = args.lr * (step + 1) / warm
    if step >= warm:
        lr = 1e-6 + 0.5 * (args.lr - 1e-6) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return lr, 1 - 0.5 * (1 - args.momentum_teacher) * (1 + math.cos(math.pi * step / steps))


def estimate(run: Run, student: Network, steps: int) -> str:
    """Of the teacher's forward passes over the global crops, and the student's over all, backward as two forward."""
    args, local = run.args, run.args.batch_size // run.world

    def took(crops: int, size: int) -> float:
        x = torch.zeros(crops * local, 3, size, size, device=run.device)
        return seconds(run, student, lambda: student([x]))

    small = took(args.local_crops, args.local_size) if args.local_crops else 0.0
    return about((4 * took(2, args.global_size) + 3 * small) * steps / 60, steps)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "uvos_dino", "dino")
    check_flags(args, run.world)
    unread = Counter[str]()
    root = args.data_dir / "train" if (args.data_dir / "train").is_dir() else args.data_dir
    frames = Frames(training_videos(root, unread), tuple(args.image_size), args.every)
    sampler = EpochSampler(len(frames), args.batch_size // run.world, args.seed, run.rank, run.world)
    loader = run.loader(frames, sampler)
    steps = args.epochs * sampler.steps_per_epoch

    backbone, weights = start(args)
    student = Network(backbone, args.out_dim, args.hidden_dim, args.bottleneck_dim).to(run.device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    criterion = DinoLoss(args.out_dim, args.student_temp, args.teacher_temp).to(run.device)
    decayed = [p for p in student.parameters() if p.dim() > 1]
    plain = [p for p in student.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.wd, fused=run.device.type == "cuda")
    trained = distributed.wrap(student)
    run.track(student=student, teacher=teacher, optimizer=optimizer, dino_loss=criterion)
    run.reads(frames.paths)
    run.preflight(
        {
            "data": f"{root}: {len(frames)} images at {args.image_size[0]} x {args.image_size[1]}, from "
            f"{len(frames.parts)} folders or videos",
            **({"not read": tell(unread)} if unread else {}),
            "encoder": weights,
            "batch": f"{args.batch_size}, {sampler.steps_per_epoch} steps an epoch, {steps} in all; "
            f"2 crops of {args.global_size} and {args.local_crops} of {args.local_size}",
            "learning rate": f"{args.lr}; DINO's .0005 for 256 images would be {0.0005 * args.batch_size / 256:.3g}",
            "parameters": f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M of the encoder",
            "expected initial loss": f"about {math.log(args.out_dim):.2f} = log K",
            "estimated time": estimate(run, student, steps),
        }
    )

    crops = 2 + args.local_crops
    for _, images in run.batches(loader, sampler, args.epochs):
        lr, m = schedule(args, run.step, steps)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        images = images.to(run.device, non_blocking=True).float() / 255  # [B, 3, H, W]
        dealt = torch.Generator().manual_seed(mix_key(args.seed, run.step, 5) % 2**63)
        sizes = [(args.global_size, args.global_scale)] * 2 + [(args.local_size, args.local_scale)] * args.local_crops
        seen = [views(images, size, tuple(scale), dealt, run.rank, run.world) for size, scale in sizes]
        groups_ = [torch.cat(seen[:2])] + ([torch.cat(seen[2:])] if args.local_crops else [])

        with run.autocast():
            with torch.no_grad():
                taught = teacher(groups_[:1])  # [2 B, K]
            said = trained(groups_)  # [crops B, K]
        loss = criterion(said, taught, crops)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
        if run.step < args.freeze_last * steps:
            student.head.prototypes.grad = None
        optimizer.step()
        criterion.update(taught)
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters()):
                slow.lerp_(fast, 1 - m)

        watched: dict[str, Any] = {}
        if run.log_due():  # both near log K: collapsed to uniform; both near 0: collapsed to one prototype
            p = ((taught.float() - criterion.center) / args.teacher_temp).softmax(-1)
            watched["teacher/entropy"] = -(p * (p + 1e-10).log()).sum(-1).mean()
            watched["teacher/entropy_of_mean"] = -(p.mean(0) * (p.mean(0) + 1e-10).log()).sum()
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, **watched)
        if run.step == 0 and run.rank == 0:
            shown = torch.cat([x[:8] for x in seen[:2]])
            run.image(
                "views/two_global", make_grid(augment.denormalise(shown).cpu(), nrow=min(8, len(images)), padding=2)
            )

    here, file = quote(str(args.data_dir)), quote(f"{run.dir}/checkpoint.pth")
    run.finish(f"next, on frames or videos: python -m uvos_dino.train_RGB_cluster --basepath {here} --dino_path {file}")
    return 0


if __name__ == "__main__":
    cli(main)
