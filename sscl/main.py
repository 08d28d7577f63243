"""Training of SsCL (paper 2105.07387): python -m sscl.main --data IMAGENET --split_file 1percent.txt

Also torchrun --nproc-per-node 8 -m sscl.main ...; the arms of the ablation and the baselines are flags:
supervised `--lambda_u 0 --lambda_c 0`, FixMatch `--lambda_c 0 --calib none --da off --theta 0.95 --pl_start 0 --strong
fixmatch --joint_views --bn_momentum 0.001`, joint without exchange `--calib none --neighbours off`, MoCo v2
`--no_labels --lambda_u 0 --calib none`.
"""

import argparse
import math
import time
from shlex import quote
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, augment, distributed
from shared_utils.data import EpochSampler, ImageList, Keyed, mix_key
from shared_utils.evaluation import labelled_indices
from shared_utils.lab import mini
from shared_utils.layout import follow, place
from shared_utils.run import Run, cli
from sscl import losses, options
from sscl.arch import Encoder, build
from sscl.calibration import Alignment, calibrate, entropy, log_similarity, sharpen, threshold
from sscl.data import (
    Labelled,
    LabelledStream,
    Pairs,
    Unlabelled,
    augmentations,
    check_frozen,
    label_split,
    split_hash,
    training_images,
)
from sscl.model import SsCL, Whole
from sscl.prototypes import ema_step, refresh, spread
from sscl.watch import Telemetry, facts, picture
from sscl.weights import initialise


def get_parser() -> argparse.ArgumentParser:
    return options.get_parser(__doc__ or "")


