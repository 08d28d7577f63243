"""Training of a classifier on augmented images: the step, what is drawn for it, schedules, test scores."""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from shlex import quote
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from mra import nets
from mra.mra import MRA, attention_scores, score_entropy
from mra.transforms import PADDINGS, POLICIES, train_transform
from shared_utils import UserError, augment, distributed
from shared_utils.data import EpochSampler, ImageList, mix_key, sample_rng
from shared_utils.evaluation import stream, topk
from shared_utils.flags import natural, not_negative, positive
from shared_utils.init import add_init_flag
from shared_utils.layout import follow
from shared_utils.pictures import make_grid
from shared_utils.run import Run

MIXES = ("none", "mixup", "cutmix", "cutout")
DRAWS, MIXING = 1, 2  # names of the streams of randomness of a seed


def add_training_flags(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    a("--arch", choices=nets.ARCHS, default="resnet50")
    a("--width", type=natural, default=0, help="channels of the first stage; 0: the network's own")
    a("--stem", choices=nets.STEMS, default="imagenet", help="of ResNet-18 to 50; cifar: 3x3 without pooling")
    add_start_flags(p)
    a("--crop", choices=["resized", "padded"], default="resized", help="random resized crop, or padded by an eighth")
    a("--padding_mode", choices=PADDINGS, default="reflect", help="of padded crops; constant: black")
    a("--min_scale", type=float, default=0.08, help="least area of a resized crop")
    a("--policy", choices=list(POLICIES), default="none", help="before MRA: FixMatch's RandAugment (magnitude drawn, "
      "each operation with probability 0.5), or torchvision's policies")  # fmt: skip
    a("--color_jitter", type=not_negative, default=0.0, help="brightness, contrast and saturation, in random order")
    a("--lighting", type=not_negative, default=0.0, help="std of the noise along ImageNet's principal colours")
    a("--mix", choices=MIXES, default="none", help="after MRA, so that pasted rectangles stay whole")
    a("--mix_alpha", type=float, default=1.0, help="share ~ Beta(alpha, alpha) of mixup and cutmix")
    a("--mix_prob", type=float, default=1.0, help="probability that a batch is mixed")
    a("--cutout_size", type=natural, default=0, help="side of the hole; 0: half of the image")
    a("--head_lr_mult", type=float, default=1.0, help="learning rate of the linear layer over that of the rest")
    a("--momentum", type=not_negative, default=0.9)
    a("--nesterov", action=argparse.BooleanOptionalAction, default=False)
    a("--warmup_epochs", type=natural, default=0, help="linear, lr / n in the first of n epochs")
    a("--lr_decay", type=float, default=0.1, help="factor at each epoch of --schedule")
    add_decay_flag(p, True)
    a("--sync_bn", action="store_true", help="batch norm over all processes")
    a(
        "--eval_every",
        type=natural,
        default=1,
        help="epochs between tests; the last one is always tested; 0: that alone",
    )
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")


def add_start_flags(p: argparse.ArgumentParser) -> None:
    add_init_flag(p)
    p.add_argument("--pretrained", help="an older name of --init")


def add_decay_flag(p: argparse.ArgumentParser, default: bool) -> None:
    p.add_argument(
        "--decay_bias_norm", action=argparse.BooleanOptionalAction, default=default,
        help="weight decay on biases and batch norm too",
    )  # fmt: skip


def check_training_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range, before anything is loaded."""
    if not 0 <= args.momentum < 1:
        raise UserError(f"--momentum {args.momentum}: must lie in 0..1 (1 excluded)")
    if args.nesterov and not args.momentum:
        raise UserError("--nesterov needs a --momentum above 0; give one, or --no-nesterov")
    if not args.lr > 0 or not args.mix_alpha > 0 or not args.head_lr_mult > 0 or not args.lr_decay > 0:
        raise UserError("--lr, --lr_decay, --mix_alpha and --head_lr_mult must be above 0")
    if not 0 <= args.mix_prob <= 1 or not 0 < args.min_scale <= 1:
        raise UserError("--mix_prob must lie in 0..1, and --min_scale above 0 and up to 1")
    if args.batch_size % world or args.batch_size // world < 2:
        raise UserError(f"--batch_size {args.batch_size} does not give each of {world} processes the same 2 or more")


def settle(args: argparse.Namespace, operator: MRA | None, default: int = 224) -> None:
    """--input_size, where it was not given: the autoencoder's. UserError: too small for --arch."""
    if args.input_size is None:
        args.input_size = operator.mae.img_size if operator is not None else default
    nets.check_size(args.arch, args.input_size)


def training_transform(args: argparse.Namespace) -> Any:
    """What an image of a classifier's training goes through before MRA."""
    return train_transform(
        args.input_size, args.crop, args.policy, args.mean_std, args.min_scale, args.padding_mode, args.color_jitter,
        args.lighting,
    )  # fmt: skip


def epochs_of(text: str) -> list[int]:
    """--schedule: `60,80`. UserError: anything but whole numbers with commas between."""
    try:
        return [int(x) for x in text.split(",") if x]
    except ValueError:
        raise UserError(f"--schedule {text}: epochs with commas, for example 60,80") from None


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Cosine to 0, or --lr_decay at each epoch of --schedule; by epoch, from 0. It rises over the --warmup_epochs."""
    if epoch < args.warmup_epochs:
        return args.lr * (epoch + 1) / args.warmup_epochs
    if args.decay == "cos":
        return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return args.lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)


def optimizer_of(args: argparse.Namespace, network: nn.Module, nesterov: bool = False) -> torch.optim.SGD:
    """SGD; --head_lr_mult for the linear layer; biases and batch norm without weight decay, if so asked."""
    groups: list[dict[str, Any]] = []
    for decayed in (True, False):
        for head, scale in ((False, 1.0), (True, args.head_lr_mult)):
            params = [
                q
                for name, q in network.named_parameters()
                if name.startswith("fc.") == head and (args.decay_bias_norm or q.ndim > 1) == decayed
            ]
            if params:
                groups.append({"params": params, "scale": scale, "weight_decay": args.wd if decayed else 0.0})
    fused = next(network.parameters()).device.type == "cuda" or None
    return torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.wd, nesterov=nesterov, fused=fused)


Share = tuple[int, int, int]  # of the global batch: first, last + 1, images in all


def draws(run: Run, operator: MRA, count: int, share: Share | None = None) -> tuple[Tensor, Tensor]:
    """MRA's noise [B, L] and choice [B] for this process's images of this step, drawn for all processes together."""
    generator = torch.Generator().manual_seed(mix_key(run.args.seed, run.step, DRAWS) >> 1)
    first, last, total = share or (run.rank * count, (run.rank + 1) * count, run.world * count)
    noise, use = operator.draw(total, generator)
    return noise[first:last], use[first:last]


def cutout(x: Tensor, size: int, share: Share | None = None) -> Tensor:
    """A square of the mean colour (0) in each image [B, 3, H, W], its centre anywhere, so that it may stick out.

    Drawn for all processes together, from generators that are in the same state on each of them.
    """
    holes: list[Tensor] = []
    rank, count = distributed.rank(), len(x)
    first, last, total = share or (rank * count, (rank + 1) * count, distributed.world() * count)
    for side in x.shape[2:]:
        start = torch.randint(side, (total, 1))[first:last] - size // 2
        place = torch.arange(side)
        hole = (place >= start) & (place < start + size)  # [B, side]
        holes.append(hole.to(x.device, non_blocking=True))
    return x.masked_fill(holes[0][:, None, :, None] & holes[1][:, None, None, :], 0)


def mixed(
    args: argparse.Namespace, x: Tensor, y: Tensor, classes: int, key: tuple[int, ...], share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """Images and targets ([B] or soft [B, C]) after --mix; all that is drawn depends on `key` alone."""
    if args.mix == "none":
        return x, y
    with sample_rng(*key):
        if float(torch.rand(())) >= args.mix_prob:
            return x, y
        if args.mix == "cutout":
            return cutout(x, args.cutout_size or x.shape[-1] // 2, share), y
        kind = v2.CutMix if args.mix == "cutmix" else v2.MixUp
        return kind(alpha=args.mix_alpha, num_classes=classes)(x, y)


class Info:
    """Names of the classes and the test scores so far, kept in the checkpoint: a resumed run selects the same best."""

    def __init__(self, classes: list[str]):
        self.classes = classes
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if list(state["classes"]) != self.classes:
            raise UserError("the checkpoint was trained on other classes than the data has; give another --output-dir")
        self.history = [dict(scores) for scores in state["history"]]

    def result(self, key: str) -> dict[str, Any]:
        """The last scores, and the best of `key` with its epoch; nothing where there were no tests."""
        if not self.history:
            return {}
        best = max(self.history, key=lambda scores: scores[key])  # the first of equals
        return {**self.history[-1], f"{key}_best": best[key], "best_epoch": int(best["epoch"])}


@torch.no_grad()
def accuracy(run: Run, network: nn.Module, images: ImageList, per_class: bool = False) -> dict[str, Any]:
    """top1 and top5 in per cent on clean images; `per_class`: also hits and images of each class. Keeps train mode."""
    distributed.same_buffers(network)
    was = network.training
    network.eval()
    classes = len(images.classes)
    hits = torch.zeros(2, dtype=torch.float64)
    table = torch.zeros(2, classes, dtype=torch.float64)  # right, all

    def logits(x: Tensor) -> list[Tensor]:
        with run.autocast():
            return [network(x)]

    for (out,), y in stream(logits, images, run.device, max(256, run.args.batch_size), run.args.workers):
        hits += topk(out, y)
        right = (out.argmax(1).cpu() == y).double()
        table += torch.stack([torch.bincount(y, w, classes) for w in (right, torch.ones_like(right))])
    network.train(was)
    top1, top5 = (100 * distributed.all_sum(hits.to(run.device)).cpu() / len(images)).tolist()
    scores: dict[str, Any] = {"top1": top1, "top5": top5}
    return scores | ({"table": distributed.all_sum(table.to(run.device)).cpu()} if per_class else {})


def fit(
    run: Run, network: Any, net: Any, loader: Any, sampler: EpochSampler, operator: MRA | None,
    optimizer: torch.optim.SGD, info: Info, evaluate: Callable[[], dict[str, float]] | None,
) -> None:  # fmt: skip
    """Train `network` from the run's position to its end.

    Args:
        net: `network` as `distributed.wrap` returns it, made before a resume gives each process its own statistics.
        evaluate: called after the epochs of --eval_every; None: there are no test images.
    """
    args, classes = run.args, len(info.classes)
    network.train()
    for epoch, (images, labels, _) in run.batches(loader, sampler, args.epochs):
        lr = learning_rate(args, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        share = sampler.share(run.step_in_epoch)
        x = follow(images, network)  # [B, 3, H, W]
        y = labels.to(run.device, non_blocking=True)  # [B]

        # x_hat = MRA(x), without gradient; then mixing of (x_hat, y); then one step of the classifier alone
        x_hat = x
        if operator is not None:
            with run.autocast():
                x_hat = operator(x, *draws(run, operator, len(x), share))
        own = 0 if args.mix == "cutout" else run.rank  # Mixup and CutMix: a share and partners within each process
        x_mix, target = mixed(args, x_hat, y, classes, (args.seed, run.step, own, MIXING), share)
        with run.autocast():
            logits = net(follow(x_mix, network))  # [B, C]
        loss = F.cross_entropy(logits.float(), target) * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        total = distributed.all_sum(loss.detach()) / run.world  # of all: what follows is decided alike everywhere
        watched: dict[str, Any] = {}
        tested: dict[str, float] = {}
        if run.log_due():
            right = (logits.detach().argmax(1) == y).float().mean()
            watched["acc/train"] = 100 * right * sampler.weight(run.step_in_epoch)
            if operator is not None:
                watched |= telemetry(operator, x)
            watched = everywhere(watched)
        last = epoch + 1 == args.epochs
        ended = run.step_in_epoch + 1 == sampler.steps_per_epoch
        if evaluate is not None and ended and bool(torch.isfinite(total)):
            if last or (args.eval_every and (epoch + 1) % args.eval_every == 0):
                info.history.append({**evaluate(), "epoch": float(epoch)})
                tested = {f"val/{k}": v for k, v in info.history[-1].items() if k != "epoch"}
        run.log(total, lr=lr, evaluated=tested, **watched)
        if run.due(args.image_every):
            shown = [augment.denormalise(v[:8]).cpu() for v in (x, x_hat, x_mix)]
            run.image("views/input_mra_mixed", make_grid(torch.cat(shown), nrow=len(shown[0]), padding=2))


def everywhere(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means over the processes of numbers that each has of its own, equal, part of the batch."""
    return {name: distributed.all_sum(value.detach()) / distributed.world() for name, value in values.items()}


@torch.no_grad()
def telemetry(operator: MRA, x: Tensor, count: int = 32) -> dict[str, Tensor]:
    """Entropy of the attention of some images of x, over log L: near 1 the probe tells nothing."""
    z = x[:count].float() * operator.scale + operator.shift
    a = attention_scores(operator.mae, operator.mae.embed(z), operator.source)
    return {"mra/entropy": score_entropy(a, operator.source, operator.mae.size.enc[0]).mean()}


@torch.no_grad()
def estimate(run: Run, network: nn.Module, operator: MRA | None, total: int, parts: tuple[int, int] = (1, 1)) -> str:
    """Minutes of all `total` steps from a timed forward pass (a backward pass counts as two) and a timed MRA.

    `parts`: batches of --batch_size that the network and MRA see in a step.
    """
    args = run.args
    local = args.batch_size // run.world
    augmented = parts[1] * local
    x = follow(torch.zeros(parts[0] * local, 3, args.input_size, args.input_size, device=run.device), network)
    network.eval()
    for _ in range(2):
        seconds = [time.perf_counter()]
        with run.autocast():
            network(x).sum().item()
            seconds.append(time.perf_counter())
            if operator is not None:
                operator(x[:augmented], *operator.draw(augmented, torch.Generator().manual_seed(0))).sum().item()
            seconds.append(time.perf_counter())
    network.train()
    step = 3 * (seconds[1] - seconds[0]) + seconds[2] - seconds[1]
    return f"about {max(1, round(step * total / 60))} min for {total} steps if data loading keeps up"


def hints(run: Run, tests: Mapping[str, ImageList]) -> list[str]:
    """Commands that use the classifier of this run; the occlusion test where it has test images."""
    args, lines = run.args, []
    file, size = quote(f"{run.dir}/checkpoint.pth"), args.input_size
    if getattr(args, "dataset", "folder") == "folder":
        folder = quote(str(getattr(args, "unlabelled", None) or args.data_path))
        lines.append(f"next: python -m mra.predict {folder} --pretrained {file} --out predictions.csv")
    if tests:
        cell = next(cell for cell in range(16, 0, -1) if size % cell == 0)
        lines.append(f"occlusion: python -m mra.eval_occlusion --checkpoint {file}" + f" --cell {cell}" * (cell != 16))
    return lines


def describe(images: ImageList, kind: str = "training") -> str:
    """How many images of which classes, for the preflight."""
    names = ", ".join(images.classes[:5]) + ", ..." * (len(images.classes) > 5)
    return f"{len(images)} {kind} images of {len(images.classes)} classes ({names})"
