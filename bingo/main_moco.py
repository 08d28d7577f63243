"""Stage 2 of BINGO: distil a teacher into a student over bags of instances (paper 2107.01691, release main_moco.py).

    python -m bingo.main_moco --data_dir imagenet --corr_npy imgs_corr_moco_epoch200.npy \
        --pretrain_path moco_v2_200ep_pretrain.pth.tar

Also torchrun --nproc-per-node 8 -m bingo.main_moco ...; the arms of the small tier are flags.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bingo import cutmix, losses
from bingo.arch import CHOICES, STEMS, Encoder, build, mlp_head
from bingo.builder import BINGO, ReleaseKeys
from bingo.data import VIEWS, Bags, Views, load_bags, order_hash, sha256
from bingo.options import (
    DROP,
    add_data_flags,
    add_schedule_flags,
    check_batch,
    learning_rate,
    next_command,
    train_images,
)
from bingo.teachers import ALGS, fingerprint, load_teacher
from bingo.visualize import views_picture
from shared_utils import UserError, distributed, feed, timm_nets
from shared_utils.augment import moco_v1, moco_v2, plain
from shared_utils.data import EpochSampler, ImageList, mix_key, per_class
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, floats, natural, not_negative, positive
from shared_utils.init import add_init_flag, initialise
from shared_utils.knn_watch import add_knn_flag, watch
from shared_utils.layout import follow, place
from shared_utils.neighbours import features, neighbours, purity
from shared_utils.preflight import check_images, queue_caution
from shared_utils.run import Run, cli

Embed = Callable[[list[Tensor]], list[Tensor]]


def get_parser() -> Parser:
    p = Parser(prog="bingo.main_moco", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_data_flags(p)
    a("--s_arch", choices=CHOICES, default="resnet18", help="network of the student f_S; timm:NAME: any "
      "of timm's, of pooled features alone")  # fmt: skip
    a("--s_width", type=positive, default=64, help="channels of its first stage")
    a("--s_stem", choices=STEMS, default="imagenet")
    a("--t_arch", choices=CHOICES, default="resnet50", help="network of the teacher f_T")
    a("--t_width", type=positive, default=64)
    a("--t_stem", choices=STEMS, default="imagenet")
    a("--pretrain_path", type=Path, default="moco_v2_800ep_pretrain.pth.tar", help="weights of the teacher")
    a("--pretrain_alg", choices=ALGS, default="moco", help="what wrote them")
    a("--teacher_bn", choices=["eval", "train"], default="eval", help="the teacher's batch norm: running statistics, "
      "or those of the shuffled batch, as in the release")  # fmt: skip
    a("--check_teacher", type=natural, default=512, help="before training, the teacher's 5-NN purity on so many images "
      "(a wrong teacher is near chance); 0: off")  # fmt: skip
    a("--corr_npy", type=Path, default="imgs_corr/imgs_corr_epoch800_MoCo.npy", help="bags (bingo.compute_knn)")
    a("--clus_pos_num", type=positive, default=5, help="K, members of a bag")
    a("--loss", choices=["release", "paper", "intra"], default="release", help="release: three groups with CutMix and "
      "symmetric targets; paper: L_intra + L_inter; intra: plain distillation, no bags")  # fmt: skip
    a(
        "--lam",
        type=floats,
        default="0.5,0.5",
        help="alpha,beta: weights of the own and the cross target; of "
        "--loss release alone, as are --warmup_epochs, --mix and --alpha",
    )
    a("--warmup_epochs", type=natural, default=11, help="first epochs without cross terms (the release's 0 to 10)")
    a("--mix", choices=["cutmix", "none"], default="cutmix", help="third group of the release's loss, or two groups")
    a("--alpha", type=float, default=2.0, help="lambda ~ Beta(alpha, alpha) of CutMix")
    a("--moco_dim", type=natural, default=0, help="length of an embedding; 0: the teacher's (128 for MoCo and SwAV)")
    a("--hidden", type=positive, default=2048, help="width of the student's head")
    a("--moco_k", type=positive, default=65536, help="K, negatives in the queue; a multiple of --batch_size")
    a("--moco_t", type=float, default=0.2, help="tau, temperature (0.12 for EfficientNet)")
    a("--aug_plus", choices=["true", "false"], default="true", help="MoCo v2's augmentation (false: v1's)")
    a(
        "--bn_splits",
        type=positive,
        default=1,
        help="batch norm over so many shares of a process's batch, as if each were a process; on one GPU take 8 for "
        "the paper's setting",
    )
    a("--one_pass", action="store_true", help="the student's views in one pass, each with its own statistics: equal")
    a("--batch_size", type=positive, default=256, help="anchors a step, all processes together")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=1e-4, help="weight decay (4e-5 for EfficientNet)")
    add_schedule_flags(p, 0.03, 200, "120,160")
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_aug_flag(p)
    add_knn_flag(p)
    add_init_flag(p)
    add_run_flags(p, "bingo/pretrain/default")
    p.set_defaults(images_sha256="", bags_sha256="")  # of the data: a run is not resumed on others
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range, before anything is loaded."""
    check_batch(args.batch_size, world, args.bn_splits)
    if len(args.lam) != 2 or min(args.lam) < 0:
        raise UserError(f"--lam {args.lam}: two weights, own and cross, for instance 0.5,0.5")
    if not args.moco_t > 0 or not args.init_lr > 0 or not args.alpha > 0:
        raise UserError("--moco_t, --init_lr and --alpha must be above 0")


