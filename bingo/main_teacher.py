"""MoCo v2: a teacher of our own, and the student-alone baseline: python -m bingo.main_teacher --data_dir DATA_DIR

The release takes its teachers from elsewhere; with this one the mini and small tiers need no download. The checkpoint
has MoCo's keys and loads by `--pretrain_alg moco`.
"""

import argparse
import math
from pathlib import Path
from shlex import quote

import torch
from torch import nn

from bingo.arch import CHOICES, STEMS, Encoder, build, mlp_head
from bingo.builder import MoCo, ReleaseKeys
from bingo.data import Views, order_hash
from bingo.losses import contrast_rank, info_nce
from bingo.options import (
    DROP,
    add_data_flags,
    add_schedule_flags,
    check_batch,
    learning_rate,
    next_command,
    train_images,
)
from bingo.visualize import views_picture
from shared_utils import UserError, distributed, feed, timm_nets
from shared_utils.augment import moco_v1, moco_v2, plain
from shared_utils.data import EpochSampler, mix_key
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, natural, not_negative, positive
from shared_utils.init import add_init_flag, initialise
from shared_utils.knn_watch import add_knn_flag, watch
from shared_utils.layout import follow, place
from shared_utils.preflight import ONE_NORM, check_images, queue_caution
from shared_utils.run import Run, cli


