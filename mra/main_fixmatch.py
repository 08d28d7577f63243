"""FixMatch with MRA on the strong branch: python -m mra.main_fixmatch --dataset stl10 --mae_ckpt MAE.pth

Pseudo-labels come from weakly augmented images, which MRA never touches; the moving average of the weights is tested.
Also by torchrun.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms as T

from mra import data, engine, nets, transforms
from mra.mra import add_mra_flags, build
from shared_utils import UserError, augment, checkpoint, distributed
from shared_utils.data import EpochSampler, ImageList, Keyed, mix_key, sample_rng
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_run_flags, natural, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.pictures import make_grid
from shared_utils.run import Run, cli
from shared_utils.strong import Draws, augmented, draw

STRONG = 3  # the stream of randomness of --strong_batch, beside those of `engine`


def get_parser() -> Parser:
    p = Parser(prog="mra.main_fixmatch", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    data.add_data_flags(p)
    data.add_label_flags(p)
    add_mra_flags(p)
    a("--labelled", type=Path, help="class folders of your own labelled images, in place of --data_path")
    a("--unlabelled", type=Path, help="any folder of images beside --labelled; class folders in it are not looked at")
    engine.add_start_flags(p)
    a("--arch", choices=nets.ARCHS, default="wrn28-2")
    a("--width", type=natural, default=0, help="channels of the first stage; 0: the network's own")
    a("--stem", choices=nets.STEMS, default="imagenet")
    a("--strong", choices=list(transforms.POLICIES), default="fixmatch", help="policy of the strong branch, before "
      "MRA: RandAugment as FixMatch draws it (magnitude drawn, each with p = 0.5), or torchvision's")  # fmt: skip
    a("--strong_cutout", action=argparse.BooleanOptionalAction, default=True, help="FixMatch's, after MRA")
    a("--strong_batch", action="store_true", help="make the strong branch's RandAugment in batches on the device: the "
      "same operations to the bit, other draws; for a GPU whose loader is slow")  # fmt: skip
    a("--iterations", type=positive, default=2**20, help="steps, a whole number of epochs")
    a("--epoch_steps", type=positive, default=1024, help="steps of an epoch: between tests and checkpoints")
    a("--batch_size", type=positive, default=64, help="labelled images a step, all processes together")
    a("--mu", type=positive, default=7, help="unlabelled images for one labelled image")
    a("--threshold", type=float, default=0.95, help="confidence from which a pseudo-label counts")
    a("--lambda_u", type=float, default=1.0, help="weight of the unlabelled loss")
    a("--lr", type=float, default=0.03, help="times cos(7 pi k / 16 K) at step k of K")
    a("--wd", "--weight_decay", type=not_negative, default=5e-4, help="1e-3 for CIFAR-100")
    a("--momentum", type=not_negative, default=0.9, help="Nesterov's")
    engine.add_decay_flag(p, False)
    a("--ema", type=float, default=0.999, help="decay of the moving average of the weights")
    a("--bn_momentum", type=float, default=0.001, help="share of a batch in batch norm's running statistics: 1 - "
      "--ema, so that weights and statistics look back as far")  # fmt: skip
    a("--sync_bn", action="store_true", help="batch norm over all processes")
    a("--image_every", type=positive, default=1000, help="steps between pictures in tensorboard")
    add_run_flags(p, "mra/fixmatch/default")
    p.older(bn_momentum=0.1, decay_bias_norm=True)
    p.set_defaults(head_lr_mult=1.0)
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags out of range, before anything is loaded."""
    if (args.labelled is None) != (args.unlabelled is None):
        raise UserError("--labelled and --unlabelled go together: two folders of images of your own")
    if args.strong_batch and args.strong != "fixmatch":
        raise UserError(f"--strong_batch has FixMatch's operations alone; leave it away for --strong {args.strong}")
    if args.labelled and (args.dataset != "folder" or args.train_list):
        raise UserError("--labelled is a folder of its own; leave --dataset and --train_list away")
    if not 0 < args.momentum < 1:
        raise UserError(f"--momentum {args.momentum}: Nesterov's must lie between 0 and 1")
    if args.iterations % args.epoch_steps:
        raise UserError(f"--iterations {args.iterations} is no multiple of --epoch_steps {args.epoch_steps}")
    if args.batch_size % world:
        raise UserError(f"--batch_size {args.batch_size} does not divide over {world} processes")
    if not 0 < args.bn_momentum <= 1:
        raise UserError(f"--bn_momentum {args.bn_momentum}: must lie above 0 and up to 1")
    if not 0 <= args.threshold <= 1 or not 0 <= args.ema < 1 or args.lambda_u < 0 or not args.lr > 0:
        raise UserError("--threshold must lie in 0..1, --ema in 0..1 (1 excluded), --lambda_u from 0, --lr above 0")


