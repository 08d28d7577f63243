"""Pretraining of K-shot contrastive learning (paper 2007.13310): python -m kscl.main_kscl --data_dir IMAGENET

Also torchrun --nproc-per-node 8 -m kscl.main_kscl ...; `--shots 1 --sim signed` is MoCo v2.
"""

import argparse
import math
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from kscl import arch
from kscl.builder import KSCL, ReleaseKeys
from kscl.data import Views, training_images
from kscl.losses import against_queue, kscl_loss
from kscl.subspace import RANK_RULES, SIMILARITIES, RankRule, Subspaces
from shared_utils import UserError, augment, checkpoint, distributed, feed, timm_nets
from shared_utils.data import EpochSampler, ImageList, mix_key
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, boolean, ints, natural, not_negative, positive
from shared_utils.init import add_init_flag, initialise
from shared_utils.knn_watch import add_knn_flag, watch
from shared_utils.layout import follow, place
from shared_utils.pictures import make_grid
from shared_utils.preflight import ONE_NORM, about, check_images, queue_caution, seconds
from shared_utils.run import Run, cli


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="kscl.main_kscl", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--data_dir", type=Path, default=Path("data/imagenet"), help="holds train/CLASS/*.jpg, or images of your own: "
      "class folders, or files without labels")  # fmt: skip
    a("--img_size", type=positive, default=224, help="pixels of a crop")
    a("--per_class", type=natural, default=0, help="first so many training images of each class; 0: all")
    a("--cache", action="store_true", help="decode all images once and keep them in memory")
    a("--arch", choices=arch.ARCHS, default="resnet50", help="timm:NAME: any of timm's, of pooled features alone")
    a("--width", type=positive, default=64, help="channels of the first stage")
    a("--stem", choices=arch.STEMS, default="imagenet")
    a("--shots", type=positive, default=5, help="K, key views of an image beside its query view")
    a("--rank_rule", choices=RANK_RULES, default="energy", help="which directions are significant: the fewest that "
      "hold --energy of the trace; those of at least --rel_gamma of the largest; or always --rank")  # fmt: skip
    a("--energy", type=float, default=0.9, help="e, share of the eigenvalues' sum that is kept")
    a("--rel_gamma", type=float, default=0.1, help="least eigenvalue kept by --rank_rule relative, over the largest")
    a("--rank", type=positive, default=1, help="directions kept by --rank_rule fixed")
    a("--max_rank", type=natural, default=0, help="P, directions that the queue has room for; 0: as many as the rule "
      "can keep")  # fmt: skip
    a("--sim", choices=SIMILARITIES, default="proj_len", help="match of a query with a subspace: length of its "
      "projection, the square, or the length with the sign of the first direction (one shot: the cosine)")  # fmt: skip
    a("--subspace_grad", choices=["none", "pos"], default="none", help="none: keys of the momentum encoder, constants; "
      "pos: the positive subspace is of the query encoder's keys, with gradient (collapses: README.md)")  # fmt: skip
    a("--center", type=int, choices=[0, 1], default=0, help="1: take the mean of the K keys away before (a control)")
    a("--pretrained", type=Path, help="start from this checkpoint of MoCo v2 (encoders and queue) or of a run of ours")
    a("--moco_dim", type=positive, default=128, help="D, length of an embedding")
    a("--moco_k", type=positive, default=65536, help="M, subspaces in the queue")
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
    add_run_flags(p, "kscl/pretrain/default")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range or at odds with each other, before anything is loaded; resolves --max_rank."""
    if not args.moco_t > 0 or not args.init_lr > 0:
        raise UserError("--moco_t and --init_lr must be above 0")
    if not 0 <= args.moco_m <= 1:
        raise UserError("--moco_m must lie in 0..1")
    if not 0 < args.energy <= 1 or not 0 < args.rel_gamma <= 1:
        raise UserError("--energy and --rel_gamma must lie above 0 and up to 1")
    if args.rank_rule == "fixed" and args.rank > args.shots:
        raise UserError(f"--rank {args.rank}: {args.shots} shots span no more than {args.shots} directions")
    most = args.rank if args.rank_rule == "fixed" else args.shots - args.center
    args.max_rank = min(args.max_rank or most, most)
    if args.center and args.shots == 1:
        raise UserError("--center 1 leaves nothing of one shot; give --shots 2 or more")
    if args.center and args.sim == "signed":
        raise UserError("--center 1 takes away the direction that --sim signed is oriented by; choose another --sim")
    if args.max_rank >= args.moco_dim:
        raise UserError(
            f"--moco_dim {args.moco_dim}: subspaces of rank {args.max_rank} can fill the whole space, where every "
            "query matches perfectly; raise it, or lower --shots or --max_rank"
        )
    if args.pretrained and args.init:
        raise UserError("--pretrained starts encoders, heads and queue, --init the backbone alone; give one of them")
    if args.batch_size % (world * args.bn_splits):
        raise UserError(
            f"--batch_size {args.batch_size} does not divide over {world} processes x {args.bn_splits} --bn_splits"
        )
    if args.batch_size // (world * args.bn_splits) < 2:
        raise UserError("batch norm needs at least 2 images a share; raise --batch_size or lower --bn_splits")


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Cosine to 0, or steps; by epoch, as in the authors' MoCo code."""
    if args.decay_method == "cos":
        return args.init_lr * 0.5 * (1 + math.cos(math.pi * epoch / args.end_epoch))
    return args.init_lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)


@torch.no_grad()
def telemetry(q: Tensor, Z: Tensor, own: Subspaces, s: Tensor, model: KSCL, sim: str) -> dict[str, Tensor]:
    """What to watch: contrast accuracy, the subspaces' ranks and energy, similarities, signs of collapse.

    Args:
        q: [N, D]; Z: keys [N, D, K]; own: their subspaces; s: similarity of each query with its own [N]; model: with
            its queue as the loss saw it.
    """
    closer, others = against_queue(q, s, model.queue, sim)
    return {
        "acc1": 100 * (closer < 1).float().mean(),
        "acc5": 100 * (closer < 5).float().mean(),
        "subspace/rank_mean": own.rank.float().mean(),
        "subspace/queue_rank_mean": model.queue_rank.float().mean(),  # ranks that differ are won or lost for nothing
        "subspace/lambda1_frac": (own.l[:, 0] / own.l.sum(1)).mean(),  # l_1 / K
        "subspace/pos_sim": s.mean(),
        "subspace/neg_sim": others.mean(),
        # A length knows no sign: this has to be above 0, or queries have learned to point away from their keys.
        "subspace/pos_cos": torch.einsum("nd,ndk->nk", q, Z).mean(),
        "feat/std": q.std(0).mean() * q.shape[1] ** 0.5,  # 1: spread over the sphere, 0: collapsed
    }


def picture(im_q: Tensor, im_k: Tensor, count: int = 8) -> Tensor:
    """The first `count` queries [N, 3, H, W] in a row, below each its keys [N, K, 3, H, W]."""
    rows = torch.cat([im_q[:count, None], im_k[:count]], 1).transpose(0, 1)  # [1 + K, count, 3, H, W]
    return make_grid(augment.denormalise(rows.flatten(0, 1)).cpu(), nrow=rows.shape[1], padding=2)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "kscl", "pretrain")
    check_flags(args, run.world)
    local, rank = args.batch_size // run.world, run.rank

    # Data: 1 + K views of an image, drawn alike
    images = training_images(args.data_dir, args.per_class, args.cache)
    check_images(len(images), "--batch_size", args.batch_size, 2 * run.world * args.bn_splits)
    recipe = augment.moco_v2 if args.aug_plus else augment.moco_v1
    sampler = EpochSampler(len(images), local, args.seed, rank, run.world)
    views = Views(images, recipe(args.img_size), args.shots)
    loader = run.loader(feed.keyed(views, args.seed, args.aug_backend, run.device), sampler)

    # Model
    rule = RankRule(args.max_rank, args.rank_rule, args.energy, args.rel_gamma, args.rank)
    encoder = arch.build(args.arch, args.width, args.stem)
    timm_nets.check_size(encoder, args.arch, args.img_size)
    started = {"init": initialise(encoder, args.init)} if args.init else {}
    model = KSCL(encoder, rule, args.moco_dim, args.moco_k, args.moco_m, bool(args.center))
    model.check_batch(args.batch_size)
    if args.pretrained:
        start_from(args.pretrained, model)
    distributed.convert_norm(model, "split" if args.bn_splits > 1 else "local", args.bn_splits)
    place(model, run.device).train()
    query = distributed.wrap(model)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), args.init_lr, args.momentum, weight_decay=args.wd,
        fused=run.device.type == "cuda",
    )  # fmt: skip
    run.track(state_dict=ReleaseKeys(model), optimizer=optimizer)
    run.reads(images)
    watch(run, model.encoder_q, images, augment.plain(args.img_size, args.aug_backend))
    run.preflight(facts(run, images, model, sampler.steps_per_epoch) | started)
    run.compile(model.encoder_q, model.encoder_k)

    for epoch, (im_q, im_k) in run.batches(loader, sampler, args.end_epoch):
        lr = learning_rate(args, epoch)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        im_q = follow(im_q, model)  # [N, 3, H, W]
        im_k = im_k.to(run.device, non_blocking=True)  # [N, K, 3, H, W]

        # Queries; the key encoder takes over the weights as they were for them, once; then K passes for the keys.
        with run.autocast():
            if args.subspace_grad == "pos":
                q, Z_q = query(im_q, im_k, deals(args, run.step))  # [N, D], [N, D, K]
            else:
                q, Z_q = query(im_q)
        model.update_key_encoder()
        with run.autocast():
            Z = model.embed_keys(im_k, deals(args, run.step))  # [N, D, K]

        # The subspaces; of the query encoder's own keys where the gradient is to reach them.
        stored, _ = model.subspaces(Z)
        own, spanning = (stored, None) if Z_q is None else model.subspaces(Z_q)

        # Against the queue as it is: this step's subspaces are enqueued afterwards.
        each, s = kscl_loss(q, own, model.queue, args.sim, args.moco_t, spanning)  # [N]
        loss = each.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        watched: dict[str, Any] = {}
        mean_loss = distributed.all_sum(loss.detach()) / run.world
        if run.log_due():
            watched = telemetry(q.detach(), Z if Z_q is None else Z_q.detach(), own, s.detach(), model, args.sim)
            watched["train/loss"] = mean_loss
        model.enqueue(stored)
        run.log(mean_loss, lr=lr, **watched)
        if run.due(args.image_every):
            run.image("views/query_and_keys", picture(im_q, im_k))

    weights = f"--pretrained {quote(f'{run.dir}/checkpoint.pth')}"
    if images.has_labels:
        images_are = f"--data_dir {quote(str(args.data_dir))}" + f" --per_class {args.per_class}" * bool(args.per_class)
        run.finish(f"evaluate: python -m kscl.main_knn {weights} {images_are}")
    else:
        out = quote(f"{run.dir}/backbone.pth")
        run.finish(f"backbone: python -m kscl.lab.export_detection {weights} --format torchvision --out {out}")
    return 0


def deals(args: argparse.Namespace, step: int) -> list[torch.Generator]:
    """How the images of each shot are dealt over the processes: the same on all of them, anew for each shot."""
    return [torch.Generator().manual_seed(mix_key(args.seed, step, shot, 1)) for shot in range(args.shots)]


def start_from(path: Path, model: KSCL) -> None:
    """Encoders and queue of a MoCo v2 checkpoint, or of a run of ours. UserError: anything else, or other sizes."""
    loaded = checkpoint.load(path)
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not any(str(key).endswith("queue_ptr") for key in state):
        raise UserError(f"{path}: no MoCo checkpoint: it has no state_dict with a queue and two encoders")
    try:
        ReleaseKeys(model).load_state_dict(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def initial_loss(args: argparse.Namespace) -> float:
    """With all images alike (s = 1) and the queue's M random directions: log sum exp(s_m / tau) - 1 / tau.

    A random cosine is N(0, 1 / D), nearly.
    """
    a = 1 / (args.moco_t * math.sqrt(args.moco_dim))  # spread of the logits
    if args.sim == "proj_len_sq":
        spread = 2 * args.moco_t * a * a
        mean = -0.5 * math.log1p(-spread) if spread < 1 else 1 / (2 * args.moco_t)
    else:
        mean = a * a / 2
        if args.sim == "proj_len":  # of |x|
            mean += math.log1p(math.erf(a / math.sqrt(2)))
    own = 1 / args.moco_t
    return float(torch.logaddexp(torch.tensor(own), torch.tensor(math.log(args.moco_k) + mean))) - own


def facts(run: Run, images: ImageList, model: KSCL, steps: int) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    share = args.batch_size // (run.world * args.bn_splits)
    rules = {
        "energy": f"fewest directions with {args.energy:g} of the energy",
        "relative": f"eigenvalues of at least {args.rel_gamma:g} of the largest",
        "fixed": f"{args.rank} directions",
    }
    out = {
        "data": f"{args.data_dir}: {images.told()}",
        "batch": f"{args.batch_size} = {run.world} processes x {args.bn_splits} splits x {share}, "
        f"{steps} steps an epoch, {1 + args.shots} views of an image",
        "subspaces": f"{args.shots} shots, {rules[args.rank_rule]}, at most {args.max_rank}; a random query's length "
        f"in one is about sqrt(rank / {args.moco_dim}), so watch subspace/rank_mean",
        "learning rate": f"{args.init_lr}, {args.decay_method} by epoch; MoCo v2's 0.03 for 256 images would be "
        f"{0.03 * args.batch_size / 256:.3g} for this batch",
        "parameters": f"{sum(p.numel() for p in model.encoder_q.parameters()) / 1e6:.2f} M trained",
        "queue": f"{args.moco_k} subspaces = {args.moco_k / len(images):.2f} epochs, "
        f"{model.queue.numel() * 4 / 2**20:.1f} MiB",
        "expected initial loss": f"about {initial_loss(args):.2f} (all images alike, random queue), then about "
        f"{math.log(1 + args.moco_k):.2f} = log(1 + M) once the queue is full of subspaces, then falling",
        "estimated time": estimate(run, model, steps),
    }
    if share == args.batch_size:
        out["caution"] = ONE_NORM
    if args.subspace_grad == "pos":
        out["caution, --subspace_grad pos"] = (
            "query and positive are of one network and the negatives of another, so it can leave them all behind: "
            "watch feat/std, which falls to 0 then"
        )
    return out | queue_caution(args.moco_k, len(images), args.batch_size)


def forwards(args: argparse.Namespace) -> int:
    """Forward passes of a batch that a step costs (a backward pass counts as two).

    A query with gradient and K keys: 3 + K, MoCo's 4 for one shot; K more with gradient for --subspace_grad pos.
    """
    return 3 + args.shots + 3 * args.shots * (args.subspace_grad == "pos")


@torch.no_grad()
def estimate(run: Run, model: KSCL, steps: int) -> str:
    """Minutes of the whole run from two timed forward passes."""
    args, encoder = run.args, model.encoder_k
    x = torch.randn(args.batch_size // run.world, 3, args.img_size, args.img_size, device=run.device)
    passed = seconds(run, encoder, lambda: encoder(follow(x, encoder)))
    steps *= args.end_epoch
    return about(passed * forwards(args) * steps / 60, steps)


if __name__ == "__main__":
    cli(main)
