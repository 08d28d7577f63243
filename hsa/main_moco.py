"""Pretraining of CsMl, alias HSA (paper 2012.02733): python -m hsa.main_moco --data_dir IMAGENET

Also torchrun --nproc-per-node 8 -m hsa.main_moco ...; the arms of the ablation are flags.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hsa import arch, losses
from hsa.builder import CsMl, ReleaseKeys
from hsa.cutmix import draw_box, mix_shares
from hsa.data import Neighbours, Views, small_crop, training_images
from shared_utils import UserError, augment, distributed, feed, timm_nets
from shared_utils.data import EpochSampler, ImageList, mix_key
from shared_utils.flags import (
    Parser,
    add_aug_flag,
    add_run_flags,
    boolean,
    floats,
    ints,
    natural,
    not_negative,
    positive,
)
from shared_utils.init import HEADS, add_init_flag, initialise
from shared_utils.knn_watch import add_knn_flag, watch
from shared_utils.layout import follow, place
from shared_utils.neighbours import features
from shared_utils.pictures import make_grid
from shared_utils.preflight import ONE_NORM, about, check_images, queue_caution, seconds
from shared_utils.run import Run, cli

INIT_DROP = (*HEADS, *arch.DROP)  # of a file for --init


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="hsa.main_moco", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--data_dir", type=Path, default=Path("data/imagenet"), help="holds train/CLASS/*.jpg, or images of your own: "
      "class folders, or files without labels")  # fmt: skip
    a("--img_size", type=positive, default=224, help="pixels of a crop")
    a("--per_class", type=natural, default=0, help="first so many training images of each class; 0: all")
    a("--cache", action="store_true", help="decode all images once and keep them in memory")
    a("--arch", choices=arch.ARCHS, default="resnet50", help="timm:NAME: any of timm's, of pooled features alone")
    a("--width", type=positive, default=64, help="channels of the first stage")
    a("--stem", choices=arch.STEMS, default="imagenet")
    a("--mode", choices=["release", "paper", "moco"], default="release", help="the released method; with the paper's "
      "second level and multi-crop (reconstructed); or the baseline MoCo v2 without neighbours")  # fmt: skip
    a("--mix", choices=["cutmix", "none"], help="third group of the loss (default: cutmix; none for --mode moco)")
    a("--neighbours", choices=["knn", "random", "label"], default="knn", help="nearest in feature space, or a control: "
      "random images, or images of the same class")  # fmt: skip
    a("--inter_weight", type=not_negative, help="w_3, weight of level 3's loss (default: 1 for --mode paper, else 0)")
    a("--inter_head", choices=arch.INTER_HEADS, default="mlp", help="head of level 3")
    a(
        "--crops",
        type=natural,
        help="small crops of the anchor, query encoder only (default: 6 for --mode paper, else 0)",
    )
    a("--crop_size", type=natural, default=0, help="pixels of a small crop; 0: 96/224 of --img_size")
    a("--min_scale", type=float, help="least area of a crop (default: .2, and .14 beside small crops)")
    a("--lam", type=floats, default="0.5,0.5", help="(a, b): weights of the own key and of the other image's key")
    a("--warmup_epochs", type=natural, default=11, help="epochs with (a, b) = (1, 0)")
    a("--clus_pos_num", type=positive, default=5, help="K, neighbours of an image")
    a("--cluster_freq", type=positive, default=5, help="epochs between refreshes of the neighbours")
    a("--feature_dir", type=Path, help="keep the refresh's features in a file there, shared by the processes, instead "
      "of in memory (ImageNet: 10.5 GB); auto: in the run's own folder; no two runs may share one")  # fmt: skip
    a("--alpha", type=float, default=2.0, help="CutMix ratio ~ Beta(alpha, alpha)")
    a("--moco_dim", type=positive, default=128, help="D, length of an embedding")
    a("--moco_k", type=positive, default=65536, help="columns of the queue")
    a("--moco_m", type=float, default=0.999, help="m, momentum of the key encoder")
    a("--moco_t", type=float, default=0.2, help="tau, temperature")
    a("--aug_plus", type=boolean, default=True, help="MoCo v2's augmentation (false: v1's)")
    a("--bn_splits", type=positive, default=1, help="batch norm over so many shares of a process's batch, as if each "
      "were a process; on one GPU take 8 for the paper's setting")  # fmt: skip
    a("--batch_size", type=positive, default=256, help="images a step, all processes together; must divide --moco_k")
    a(
        "--end_epoch",
        "--epochs",
        type=natural,
        default=200,
        help="epochs of training; 0: none, the network as it was initialised is stored",
    )
    a("--init_lr", "--lr", type=float, default=0.03, help="learning rate of the first epoch")
    a("--decay_method", choices=["cos", "step"], default="cos", help="by epoch: cosine to 0, or by --schedule")
    a("--schedule", type=ints, default="120,160", help="epochs at which `step` multiplies by --lr_decay")
    a("--lr_decay", type=float, default=0.1, help="factor of --decay_method step")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=1e-4)
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_aug_flag(p)
    add_knn_flag(p)
    add_init_flag(p)
    add_run_flags(p, "hsa/pretrain/default")
    return p


def resolve(args: argparse.Namespace) -> None:
    """Fill in what depends on --mode."""
    paper = args.mode == "paper"
    args.mix = args.mix or ("none" if args.mode == "moco" else "cutmix")
    args.inter_weight = float(paper) if args.inter_weight is None else args.inter_weight
    args.crops = (6 if paper else 0) if args.crops is None else args.crops
    args.crop_size = args.crop_size or max(1, round(args.img_size * 96 / 224))
    args.min_scale = (0.14 if args.crops else 0.2) if args.min_scale is None else args.min_scale


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that contradict each other, before anything is loaded."""
    if not args.moco_t > 0 or not args.init_lr > 0 or not args.alpha > 0:
        raise UserError("--moco_t, --init_lr and --alpha must be above 0")
    if not 0 <= args.moco_m <= 1 or not 0 < args.min_scale <= 1:
        raise UserError("--moco_m must lie in 0..1, and --min_scale above 0 and up to 1")
    if len(args.lam) != 2 or min(args.lam) < 0 or not math.isclose(sum(args.lam), 1):
        raise UserError(f"--lam {args.lam}: must be two weights that sum to 1, such as 0.5,0.5")
    if args.batch_size % (world * args.bn_splits):
        raise UserError(
            f"--batch_size {args.batch_size} does not divide over {world} processes x {args.bn_splits} --bn_splits"
        )
    if args.batch_size // (world * args.bn_splits) < 2:
        raise UserError("batch norm needs at least 2 images a share; raise --batch_size or lower --bn_splits")
    if args.mode == "moco":
        given = {"--mix cutmix": args.mix != "none", "--neighbours": args.neighbours != "knn", "--crops": args.crops}
        if wrong := [flag for flag, on in given.items() if on]:
            raise UserError(f"--mode moco has no neighbours and no mixing; leave {', '.join(wrong)} away")


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Cosine to 0, or steps; by epoch, as in the release."""
    if args.decay_method == "cos":
        return args.init_lr * 0.5 * (1 + math.cos(math.pi * epoch / args.end_epoch))
    return args.init_lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)


class Refreshing:
    """A loader that renews the neighbours, where they are due, before its workers start on an epoch."""

    def __init__(self, loader: DataLoader, run: Run, model: CsMl, images: ImageList, nearby: Neighbours):
        self.loader, self.run, self.model, self.images, self.nearby = loader, run, model, images, nearby

    def __iter__(self) -> Iterator[Any]:
        epoch, args = self.run.epoch, self.run.args
        if epoch % args.cluster_freq == 0 and self.nearby.epoch != epoch:
            started = time.perf_counter()
            self.nearby.set(self.search(epoch), epoch)
            line = f"  epoch {epoch}: neighbours ({args.neighbours}) renewed in {time.perf_counter() - started:.1f} s"
            if self.nearby.purity is not None:
                line += f", {self.nearby.purity:.1f} % have their image's label"
            self.run.say(line)
        return iter(self.loader)

    def search(self, epoch: int) -> Tensor:
        """Indices [N, K], from the momentum encoder's pooled features in eval mode."""
        args, device, encoder = self.run.args, self.run.device, self.model.encoder_k
        if args.neighbours != "knn":
            draw = self.nearby.random if args.neighbours == "random" else self.nearby.same_label
            return draw(epoch)
        self.model.share_norms()
        encoder.eval()
        feats = features(
            lambda x: encoder(x, pre_out=True), self.images, device, args.batch_size // self.run.world, args.workers,
            args.amp == "bf16", self.feature_file(),
        )  # fmt: skip
        encoder.train()
        return self.nearby.nearest(feats, device)

    def feature_file(self) -> Path | None:
        folder = self.run.args.feature_dir
        if folder is None:
            return None
        return (self.run.dir if folder == Path("auto") else folder) / "neighbours.npy"


