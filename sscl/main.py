"""Training of SsCL (paper 2105.07387): python -m sscl.main --data IMAGENET --split_file 1percent.txt

Also torchrun --nproc-per-node 8 -m sscl.main ...; the arms of the ablation and the baselines are flags:
supervised `--lambda_u 0 --lambda_c 0`, FixMatch `--lambda_c 0 --calib none --da off --theta 0.95 --pl_start 0 --strong
fixmatch --joint_views --bn_momentum 0.001`, joint without exchange `--calib none --neighbours off`, MoCo v2
`--no_labels --lambda_u 0 --calib none`.
"""

import argparse
import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import distributed, timm_nets
from shared_utils.data import mix_key
from shared_utils.layout import follow, place
from shared_utils.run import Run, cli
from sscl import losses, options
from sscl.arch import Encoder, build, set_norm_momentum
from sscl.calibration import Alignment, calibrate, log_similarity, sharpen, threshold
from sscl.data import Labelled, Unlabelled, open_streams, open_training
from sscl.losses import Taught
from sscl.model import SsCL
from sscl.prototypes import ema_step, refresh, spread
from sscl.watch import Telemetry, ending, facts, picture
from sscl.weights import Whole, initialise


def get_parser() -> argparse.ArgumentParser:
    return options.get_parser(__doc__ or "")


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


class Arm(NamedTuple):
    """What an arm computes: pseudo-labels, the contrastive loss, keys of the momentum copy."""

    guessing: bool
    contrasting: bool
    keyed: bool

    @property
    def views(self) -> list[str]:
        """Views of an unlabelled image that it needs."""
        needed = {"weak": self.guessing, "strong": self.guessing or self.contrasting, "key": self.keyed}
        return [name for name, on in needed.items() if on]


def arm_of(args: argparse.Namespace) -> Arm:
    guessing = not args.no_labels and (args.lambda_u > 0 or (args.lambda_c > 0 and args.neighbours == "on"))
    return Arm(guessing, args.lambda_c > 0, args.lambda_c > 0 or (guessing and args.calib != "none"))


@torch.no_grad()
def teach(
    run: Run, arm: Arm, model: SsCL, x: Tensor | None, u: dict[str, Tensor], index: Tensor, weak: Tensor | None,
    started: bool, done: float,
) -> Taught:  # fmt: skip
    """Keys of the momentum copy, p, q, and the pseudo-labels calibrated by both.

    Args:
        x: labelled images [B, 3, H, W]; u: views of the unlabelled ones [U, 3, H, W]; index: their numbers [U].
        weak: logits [U, C] of the weak views where they have been in the student's pass (--joint_views).
        started: pseudo-labels count from here on; done: share of the training, for --theta_ramp.
    """
    args, classes = run.args, len(model.prototypes)
    keys: list[Tensor] = []
    p = log_q = aligned = None
    with run.autocast():
        if arm.guessing:
            p = model.predict(u["weak"]) if weak is None else F.softmax(weak.detach(), dim=1)  # [U, C]
        if arm.keyed:
            dealt = torch.Generator().manual_seed(mix_key(args.seed, run.step, 1))
            keys = model.embed_keys([u["key"]] + ([x] if x is not None else []), dealt)  # [U, D], [B, D]
    if keys and x is not None:
        log_q = log_similarity(keys[0], model.prototypes, args.tau_s)  # [U, C]
    label = torch.full_like(index, losses.UNKNOWN)
    conf = torch.zeros_like(index, dtype=torch.bool)
    tilde = torch.zeros(len(index), classes, device=index.device)
    if p is not None:
        model.alignment.update(p, log_q)
        aligned = guess = model.alignment(p)
        if log_q is not None:
            guess = calibrate(aligned, log_q, args.calib, model.alignment.qbar, args.calib_weight)
        tilde = sharpen(guess, args.sharpen_t)  # [U, C]
        if started:
            theta = threshold(args.theta, args.theta_ramp, done)
            label, conf = tilde.argmax(1), (tilde if args.theta_on == "sharp" else guess).max(1).values >= theta
    return Taught(losses.Memory(label, conf, tilde, index), keys, p, aligned, log_q)