class Rounds(EpochSampler):
    """Batches of (round, index) for one process: all images in a new order, again and again, without end.

    An epoch is a number of steps, wherever it ends within a round, so every image is drawn as often as any other (a
    set of 20,000 cut to epochs would show its first classes more often). A round has draws of its own.
    """

    def __init__(self, size: int, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1):
        self.steps = steps
        super().__init__(max(size, batch_size * world), batch_size, seed, rank, world)
        self.size = size

    def __len__(self) -> int:
        return self.steps - self.start

    @property
    def steps_per_epoch(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known: dict[int, np.ndarray] = {}
        for step in range(self.epoch * self.steps + self.start, (self.epoch + 1) * self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            places = [divmod(n, self.size) for n in range(first, first + self.batch_size)]
            known = {
                turn: known[turn]
                if turn in known
                else np.random.Generator(np.random.PCG64(mix_key(self.seed, turn))).permutation(self.size)
                for turn in range(places[0][0], places[-1][0] + 1)
            }
            yield [(turn, int(known[turn][place])) for turn, place in places]


class TwoViews(Dataset):
    """(weak, strong) of an unlabelled image, two crops; its label, if the folder has one, is not read."""

    def __init__(self, images: ImageList, weak: Any, strong: Any):
        self.images, self.weak, self.strong = images, weak, strong

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image: Image.Image = self.images.image(index)
        return self.weak(image), self.strong(image)


class Both:
    """Two loaders, or two samplers, as one: labelled and unlabelled batches side by side, from the same position."""

    def __init__(self, labelled: Any, unlabelled: Any):
        self.labelled, self.unlabelled = labelled, unlabelled

    @property
    def steps_per_epoch(self) -> int:
        return self.labelled.steps_per_epoch

    def at(self, epoch: int, step: int = 0) -> "Both":
        self.labelled.at(epoch, step)
        self.unlabelled.at(epoch, step)
        return self

    def __iter__(self) -> Iterator[Any]:
        return zip(self.labelled, self.unlabelled, strict=True)


class Ema:
    """Moving average of the weights; batch-norm statistics are taken over as they are.

    So do the TensorFlow release (it averages trainable variables alone), TorchSSL and kekmodel/FixMatch-pytorch; their
    statistics fit averaged weights because a batch enters them with 0.001 (--bn_momentum): they average over as many
    steps as the weights. With PyTorch's 0.1 they are those of the last ten steps of another network.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = copy.deepcopy(network).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        own, new = ([q.detach() for q in n.parameters()] for n in (self.network, network))
        torch._foreach_lerp_(own, new, 1 - self.decay)
        for mine, theirs in zip(self.network.buffers(), network.buffers()):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        checkpoint.load_strict(self.network, state["shadow"])


def fixmatch_loss(
    labelled: Tensor, y: Tensor, weak: Tensor, strong: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy on labels; on pseudo-labels of confident weak views; which of them are confident [mu B].

    The unlabelled loss is a mean over all mu B images, the doubtful ones with 0. No gradient through the weak views.
    """
    confidence, pseudo = weak.detach().softmax(1).max(1)
    mask = (confidence >= threshold).to(strong.dtype)
    unlabelled = (F.cross_entropy(strong, pseudo, reduction="none") * mask).mean()
    return F.cross_entropy(labelled, y), unlabelled, mask


def strengthened(run: Run, crops: Tensor) -> Tensor:
    """The strong views, normalised, of this process's crops uint8 [mu B, 3, H, H]; drawn for all processes together."""
    first, count = run.rank * len(crops), len(crops)
    generator = torch.Generator().manual_seed(mix_key(run.args.seed, run.step, STRONG) >> 1)
    drawn = [part[first : first + count] for part in draw(run.world * count, generator)]
    mean, std = (torch.tensor(v, device=crops.device).view(3, 1, 1) for v in transforms.STATS[run.args.mean_std])
    return (augmented(crops, Draws(*drawn)) / 255 - mean) / std


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    args.init = args.init or args.pretrained
    run = Run(args, "mra", "fixmatch")
    check_flags(args, run.world)
    local, epochs = args.batch_size // run.world, args.iterations // args.epoch_steps

    # Frozen autoencoder
    stats = args.mean_std
    operator, about_mra = build(args, args.input_size, run.device, transforms.STATS[stats])
    engine.settle(args, operator)
    size = args.input_size

    # Data: labelled images weakly augmented, unlabelled ones in two views; two streams of samples, each keyed
    train, tests = data.open_sets(args)
    crowd = data.open_unlabelled(args)
    if not args.unlabelled:  # the same files, whose neighbours are counted once
        crowd.unread = {}
    weak = transforms.train_transform(size, "padded", "none", stats)
    train.transform = weak
    bytes_of = T.Compose([transforms.geometry(size, "padded"), T.PILToTensor()])
    shape = bytes_of if args.strong_batch else transforms.train_transform(size, "padded", args.strong, stats)
    views = TwoViews(crowd, weak, shape)
    test_name, test = next(iter(tests.items()), (None, None))
    if test is not None:
        test.transform = transforms.test_transform(size, stats)
    seeds = (args.seed, mix_key(args.seed, 1) >> 1)
    parts = []
    stock: Any
    for stock, share, seed in ((train, local, seeds[0]), (views, local * args.mu, seeds[1])):
        sampler = Rounds(len(stock), share, args.epoch_steps, seed, run.rank, run.world)
        parts.append((run.loader(Keyed(stock, seed), sampler), sampler))
    loader: Any = Both(parts[0][0], parts[1][0])
    both: Any = Both(parts[0][1], parts[1][1])

    # Model
    network = nets.build(args.arch, len(train.classes), args.width, args.stem)
    started = nets.start(network, args.init)
    nets.set_bn_momentum(network, args.bn_momentum)
    distributed.convert_norm(network, "sync" if args.sync_bn else "local")
    place(network, run.device)
    net = distributed.wrap(network)  # before a resume gives each process its own statistics
    ema = Ema(network, args.ema)
    optimizer = engine.optimizer_of(args, network, nesterov=True)
    info = engine.Info(train.classes)
    run.track(state_dict=network, optimizer=optimizer, ema=ema, info=info)
    run.reads(train, crowd, *([] if test is None else [test]))
    where = f"{args.labelled}, {args.unlabelled}" if args.labelled else f"{args.data_path} ({args.dataset})"
    seen = data.shared_files(test, crowd) if test is not None and args.labelled else 0
    run.preflight(
        {
            "data": f"{where}: {engine.describe(train, 'labelled')}, {len(crowd)} unlabelled; "
            + (f"test {test_name} {len(test)}" if test is not None else f"test {data.UNTESTED}")
            + f"; caution: {seen} test images are among the unlabelled ones" * (seen > 0),
            "MRA on the strong branch": about_mra,
            "classifier": f"{args.arch}, {sum(q.numel() for q in network.parameters()) / 1e6:.2f} M, {started}",
            "batch": f"{args.batch_size} labelled + {args.batch_size * args.mu} unlabelled, {args.iterations} steps",
            "learning rate": f"{args.lr} cos(7 pi k / 16 K)",
            "expected initial loss": f"about log {len(train.classes)} = {math.log(len(train.classes)):.2f}: no "
            "pseudo-label is confident at first",
            "estimated time": engine.estimate(run, network, operator, args.iterations, (1 + 2 * args.mu, args.mu)),
        }
    )
    network.train()
    for epoch, ((x, y, _), (u_weak, u_strong)) in run.batches(loader, both, epochs):
        lr = args.lr * math.cos(7 * math.pi * run.step / (16 * args.iterations))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y, u_weak, u_strong = (v.to(run.device, non_blocking=True) for v in (x, y, u_weak, u_strong))

        if args.strong_batch:
            u_strong = strengthened(run, u_strong)

        # MRA and then Cutout on the strong views alone; one forward pass of all views
        u_hat = u_strong
        if operator is not None:
            with run.autocast():
                u_hat = operator(u_strong, *engine.draws(run, operator, len(u_strong)))
        if args.strong_cutout:
            with sample_rng(args.seed, run.step, 0, engine.MIXING):
                u_hat = engine.cutout(u_hat, size // 2)
        views_all = follow(torch.cat([x, u_weak, u_hat]), network)
        with run.autocast():
            logits = net(views_all).float()  # [B + 2 mu B, C]
        l_weak, l_strong = logits[len(x) :].chunk(2)
        l_x, l_u, confident = fixmatch_loss(logits[: len(x)], y, l_weak, l_strong, args.threshold)
        loss = l_x + args.lambda_u * l_u
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(network)

        total = distributed.all_sum(loss.detach()) / run.world
        watched: dict[str, Any] = {}
        tested: dict[str, float] = {}
        if run.log_due():
            watched = {"loss/labelled": l_x, "loss/unlabelled": l_u, "fixmatch/mask": confident.mean()}
            if operator is not None:
                watched |= engine.telemetry(operator, u_strong)
            watched = engine.everywhere(watched)
        ended = run.step_in_epoch + 1 == args.epoch_steps
        if test is not None and ended and bool(torch.isfinite(total)):
            info.history.append({**engine.accuracy(run, ema.network, test), "epoch": float(epoch)})
            tested["val/top1"] = info.history[-1]["top1"]
        run.log(total, lr=lr, evaluated=tested, **watched)
        if run.due(args.image_every):
            shown = [augment.denormalise(v[:8]).cpu() for v in (u_weak, u_strong, u_hat)]
            run.image("views/weak_strong_mra", make_grid(torch.cat(shown), nrow=len(shown[0]), padding=2))

    result = info.result("top1")
    if test is not None:
        result["top1_median20"] = float(statistics.median(scores["top1"] for scores in info.history[-20:]))
    write_result(run.dir, result | {"minutes": run.minutes(), "mae_md5": args.mae_md5, "test": test_name})
    run.finish(*engine.hints(run, tests))
    return 0


if __name__ == "__main__":
    cli(main)