@torch.no_grad()
def telemetry(q: Tensor, k_q: Tensor, k_p: Tensor | None, queue: Tensor) -> dict[str, Tensor]:
    """What to watch, from unit embeddings [B, D]: contrast accuracy of q on (k_q, queue), and signs of collapse."""
    rank = losses.positive_rank(q, k_q, queue)
    out = {f"acc{n}": 100 * (rank < n).float().mean() for n in (1, 5)}
    out["feat/std"] = q.std(0).mean() * q.shape[1] ** 0.5  # 1: spread over the sphere, 0: collapsed
    out["sim/positive"], out["sim/negative"] = (q * k_q).sum(1).mean(), (q @ queue.mean(1)).mean()
    if k_p is not None:
        out["sim/neighbour"] = (q * k_p).sum(1).mean()
    return out


def picture(views: list[Tensor], count: int = 8) -> Tensor:
    """Rows of images [B, 3, H, W], the first `count` of each, as one picture."""
    rows = [augment.denormalise(view[:count]).cpu() for view in views]
    return make_grid(torch.cat(rows), nrow=min(count, len(views[0])), padding=2)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "hsa", "pretrain")
    resolve(args)
    check_flags(args, run.world)
    cross, mixing = args.mode != "moco", args.mix == "cutmix"
    local, rank = args.batch_size // run.world, run.rank

    # Data: views of an image and of a neighbour drawn anew at each access; the neighbours are among the same images.
    images = training_images(args.data_dir, args.per_class, args.cache, augment.plain(args.img_size, args.aug_backend))
    nearby = Neighbours(images, args.clus_pos_num, args.seed) if cross else None
    if args.neighbours == "label" and nearby is not None:
        nearby.same_label(0)  # or an error, now
    check_images(len(images), "--batch_size", args.batch_size, 2 * run.world * args.bn_splits)
    recipe = augment.moco_v2 if args.aug_plus else augment.moco_v1
    small = small_crop(args.crop_size) if args.crops else None
    views = Views(images, recipe(args.img_size, args.min_scale), nearby, args.crops, small)
    sampler = EpochSampler(len(views), local, args.seed, rank, run.world)
    loader: Any = run.loader(feed.keyed(views, args.seed, args.aug_backend, run.device), sampler)

    # Model
    encoder = arch.build(args.arch, args.width, args.stem)
    timm_nets.check_size(encoder, args.arch, args.img_size, *([args.crop_size] if args.crops else []))
    started = {"init": initialise(encoder, args.init, drop=INIT_DROP)} if args.init else {}
    model = CsMl(encoder, args.moco_dim, args.moco_k, args.moco_m, args.inter_head if args.inter_weight else None)
    model.check_batch(args.batch_size)
    distributed.convert_norm(model, "split" if args.bn_splits > 1 else "local", args.bn_splits)
    place(model, run.device).train()
    query = distributed.wrap(model)
    level_weights = [1.0, args.inter_weight][: len(model.queues)]
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), args.init_lr, args.momentum, weight_decay=args.wd,
        fused=run.device.type == "cuda",
    )  # fmt: skip
    run.track(state_dict=ReleaseKeys(model), optimizer=optimizer)
    if nearby is not None:
        run.track(neighbours=nearby)
        loader = Refreshing(loader, run, model, images, nearby)
    run.reads(images)
    watch(run, model.encoder_q, images, augment.plain(args.img_size, args.aug_backend))
    run.preflight(facts(run, images, model, sampler.steps_per_epoch) | started)
    run.compile(model.encoder_q, model.encoder_k, method="levels")

    for epoch, batch in run.batches(loader, sampler, args.end_epoch):
        lr = learning_rate(args, epoch)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        x = {name: follow(view, model) for name, view in batch.items() if name != "small"}  # [B, 3, H, W] each
        seen = [x["query"]]
        weights = torch.ones(1, 1, 1)
        if cross:  # the groups query, neighbour, CutMix, small crops; weights [G, B, 2] on k_q and k_p
            seen.append(x["add_posq"])
            mu = None
            if mixing:
                rngs = (mix_key(args.seed, run.step, rank * args.bn_splits + s, 2) for s in range(args.bn_splits))
                boxes = [draw_box(args.img_size, args.img_size, args.alpha, np.random.default_rng(r)) for r in rngs]
                mix, mu = mix_shares(x["query"], x["add_posq"], boxes)
                seen.append(mix)
            if args.crops:
                seen += [follow(view, model) for view in batch["small"].unbind(1)]
            lam = (1.0, 0.0) if epoch < args.warmup_epochs else tuple(args.lam)
            weights = losses.group_weights(lam, mu, local, args.crops)

        # A forward pass for each view, then the key encoder takes over the weights as they were for it, then the keys.
        with run.autocast():
            z = query(seen)  # for each level [G, B, D]
        model.update_key_encoder()
        keys = []  # for each of k_q, k_p: [B, D] of each level
        for which, name in enumerate(["key", "add_posk"][: 1 + cross]):
            dealt = torch.Generator().manual_seed(mix_key(args.seed, run.step, which, 1))
            with run.autocast():
                keys.append(model.embed_keys(x[name], dealt))
        positives = [torch.stack(level, 1) for level in zip(*keys)]  # for each level [B, P, D]

        # Each positive against the queue as it is: this batch's k_q is enqueued afterwards.
        by_level = [
            losses.multi_positive(own, positive, weights, queue, args.moco_t)  # [G]
            for own, positive, queue in zip(z, positives, model.queues)
        ]
        loss = torch.stack([w * groups.mean() for w, groups in zip(level_weights, by_level)]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        watched: dict[str, Any] = {}
        if run.log_due():
            k_p = positives[0][:, 1] if cross else None
            watched |= telemetry(z[0][0].detach(), positives[0][:, 0], k_p, model.queue)
            watched |= {f"loss/{name}": g for name, g in zip(["query", "neighbour", "mix"], by_level[0].detach())}
            if len(by_level) > 1:
                watched |= {"loss/level4": by_level[0].detach().mean(), "loss/level3": by_level[1].detach().mean()}
            if nearby is not None and nearby.purity is not None:
                watched["neighbours/purity"] = nearby.purity
        model.enqueue(keys[0])
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, **watched)
        if run.due(args.image_every):
            names = ["query", "key", "add_posq", "add_posk"][: 4 if cross else 2]
            shown = [x[name] for name in names] + ([mix] if mixing else [])
            run.image("views/" + "_".join(names) + "_mix" * mixing, picture(shown))

    run.finish(next_command(args, images, run.dir))
    return 0