def student(run: Run, query: Any, *views: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Logits [n, C] and embeddings [n, D], with gradient, of those views that there are, in one pass."""
    with run.autocast():
        return query([view for view in views if view is not None])


def truth(logits: Tensor, y: Tensor | None, index: Tensor | None) -> losses.Memory | None:
    """The labelled images as entries of the queue; their class probabilities are the network's own.

    <p, one-hot> would be the largest product that p has with anything: labelled keys outranked all others.
    """
    if y is None or index is None:
        return None
    return losses.Memory(y, torch.ones_like(y, dtype=torch.bool), F.softmax(logits.detach().float(), dim=1), index)


def step_losses(
    args: argparse.Namespace, arm: Arm, model: SsCL, outs: list[tuple[Tensor, Tensor]], taught: Taught,
    known: losses.Memory | None, started: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], losses.Chosen | None]:  # fmt: skip
    """L_x, L_u and L_c, and the neighbours of the unlabelled anchors.

    Args:
        outs: logits and embeddings of the labelled images, if any, and of the strong views, if any.
        known: the labelled images.
    """
    zero = torch.zeros((), device=taught.entries.image.device)
    loss_x = loss_u = loss_c = zero
    entries, picked = taught.entries, None
    if known is not None:
        loss_x = F.cross_entropy(outs[0][0], known.label)
    if args.lambda_u > 0 and started:
        loss_u = losses.masked_ce(outs[-1][0], entries.prob if args.soft_targets else entries.label, entries.conf)
    if arm.contrasting:
        anchors = [(entries, outs[-1][1], taught.keys[0])]
        if args.labelled_anchors and known is not None:
            unknown = torch.full_like(known.label, losses.UNKNOWN)  # before --pl_start P_i = {k_i} for everybody
            own = known if started else known._replace(label=unknown, conf=torch.zeros_like(known.conf))
            anchors.append((own, outs[0][1], taught.keys[1]))
        chosen = [pick(args, model, who, key) for who, _, key in anchors]
        picked = chosen[0]
        each = [
            losses.contrast(v, key, model.queue, found, args.tau, args.ctr)
            for (_, v, key), found in zip(anchors, chosen)
        ]
        loss_c = torch.cat(each).mean()
    return (loss_x, loss_u, loss_c), picked


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "sscl", "train")
    options.resolve(args)
    options.check_flags(args, run.world)
    device = run.device
    arm = arm_of(args)
    views = arm.views

    # Data: an epoch is one of the unlabelled images, that is all images without their labels.
    data = open_training(args)
    options.check_sizes(args, len(data.images), bool(data.chosen))
    unlabelled, labelled, pairs = open_streams(run, data.images, data.chosen, views)
    steps = pairs.steps_per_epoch
    told = args.diagnostics == "on" and data.images.classes and not args.labelled  # true labels, to be looked at
    watch = Telemetry(args, data.images.labels.to(device) if told else None, data.chosen)

    # Model
    classes = max(1, len(data.images.classes))
    encoder = Encoder(build(args.arch, args.width, args.stem), classes, args.dim)
    timm_nets.check_size(encoder.backbone, args.arch, args.img_size)
    report = "scratch" if args.init == "scratch" else initialise(encoder, args.init)
    encoder.proj.requires_grad_(arm.contrasting)
    encoder.fc.requires_grad_(labelled is not None)
    alignment = Alignment(classes, args.da, args.da_m)
    ranked = arm.contrasting and arm.guessing and args.sim == "prob"  # else nobody asks for the queue's probabilities
    model = SsCL(encoder, alignment, args.moco_k, args.moco_m, ranked, args.bn_splits)
    distributed.convert_norm(model, "split" if args.bn_splits > 1 else "local", args.bn_splits)
    set_norm_momentum(model, args.bn_momentum)
    place(model, device).train()
    query = distributed.wrap(model)
    trained = [parameter for parameter in model.encoder_q.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, args.lr, args.momentum, weight_decay=args.wd, nesterov=args.momentum > 0, fused=device.type == "cuda"
    )
    run.track(state_dict=Whole(model, data.images.classes), optimizer=optimizer)
    peak = max(learning_rate(args, step, steps) for step in (0, round(args.warmup_epochs * steps)))
    run.reads(*data.read)
    run.preflight(facts(run, data, model, steps, peak, report, views))

    for epoch, (batch, own) in run.batches(pairs, pairs, args.epochs):
        lr = learning_rate(args, run.step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if arm.keyed and labelled is not None and refresh_due(args, model, epoch):
            renew_prototypes(run, model, unlabelled, labelled)
        u: dict[str, Any] = {name: follow(batch[name], model) for name in views if name in batch}
        if arm.keyed:
            u.setdefault("key", u.get("weak"))  # --key_view weak
        index = batch["index"].to(device)  # [U]
        x = follow(own[0], model) if own else None  # [B, 3, H, W]
        y, x_index = (own[1].to(device), own[2].to(device)) if own else (None, None)
        started = epoch >= args.pl_start  # pseudo-labels count

        # The momentum copy follows, and teaches; the query encoder passes, and all losses see the queue as it is.
        model.update_key_encoder(statistics=not arm.keyed)
        if args.joint_views:
            outs = student(run, query, x, u["weak"], u.get("strong"))
            weak = outs.pop(int(x is not None))[0]  # [U, C]; the others alone are trained
            taught = teach(run, arm, model, x, u, index, weak, started, run.step / (args.epochs * steps))
        else:
            taught = teach(run, arm, model, x, u, index, None, started, run.step / (args.epochs * steps))
            outs = student(run, query, x, u.get("strong"))
        known = truth(outs[0][0], y, x_index)
        terms, picked = step_losses(args, arm, model, outs, taught, known, started)
        ctr_weight = args.lambda_c * (epoch >= args.ctr_start)
        loss = terms[0] + args.lambda_u * terms[1] + ctr_weight * terms[2]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        parts = torch.stack([part.detach().float() for part in (loss, *terms)])
        total, *means = distributed.all_sum(parts) / run.world  # means over the processes
        watched: dict[str, Any] = dict(zip(("loss/x", "loss/u", "loss/c"), means))
        if run.log_due():
            watched |= watch.step(model, taught, picked, index)
        if arm.keyed:
            model.enqueue(taught.keys[0], taught.entries, labelled=False)
            if known is not None:
                model.enqueue(taught.keys[1], known, labelled=True)
            if args.proto == "ema" and started and labelled is not None:
                move_prototypes(args, model, taught.keys[0], taught.entries)
        run.log(total, lr=lr, **watched)
        if views and run.due(args.image_every):
            run.image("views/" + "_".join(views), picture([u[name] for name in views]))

    run.finish(*ending(args, model, arm.guessing), f"next: {options.next_command(args, run.dir)}")
    return 0


def pick(args: argparse.Namespace, model: SsCL, who: losses.Memory, key: Tensor) -> losses.Chosen:
    """The positives and negatives that this arm trains with."""
    if args.neighbours == "off" or args.no_labels:
        return losses.all_negatives(who, model.memory)
    return model.nearest(who, key, args.num_pos, args.sim)


def refresh_due(args: argparse.Namespace, model: SsCL, epoch: int) -> bool:
    """At the first epoch, when pseudo-labels start, and every E_p epochs, once; `ema` is only set anew at the first
    two."""
    anew = epoch in (0, args.pl_start) or (args.proto != "ema" and epoch % args.proto_every == 0)
    return anew and int(model.proto_epoch) != epoch


def renew_prototypes(run: Run, model: SsCL, unlabelled: Unlabelled, labelled: Labelled) -> None:
    """mu_c from the momentum copy in eval mode; from labels alone before pseudo-labels start."""
    args, clock = run.args, time.perf_counter()
    model.share()
    model.encoder_k.eval()
    kind = args.proto if run.epoch >= max(1, args.pl_start) else "labelled"
    mu, least = refresh(
        model.encoder_k.embed, unlabelled.images, labelled.transform, labelled.chosen, labelled.labels,
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