def get_parser() -> Parser:
    p = Parser(prog="bingo.main_teacher", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_data_flags(p)
    a("--arch", choices=CHOICES, default="resnet50", help="timm:NAME: any of timm's, of pooled features alone")
    a("--width", type=positive, default=64, help="channels of the first stage")
    a("--stem", choices=STEMS, default="imagenet", help="7x7/2 and max-pool, 3x3, or 3x3 and max-pool")
    a("--moco_dim", type=positive, default=128, help="length of an embedding")
    a("--hidden", type=natural, default=0, help="width of the head; 0: as MoCo v2, the length of the features")
    a("--moco_k", type=positive, default=65536, help="K, negatives in the queue; a multiple of --batch_size")
    a("--moco_m", type=float, default=0.999, help="m, momentum of the key encoder")
    a("--moco_t", type=float, default=0.2, help="tau, temperature")
    a("--aug_plus", choices=["true", "false"], default="true", help="MoCo v2's augmentation (false: v1's)")
    a(
        "--bn_splits",
        type=positive,
        default=1,
        help="batch norm over so many shares of a process's batch, as if each were a process; on one GPU take 8 for "
        "the paper's setting",
    )
    a("--batch_size", type=positive, default=256, help="images a step, all processes together")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=1e-4, help="weight decay")
    add_schedule_flags(p, 0.03, 200, "120,160")
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_aug_flag(p)
    add_knn_flag(p)
    add_init_flag(p)
    add_run_flags(p, "bingo/teacher/default")
    p.set_defaults(images_sha256="")  # of the data: a run is not resumed on other images
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "bingo", "teacher")
    check_batch(args.batch_size, run.world, args.bn_splits)
    if not args.moco_t > 0 or not args.init_lr > 0 or not 0 <= args.moco_m <= 1:
        raise UserError("--moco_t and --init_lr must be above 0, and --moco_m in 0..1")
    images = train_images(args)
    check_images(len(images), "--batch_size", args.batch_size, 2 * run.world * args.bn_splits)
    args.images_sha256 = order_hash(images)[:16]
    augment = (moco_v2 if args.aug_plus == "true" else moco_v1)(args.img_size)
    sampler = EpochSampler(len(images), args.batch_size // run.world, args.seed, run.rank, run.world)
    loader = run.loader(feed.keyed(Views(images, augment), args.seed, args.aug_backend, run.device), sampler)

    encoders: list[Encoder] = []
    started = {}
    for _ in range(2):  # the second becomes a copy of the first
        encoder = build(args.arch, args.width, args.stem)
        timm_nets.check_size(encoder, args.arch, args.img_size)
        if args.init and not encoders:
            started = {"init": initialise(encoder, args.init, drop=DROP)}
        encoder.fc = mlp_head(encoder.num_features, args.moco_dim, args.hidden or encoder.num_features)
        encoders.append(encoder)
    model = MoCo(encoders[0], encoders[1], args.moco_dim, args.moco_k, args.moco_m)
    model.check_batch(args.batch_size)
    distributed.convert_norm(model, "split" if args.bn_splits > 1 else "local", args.bn_splits)
    model = place(model, run.device).train()
    query = distributed.wrap(model.encoder_q)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(),
        args.init_lr,
        args.momentum,
        weight_decay=args.wd,
        fused=run.device.type == "cuda",
    )
    run.track(state_dict=ReleaseKeys(model), optimizer=optimizer)
    steps = sampler.steps_per_epoch
    caution = {}
    if run.world * args.bn_splits == 1:
        caution["CAUTION, batch norm"] = ONE_NORM
    run.reads(images)
    watch(run, model.encoder_q, images, plain(args.img_size, args.aug_backend))
    run.preflight(
        {
            "data": f"{args.data_dir}: {images.told()}",
            **started,
            "batch": f"{args.batch_size} = {args.batch_size // run.world} x {run.world}, {steps} steps an epoch",
            "learning rate": f"{args.init_lr}, {args.decay_method} by epoch over {args.end_epoch}",
            "parameters": f"{sum(x.numel() for x in model.encoder_q.parameters()) / 1e6:.2f} M trained",
            "expected initial loss": f"about log(1 + {args.moco_k}) = {math.log1p(args.moco_k):.2f}",
            **caution,
            **queue_caution(args.moco_k, len(images), args.batch_size),
        }
    )
    run.compile(model.encoder_q, model.encoder_k)

    for epoch, batch in run.batches(loader, sampler, args.end_epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch)
        im_q, im_k = (follow(x, model) for x in batch)
        with run.autocast():
            q = nn.functional.normalize(query(im_q).float(), dim=1)  # [N, dim]
            model.update_key_encoder()
            k = model.embed_keys(im_k, torch.Generator().manual_seed(mix_key(args.seed, run.step)))
        loss = info_nce(q, k[:, None], model.queue, args.moco_t).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched = {}
        if run.log_due():
            rank = contrast_rank(q.detach(), k, model.queue)
            watched = {
                "acc1": 100 * (rank < 1).float().mean(),
                "acc5": 100 * (rank < 5).float().mean(),
                "sim/positive": (q.detach() * k).sum(1).mean(),
                "sim/negative": (q.detach() @ model.queue).mean(),
                "feat/std": q.detach().std(0).mean() * q.shape[1] ** 0.5,
            }
        if run.due(args.image_every):
            run.image("views/query_key", views_picture({"query": im_q, "key": im_k}))
        model.enqueue(k)
        run.log(loss=distributed.all_sum(loss) / run.world, lr=optimizer.param_groups[0]["lr"], **watched)
    run.finish(next_command(args, images, run.dir), bags_command(args, run.dir))
    return 0


def bags_command(args: argparse.Namespace, folder: Path) -> str:
    """The bags of the training images by the network that a run wrote into `folder`."""
    flags = f"--data_dir {quote(str(args.data_dir))} --img_size {args.img_size} --arch {args.arch}"
    flags += f" --t_width {args.width}" * (args.width != 64) + f" --t_stem {args.stem}" * (args.stem != "imagenet")
    flags += f" --per_class {args.per_class}" * bool(args.per_class)
    where = f"--ckpt_name {quote(f'{folder}/checkpoint.pth')} --corr_dir {quote(str(folder))} --corr_name bags.npy"
    return f"its bags, if it is to teach: python -m bingo.compute_knn {flags} {where}"


if __name__ == "__main__":
    cli(main)