def next_command(args: argparse.Namespace, images: ImageList, folder: Path) -> str:
    """What to do with the checkpoint in `folder`; network and image size are in it."""
    weights = f"--pretrained {quote(f'{folder}/checkpoint.pth')}"
    if not images.has_labels:
        out = quote(f"{folder}/backbone.pth")
        return f"backbone: python -m hsa.lab.export_detection {weights} --format torchvision --out {out}"
    data = f"--data_dir {quote(str(args.data_dir))}" + f" --per_class {args.per_class}" * bool(args.per_class)
    return f"evaluate: python -m hsa.main_knn {weights} {data}"


def facts(run: Run, images: ImageList, model: CsMl, steps: int) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    share = args.batch_size // (run.world * args.bn_splits)
    top = math.log(1 + args.moco_k)
    low = initial_loss(args.moco_k, args.moco_dim, args.moco_t)
    scale = 1 + args.inter_weight
    out = {
        "data": f"{args.data_dir}: {images.told()}",
        "batch": f"{args.batch_size} = {run.world} processes x {args.bn_splits} splits x {share}, "
        f"{steps} steps an epoch",
        "learning rate": f"{args.init_lr}, {args.decay_method} by epoch; the paper's 0.03 for 256 images would be "
        f"{0.03 * args.batch_size / 256:.3g} for this batch",
        "parameters": f"{sum(p.numel() for p in model.encoder_q.parameters()) / 1e6:.2f} M trained",
        "queue": f"{args.moco_k} = {args.moco_k / len(images):.2f} epochs of keys, {len(model.queues)} level(s)",
        "expected initial loss": f"about {scale * low:.2f} (all images alike, random queue), then about "
        f"{scale * top:.2f} = log(1 + K) once the queue is full of keys, then falling",
        "estimated time": estimate(run, model, len(images), steps),
    }
    if args.mode != "moco":
        out["neighbours"] = (
            f"{args.clus_pos_num}, {args.neighbours}, renewed every {args.cluster_freq} epochs; cross terms from epoch "
            f"{args.warmup_epochs} on"
        )
    if share == args.batch_size:
        out["caution"] = ONE_NORM
    return out | queue_caution(args.moco_k, len(images), args.batch_size)