def cautions(args: argparse.Namespace, world: int, bags: Bags | None, teacher: Encoder) -> dict[str, str]:
    """Lines of the preflight about what trains without an error and yet may not be what was meant.

    Bags of another teacher are no mistake in themselves. Refused are bags of other images (`load_bags`) and a teacher's
    file that lacks a tensor of the network or of its head (`load_teacher`).
    """
    out = {}
    if bags is not None and bags.teacher is not None and bags.teacher["sha256"] != fingerprint(teacher):
        out["CAUTION, bags"] = f"made with another teacher, {bags.teacher['name']}, than the one that is distilled"
    if args.teacher_bn == "train" and world * args.bn_splits == 1:
        out["CAUTION, batch norm"] = (
            "--teacher_bn train in one share: the teacher's targets bear their batch's statistics, which the student "
            "can match; take --teacher_bn eval, or --bn_splits 8 for the release's eight GPUs"
        )
    return out


def sample_classes(images: ImageList, count: int, each: int = 32) -> ImageList:
    """About `count` images: the first `each` of evenly spaced classes, so that an image has others of its class."""
    number = max(2, count // each)
    step = max(1, len(images.classes) // number)
    kept = per_class(images.take(torch.nonzero(images.labels % step == 0).flatten()), each)
    return kept.take(slice(max(count, 6)))


def check_teacher(teacher: Encoder, images: ImageList, count: int, img_size: int, run: Run) -> str:
    """Purity of the teacher's 5 nearest neighbours on images of a few classes, beside that of chance."""
    if not images.has_labels:
        return "without labels the purity of its neighbours is not known"
    some = sample_classes(images, count)
    some.transform = plain(img_size, run.args.aug_backend)
    if len(some) < 7:
        return "too few images to look at its neighbours"
    bank = features(lambda x: teacher(x, pre_out=True), some, run.device, 64, 0, run.args.amp == "bf16")
    sizes = torch.bincount(some.labels).double()
    chance = 100 * float((sizes * (sizes - 1)).sum()) / (len(some) * (len(some) - 1))
    found = purity(neighbours(bank, 5, run.device), some.labels)
    return f"5-NN purity {found:.1f} % on {len(some)} images of {int((sizes > 0).sum())} classes, chance {chance:.1f} %"


def estimated_minutes(run: Run, model: BINGO, embed: Embed, views: int, teacher_views: int, steps: int) -> str:
    """From one timed step on a small batch; parameters and statistics are left as they were."""
    args = run.args
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count = args.bn_splits * max(2, 8 // args.bn_splits)
    x = follow(torch.randn(count, 3, args.img_size, args.img_size, device=run.device), model)
    for _ in range(2):  # the first one pays for warm-up
        start = time.perf_counter()
        with run.autocast():
            z = torch.stack(embed([x] * views))
            for _ in range(teacher_views):
                model.embed_keys(x)
        z.square().mean().backward()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    minutes = seconds / count * args.batch_size / run.world * steps / 60
    return f"networks about {minutes:.1f} min for {steps} steps, if the loader keeps up"


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "bingo", "pretrain")
    check_flags(args, run.world)

    # Data: anchors and members of their bags.
    images = train_images(args)
    check_images(len(images), "--batch_size", args.batch_size, 2 * run.world * args.bn_splits)
    args.images_sha256 = order_hash(images)[:16]
    bags, bags_are = None, "none"
    if args.loss != "intra":
        bags, bags_are = load_bags(args.corr_npy, images, args.clus_pos_num)
        args.bags_sha256 = sha256(bags.array)
    augment = (moco_v2 if args.aug_plus == "true" else moco_v1)(args.img_size)
    sampler = EpochSampler(len(images), args.batch_size // run.world, args.seed, run.rank, run.world)
    seen = Views(images, augment, bags)
    loader = run.loader(feed.keyed(seen, args.seed, args.aug_backend, run.device), sampler)

    # Student, teacher, queue.
    mixes = args.loss == "release" and args.mix == "cutmix"
    count = {"intra": 1, "paper": 2, "release": 2 + mixes}[args.loss]  # student views a step
    teacher, dim = load_teacher(args.t_arch, args.pretrain_path, args.pretrain_alg, args.t_width, args.t_stem)
    caution = cautions(args, run.world, bags, teacher)
    if args.moco_dim not in (0, dim):
        raise UserError(f"--moco_dim {args.moco_dim}: the embedding of this teacher has {dim} dimensions")
    student = build(args.s_arch, args.s_width, args.s_stem)
    timm_nets.check_size(student, args.s_arch, args.img_size)
    timm_nets.check_size(teacher, args.t_arch, args.img_size)
    started = {"init": f"student, {initialise(student, args.init, drop=DROP)}"} if args.init else {}
    student.fc = mlp_head(student.num_features, dim, args.hidden)
    together = count if args.one_pass else 1  # views in a pass
    distributed.convert_norm(student, "split" if args.bn_splits * together > 1 else "local", args.bn_splits, together)
    distributed.convert_norm(teacher, "split" if args.bn_splits > 1 else "local", args.bn_splits)
    model = BINGO(student, teacher, dim, args.moco_k, args.teacher_bn)
    model.check_batch(args.batch_size)
    model = place(model, run.device).train()
    query = distributed.wrap(model.encoder_q)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(),
        args.init_lr,
        args.momentum,
        weight_decay=args.wd,
        fused=run.device.type == "cuda",
    )

    def embed(views: list[Tensor]) -> list[Tensor]:
        """Student embeddings [N, dim] of each view, every view with batch statistics of its own."""
        out = list(query(torch.cat(views)).chunk(len(views))) if args.one_pass else [query(x) for x in views]
        return [F.normalize(z.float(), dim=1) for z in out]

    run.track(state_dict=ReleaseKeys(model), optimizer=optimizer)
    steps = sampler.steps_per_epoch
    per_process = args.batch_size // run.world
    teacher.eval()
    teacher_is = check_teacher(teacher, images, args.check_teacher, args.img_size, run) if args.check_teacher else ""
    model.train()
    run.reads(images)
    watch(run, model.encoder_q, images, plain(args.img_size, args.aug_backend))
    run.preflight(
        {
            "data": f"{args.data_dir}: {images.told()}",
            **started,
            "bags": bags_are,
            "teacher": f"{args.t_arch} from {args.pretrain_path} ({args.pretrain_alg}), {dim}-d; {teacher.report}; "
            f"{teacher_is}",
            "batch": f"{args.batch_size} = {per_process} x {run.world}, {steps} steps an epoch",
            "learning rate": f"{args.init_lr}, {args.decay_method} by epoch over {args.end_epoch}",
            "parameters": f"{sum(x.numel() for x in model.encoder_q.parameters()) / 1e6:.2f} M trained",
            "expected initial loss": f"about log(1 + {args.moco_k}) = {math.log1p(args.moco_k):.2f} a target",
            "estimated time": estimated_minutes(
                run, model, embed, count, 2 if args.loss == "release" else 1, steps * args.end_epoch
            ),
            **caution,
            **queue_caution(args.moco_k, len(images), args.batch_size),
        }
    )
    run.compile(model.encoder_q, model.encoder_k)

    for epoch, batch in run.batches(loader, sampler, args.end_epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch)
        x = {name: follow(view, model) for name, view in zip(VIEWS, batch)}  # [B, 3, S, S] each
        # Shuffle-BN; a teacher in eval mode sees the same whatever the batch.
        deal = [
            torch.Generator().manual_seed(mix_key(args.seed, run.step, i)) if args.teacher_bn == "train" else None
            for i in (0, 1)
        ]
        views, mu = {"query": x["query"]}, torch.ones(per_process)  # of the student
        if args.loss != "intra":
            views["add_posq"] = x["add_posq"]
        if mixes:
            shares = range(run.rank * args.bn_splits, (run.rank + 1) * args.bn_splits)
            rngs = [np.random.Generator(np.random.PCG64(mix_key(args.seed, run.step, i))) for i in shares]
            boxes = [cutmix.draw_box(args.img_size, args.img_size, args.alpha, rng) for rng in rngs]
            views["mix"], mu = cutmix.mix_shares(x["query"], x["add_posq"], boxes)

        with run.autocast():
            z = embed(list(views.values()))  # s_a, s_p, s_m
            k = model.embed_keys(x["key"], deal[0])  # T_a
            k_p = model.embed_keys(x["add_posk"], deal[1]) if args.loss == "release" else k  # T_p
        if args.loss == "release":
            lam = losses.loss_weights(epoch, args.warmup_epochs, (args.lam[0], args.lam[1]))
            groups = losses.release_groups(
                z[0], z[1], z[2] if mixes else None, k, k_p, model.queue, args.moco_t, lam, mu
            )
            loss = groups.mean()
        elif args.loss == "paper":
            loss = losses.paper_loss(z[0], z[1], k, model.queue, args.moco_t)
        else:
            loss = losses.info_nce(z[0], k[:, None], model.queue, args.moco_t).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        watched: dict[str, Tensor | float] = {}
        if run.log_due():
            q = z[0].detach()
            rank = losses.contrast_rank(q, k, model.queue)
            watched = {
                "acc1": 100 * (rank < 1).float().mean(),
                "acc5": 100 * (rank < 5).float().mean(),
                "mu": mu.mean(),
                "sim/positive": (q * k).sum(1).mean(),
                "sim/bag": (q * k_p).sum(1).mean(),
                "sim/negative": (q @ model.queue).mean(),
                "feat/std": q.std(0).mean() * dim**0.5,  # 1: spread over the sphere, 0: collapsed
            }
            if args.loss == "release":
                watched |= {f"loss/{name}": value for name, value in zip(views, groups.detach())}
        if run.due(args.image_every):
            more = {name: x[name] for name in (["key", "add_posk"] if args.loss == "release" else ["key"])}
            run.image("views/" + "_".join([*views, *more]), views_picture({**views, **more}))
        model.enqueue(k)  # T_a alone, and only now: the graph above needed the queue as it was
        run.log(loss=distributed.all_sum(loss) / run.world, lr=optimizer.param_groups[0]["lr"], **watched)
    run.finish(next_command(args, images, run.dir))
    return 0


if __name__ == "__main__":
    cli(main)