def labelled_images(args: argparse.Namespace, images: ImageList) -> list[int]:
    """Numbers of the labelled images, rising; which ones is part of the flags that a resume must repeat."""
    if args.no_labels:
        return []
    if args.labels_per_class and args.split_file:
        raise UserError("--labels_per_class and --split_file exclude each other: both say which images are labelled")
    if args.labels_per_class:
        chosen = label_split(images.labels, args.labels_per_class, args.split)
        counts = torch.bincount(images.labels).tolist()
        check_frozen(counts, args.labels_per_class, args.split, chosen)
    else:
        chosen = labelled_indices(images, args.split_file, args.fraction, args.data / "train", args.split)
    missing = set(range(len(images.classes))) - {images.label(i) for i in chosen}
    if missing:
        raise UserError(f"class {images.classes[min(missing)]} has no labelled image; every class needs one")
    args.split_sha256 = split_hash(chosen)
    return chosen


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine, by step."""
    peak = args.lr * (args.mu * args.batch_labelled / args.lr_batch if args.lr_batch else 1)
    warm = args.warmup_epochs * steps_per_epoch
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, args.epochs * steps_per_epoch - warm)
    return peak * (
        math.cos(7 * math.pi * done / 16) if args.schedule == "cos7_16" else (1 + math.cos(math.pi * done)) / 2
    )


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "sscl", "train")
    options.resolve(args)
    options.check_flags(args, run.world)
    if args.synthetic:
        if run.rank == 0:
            mini.ensure("images")
        distributed.barrier()
        args.data = mini.ensure("images")
    local, rank, device = args.batch_labelled // run.world, run.rank, run.device

    # What this arm computes: pseudo-labels, the contrastive loss, keys of the momentum copy.
    guessing = not args.no_labels and (args.lambda_u > 0 or (args.lambda_c > 0 and args.neighbours == "on"))
    contrasting = args.lambda_c > 0
    keyed = contrasting or (guessing and args.calib != "none")
    views = [name for name, on in (("weak", guessing), ("strong", guessing or contrasting), ("key", keyed)) if on]

    # Data: an epoch is one of the unlabelled images, that is all images without their labels.
    images = training_images(args.data, args.per_class, args.cache, args.imbalance)
    chosen_images = labelled_images(args, images)
    recipes = augmentations(args.img_size, args.weak, args.strong, not args.no_flip, args.min_scale)
    unlabelled = Unlabelled(images, recipes, views, args.key_view)
    unlabelled.images.transform = augment.plain(args.img_size)  # for the prototypes
    epochs = EpochSampler(len(unlabelled), args.mu * local, args.seed, rank, run.world)
    labelled, stream, loader = None, None, None
    if chosen_images:
        labelled = Labelled(images, chosen_images, recipes["weak"])
        stream = LabelledStream(
            labelled.labels, local, epochs.steps_per_epoch, args.seed, rank, run.world, args.balanced == "on"
        )
        loader = run.loader(Keyed(labelled, mix_key(args.seed, 1)), stream)  # type: ignore[arg-type]
    pairs: Any = Pairs(run.loader(Keyed(unlabelled, args.seed), epochs), epochs, loader, stream)
    watch = Telemetry(args, images.labels.to(device) if args.diagnostics == "on" else None, chosen_images)

    # Model
    encoder = Encoder(build(args.arch, args.width, args.stem), len(images.classes), args.dim)
    report = "scratch" if args.init == "scratch" else initialise(encoder, args.init)
    encoder.proj.requires_grad_(contrasting)
    encoder.fc.requires_grad_(bool(chosen_images))
    alignment = Alignment(len(images.classes), args.da, args.da_m)
    ranked = contrasting and guessing and args.sim == "prob"  # else nobody asks for the queue's probabilities
    model = SsCL(encoder, alignment, args.moco_k, args.moco_m, ranked, args.bn_splits)
    model.check_batch(args.batch_labelled * (args.mu + (labelled is not None)))
    distributed.convert_norm(model, "split" if args.bn_splits > 1 else "local", args.bn_splits)
    set_norm_momentum(model, args.bn_momentum)
    place(model, device).train()
    query = distributed.wrap(model)
    trained = [parameter for parameter in model.encoder_q.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, args.lr, args.momentum, weight_decay=args.wd, nesterov=args.momentum > 0, fused=device.type == "cuda"
    )
    run.track(state_dict=Whole(model), optimizer=optimizer)
    steps = epochs.steps_per_epoch
    peak = max(learning_rate(args, step, steps) for step in (0, round(args.warmup_epochs * steps)))
    run.reads(unlabelled.images)
    run.preflight(facts(run, images, chosen_images, model, steps, peak, report, views))

    for epoch, (batch, own) in run.batches(pairs, pairs, args.epochs):
        lr = learning_rate(args, run.step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        started = epoch >= args.pl_start
        if keyed and labelled is not None and refresh_due(args, model, epoch):
            renew_prototypes(run, model, unlabelled, recipes["weak"], labelled)
        u: dict[str, Any] = {name: follow(batch[name], model) for name in views if name in batch}
        if keyed:
            u.setdefault("key", u.get("weak"))  # --key_view weak
        index = batch["index"].to(device)  # [U]
        x = follow(own[0], model) if own else None  # [B, 3, H, W]
        y, x_index = (own[1].to(device), own[2].to(device)) if own else (None, None)

        # The momentum copy follows; then all that is not trained: keys, p, q, and the calibrated pseudo-labels.
        model.update_key_encoder(statistics=not keyed)
        keys: list[Tensor] = []
        log_q = p = aligned = None
        outs: list[tuple[Tensor, Tensor]] = []
        with run.autocast():
            if args.joint_views:  # with gradient for the others alone
                outs = query([view for view in (x, u["weak"], u.get("strong")) if view is not None])
                p = F.softmax(outs.pop(int(x is not None))[0].detach(), dim=1)  # [U, C]
            elif guessing:
                p = model.predict(u["weak"])  # [U, C]
            if keyed:
                dealt = torch.Generator().manual_seed(mix_key(args.seed, run.step, 1))
                keys = model.embed_keys([u["key"]] + ([x] if x is not None else []), dealt)  # [U, D], [B, D]
        if keyed and labelled is not None:
            log_q = log_similarity(keys[0], model.prototypes, args.tau_s)  # [U, C]
        label = torch.full_like(index, losses.UNKNOWN)
        conf = torch.zeros_like(index, dtype=torch.bool)
        tilde = torch.zeros(len(index), len(images.classes), device=device)
        if p is not None:
            model.alignment.update(p, log_q)
            aligned = model.alignment(p)
            guess = aligned
            if log_q is not None:
                guess = calibrate(aligned, log_q, args.calib, model.alignment.qbar, args.calib_weight)
            tilde = sharpen(guess, args.sharpen_t)  # [U, C]
            theta = threshold(args.theta, args.theta_ramp, run.step / (args.epochs * steps))
            sure = (tilde if args.theta_on == "sharp" else guess).max(1).values >= theta
            if started:
                label, conf = tilde.argmax(1), sure
        entries = losses.Memory(label, conf, tilde, index)

        # With gradient: h(f(w(x))), and f(s(u)) for both heads, in one pass; losses against the queue as it is.
        if not args.joint_views:
            with run.autocast():
                outs = query([view for view in (x, u.get("strong")) if view is not None])
        loss_x = loss_u = loss_c = torch.zeros((), device=device)
        known = None
        if y is not None and x_index is not None:
            loss_x = F.cross_entropy(outs[0][0], y)
            # <p, one-hot> would be the largest product that p has with anything: labelled keys outranked all others.
            prob = F.softmax(outs[0][0].detach().float(), dim=1)  # [B, C]
            known = losses.Memory(y, torch.ones_like(y, dtype=torch.bool), prob, x_index)
        if args.lambda_u > 0 and started:
            loss_u = losses.masked_ce(outs[-1][0], tilde if args.soft_targets else label, conf)
        picked = None
        if contrasting:
            anchors = [(entries, outs[-1][1], keys[0])]
            if args.labelled_anchors and known is not None:
                unknown = torch.full_like(known.label, losses.UNKNOWN)  # before --pl_start P_i = {k_i} for everybody
                own_anchors = known if started else known._replace(label=unknown, conf=torch.zeros_like(known.conf))
                anchors.append((own_anchors, outs[0][1], keys[1]))
            each = []
            for who, v, key in anchors:
                found = pick(args, model, who, key)
                picked = picked or found
                each.append(losses.contrast(v, key, model.queue, found, args.tau, args.ctr))
            loss_c = torch.cat(each).mean()
        ctr_weight = args.lambda_c * (epoch >= args.ctr_start)
        loss = loss_x + args.lambda_u * loss_u + ctr_weight * loss_c
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        parts = torch.stack([part.detach().float() for part in (loss, loss_x, loss_u, loss_c)])
        total, *terms = distributed.all_sum(parts) / run.world  # means over the processes
        watched: dict[str, Any] = dict(zip(("loss/x", "loss/u", "loss/c"), terms))
        if run.log_due():
            if p is not None and aligned is not None:
                watched |= watch.pseudo_labels(p, aligned, log_q, index, model.alignment.qbar)
                watched |= {"pl/coverage": conf.float().mean(), "da/entropy": entropy(model.alignment.pbar[None])}
            if picked is not None and p is not None:
                if args.neighbours == "off":  # those that the exchange would have chosen
                    picked = nearest(args, model, entries, keys[0])
                watched |= watch.neighbours(picked, model.queue_index, index, model.queue_labelled)
            if log_q is not None:
                watched["proto/mean_offdiag_cos"] = spread(model.prototypes)
                watched["proto/min_count"] = model.proto_least[0]
        if keyed:
            model.enqueue(keys[0], entries, labelled=False)
            if known is not None:
                model.enqueue(keys[1], known, labelled=True)
            if args.proto == "ema" and started and labelled is not None:
                move_prototypes(args, model, keys[0], entries)
        run.log(total, lr=lr, **watched)
        if views and run.due(args.image_every):
            run.image("views/" + "_".join(views), picture([u[name] for name in views]))

    again = f"--data_dir {quote(str(args.data))}" + (f" --per_class {args.per_class}" if args.per_class else "")
    run.finish(f"evaluate: python -m sscl.eval_cls --pretrained {quote(f'{run.dir}/checkpoint.pth')} {again}")
    return 0


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Of the running statistics of every batch norm."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def nearest(args: argparse.Namespace, model: SsCL, who: losses.Memory, key: Tensor) -> losses.Chosen:
    """Positives and negatives by pseudo-label of the anchors `who` [N] with own keys [N, D]."""
    return losses.choose(who, model.memory, args.num_pos, None if args.sim == "prob" else key @ model.queue)


def pick(args: argparse.Namespace, model: SsCL, who: losses.Memory, key: Tensor) -> losses.Chosen:
    """The positives and negatives that this arm trains with."""
    if args.neighbours == "off" or args.no_labels:
        return losses.all_negatives(who, model.memory)
    return nearest(args, model, who, key)


def refresh_due(args: argparse.Namespace, model: SsCL, epoch: int) -> bool:
    """At the first epoch, when pseudo-labels start, and every E_p epochs, once; `ema` is only set anew at the first
    two."""
    anew = epoch in (0, args.pl_start) or (args.proto != "ema" and epoch % args.proto_every == 0)
    return anew and int(model.proto_epoch) != epoch


def renew_prototypes(run: Run, model: SsCL, unlabelled: Unlabelled, transform: Any, labelled: Labelled) -> None:
    """mu_c from the momentum copy in eval mode; from labels alone before pseudo-labels start."""
    args, clock = run.args, time.perf_counter()
    model.share()
    model.encoder_k.eval()
    kind = args.proto if run.epoch >= max(1, args.pl_start) else "labelled"
    mu, least = refresh(
        model.encoder_k.embed, unlabelled.images, transform, labelled.chosen, labelled.labels,
        model.prototypes, kind, args.num_nn, args.tau_s, (args.seed, run.epoch, 2), device=run.device,
        batch_size=args.mu * args.batch_labelled // run.world, workers=args.workers, amp=args.amp == "bf16",
    )  # fmt: skip
    model.encoder_k.train()
    model.prototypes.copy_(mu)
    model.proto_epoch[0], model.proto_least[0] = run.epoch, least
    model.share()
    run.say(
        f"  epoch {run.epoch}: prototypes ({kind}) renewed in {time.perf_counter() - clock:.1f} s, the smallest mean "
        f"is of {least} images, cosine of different classes {spread(model.prototypes):.2f}"
    )


@torch.no_grad()
def move_prototypes(args: argparse.Namespace, model: SsCL, keys: Tensor, entries: losses.Memory) -> None:
    """--proto ema: one step towards the confident keys of all processes."""
    z, label, conf = (distributed.gather(part) for part in (keys, entries.label, entries.conf))
    model.prototypes.copy_(ema_step(model.prototypes, z, label, conf, args.proto_m))


if __name__ == "__main__":
    cli(main)