def initial_loss(k: int, dim: int, tau: float) -> float:
    """l(z, z) against k random unit negatives of `dim` numbers, whose z.n has about the variance 1 / dim."""
    return float(np.logaddexp(1 / tau, math.log(k) + 1 / (2 * dim * tau**2)) - 1 / tau)


def forwards(args: argparse.Namespace) -> int:
    """Forward passes of a batch that a step costs (a backward pass counts as two), small crops left out.

    Query, neighbour and CutMix view with gradient and two keys: 3 x 3 + 2 = 11; MoCo: 3 + 1 = 4.
    """
    return 4 if args.mode == "moco" else 11 if args.mix == "cutmix" else 8


@torch.no_grad()
def estimate(run: Run, model: CsMl, images: int, steps: int) -> str:
    """Minutes of the whole run from two timed forward passes."""
    args, encoder = run.args, model.encoder_k
    x = torch.randn(args.batch_size // run.world, 3, args.img_size, args.img_size, device=run.device)
    passed = seconds(run, encoder, lambda: encoder(follow(x, encoder)))
    small = 3 * args.crops * (args.crop_size / args.img_size) ** 2
    refresh = 0.0 if args.mode == "moco" or args.neighbours != "knn" else images / args.batch_size / args.cluster_freq
    minutes = passed * args.end_epoch * ((forwards(args) + small) * steps + refresh) / 60
    return about(minutes, args.end_epoch * steps)


if __name__ == "__main__":
    cli(main)
