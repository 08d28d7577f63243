"""Training of FLAT (paper 1912.12674): python -m flat.train --dataset miniImagenet --data_dir DATA --train_aug

Also torchrun --nproc-per-node N -m flat.train ...; baselines and controls are flags.
"""

import math
from collections import Counter
from shlex import quote
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from flat import aet, data
from flat.backbone import ramp_drop_block
from flat.episodes import EpisodeDrawer, EpisodeSampler
from flat.methods.pair import PairModel
from flat.methods.protonet import ProtoNet
from flat.options import (
    build_model,
    build_optimizer,
    check_flags,
    family,
    get_parser,
    has_decoder,
    learning_rate,
    resolve,
    start_from,
)  # fmt: skip
from flat.save_features import base_scores, extract
from flat.test import accuracies
from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EpochSampler, ImageList, Keyed, mix_key
from shared_utils.layout import follow, place
from shared_utils.pictures import make_grid
from shared_utils.preflight import about, seconds
from shared_utils.run import Run, cli, plain

TRANSFORMS = 1  # names the stream of transformations among those of a seed


class Again(Dataset):
    """A dataset as often as an epoch of a fixed number of steps needs it; each time with draws of its own."""

    def __init__(self, images: ImageList, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        return self.images[index % len(self.images)]


class Scores:
    """The last evaluation and the best one, kept in the checkpoint: a resumed run logs and selects the same."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def state_dict(self) -> dict[str, float]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.values = dict(state)


def transformations(run: Run, fam: aet.Family, local: int, shuffled: bool) -> tuple[Tensor, Tensor]:
    """theta [B, 8] for this process's images of this step, and the raw targets [B, dim].

    They are drawn for the global batch by (seed, step), from a stream of their own: neither the number of processes
    nor anything else of the run depends on them.
    """
    generator = torch.Generator().manual_seed(mix_key(run.args.seed, run.step, TRANSFORMS) >> 1)
    draw = aet.sample(local * run.world, fam, generator)
    target = draw.target.roll(1, 0) if shuffled else draw.target  # control: theta of another image
    mine = slice(run.rank * local, (run.rank + 1) * local)
    return draw.theta[mine], target[mine]


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "flat", "train")
    resolve(args)
    check_flags(args, run.world)

    # Data: the training images of the base classes, and those held out.
    unread = Counter[str]()
    found = data.read_dataset(args.dataset, args.data_dir, unread)
    names = data.pick_classes(sorted(found["base"]), args.base_classes, args.base_draw)
    base = {name: found["base"][name] for name in names}
    last = args.holdout + args.per_class if args.per_class else None
    images = data.as_list(base, args.holdout, last, args.cache)
    images.transform, images.unread = data.training_pipeline(args.image_size, args.train_aug, args.crop), unread
    held = data.as_list(base, 0, args.holdout, args.cache) if args.holdout else None
    if args.select == "val" and not found["val"]:
        raise UserError(f"--select val: {args.data_dir} has no val/CLASS/* to select by")
    val = data.as_list(found["val"], cache=args.cache) if args.select == "val" else None
    if len(names) < 2:
        raise UserError(f"{args.data_dir}: one base class, {names[0]}; a classifier needs two at the least")
    if args.num_classes < len(names):
        raise UserError(f"--num_classes {args.num_classes}: the data has {len(names)} base classes")
    if args.method != "protonet" and not args.epoch_steps and args.batch_size > len(images):
        raise UserError(
            f"--batch_size {args.batch_size}: the data has {len(images)} training images; give --batch_size "
            f"{len(images)} or less"
        )

    # Model
    sync = "sync" if run.world > 1 else "local"
    model = place(build_model(args, sync), run.device).train()
    start = start_from(model.feature, args) if args.init else ""
    wrapped = distributed.wrap(model)
    optimizer = build_optimizer(args, model, run.device)
    scores = Scores()
    run.track(state=model, optimizer=optimizer, scores=scores)

    sampler: Any
    if isinstance(model, ProtoNet):
        n_query = max(1, 16 * args.test_n_way // args.train_n_way)
        drawer = EpisodeDrawer(images.labels, args.train_n_way, args.n_shot, n_query, args.seed, images.classes)
        sampler, local = EpisodeSampler(drawer, args.epoch_steps), args.train_n_way * (args.n_shot + n_query)
        episode_targets = model.targets(local).to(run.device)
        stock: Dataset = images
    else:
        local = args.batch_size // run.world
        stock = Again(images, args.epoch_steps * args.batch_size) if args.epoch_steps else images
        sampler = EpochSampler(len(stock), local, args.seed, run.rank, run.world)  # type: ignore[arg-type]
    loader = run.loader(Keyed(stock, args.seed), sampler)
    steps = sampler.steps_per_epoch

    fam, regularised = family(args), has_decoder(args)
    paired = regularised or bool(args.cls_on_transformed)
    mean, std = aet.normalisation(fam, args.aet_norm)
    run.reads(images, *(part for part in (held, val) if part is not None))
    run.preflight(facts(run, images, model, fam, local, steps) | ({"start": start} if start else {}))

    for epoch, (pixels, y, _) in run.batches(loader, sampler, args.stop_epoch):
        lr = learning_rate(args, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        ramp_drop_block(model, run.step, args.drop_block_steps)
        pixels, y = pixels.to(run.device, non_blocking=True), y.to(run.device)  # [B, 3, s, s] bytes, [B]
        x = follow(data.normalise(pixels, args.mean_std), model)
        x_t = target = None
        if paired:  # the copy is made of the crop that the network sees, in pixel units, and normalised afterwards
            theta, raw_target = transformations(run, fam, local, args.aet_targets == "shuffled")
            copies = aet.warp(pixels, theta, args.aet_pad)
            x_t = follow(data.normalise(copies, args.mean_std), model)
            target = ((raw_target - mean) / std).float().to(run.device)  # [B, dim]

        # One step: L = L_cls + lambda L_AT; L_AT reaches the encoder through both images, and sees no label.
        with run.autocast():
            logits, mu, raw = wrapped(x, x_t)
        if isinstance(model, ProtoNet):
            y = episode_targets
        elif args.cls_on_transformed:
            y = y.repeat(2)
        l_cls = F.cross_entropy(logits, y)
        loss, l_at = l_cls, None
        weight = aet.warm(args.aet_lambda, run.step / (steps * args.stop_epoch), args.aet_warm)
        if mu is not None and target is not None:
            if raw is None:
                l_at = aet.aet_loss(mu, target, args.aet_smooth)
            else:
                l_at = aet.avt_loss(mu, raw, target, args.divide)
            loss = l_cls + weight * l_at
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        watched: dict[str, Any] = {}
        if run.log_due():
            watched["acc/base_train"] = 100 * (logits.detach().argmax(1) == y).float().mean()
            watched["loss/cls"] = l_cls.detach()
            if mu is not None and target is not None and l_at is not None:
                watched |= {"loss/at": l_at.detach(), "at/weight": weight}
                watched |= aet.telemetry(mu.detach(), target, mean, std, fam)
        tested: dict[str, float] = {}
        if run.step_in_epoch == steps - 1 and bool(torch.isfinite(loss)):
            tested = end_of_epoch(run, model, scores, held, val, epoch)
        watched |= scores.values
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, evaluated=tested, **watched)
        if paired and run.due(args.image_every):
            shown = torch.cat([pixels[:8].float(), copies[:8]]).cpu() / 255
            run.image("views/image_transformed", make_grid(shown, nrow=min(8, len(pixels)), padding=2))

    weights = quote(f"{run.dir}/checkpoint.pth")
    few = "--support DIR --query DIR --out predictions.csv"
    own = f"label photos by a few of each class: python -m flat.predict --pretrained {weights} {few}"
    run.finish(*[f"evaluate: python -m flat.save_features --checkpoint {weights}"] * bool(found["novel"]), own)
    return 0


@torch.no_grad()
def end_of_epoch(
    run: Run, model: PairModel, scores: Scores, held: ImageList | None, val: ImageList | None, epoch: int
) -> dict[str, float]:
    """Held-out base images, the best model on the val classes, and the numbered checkpoint, where they are due.

    Returns what was found. No global generator is touched, and every process comes to the same numbers.
    """
    args, final = run.args, epoch == run.args.stop_epoch - 1
    found: dict[str, float] = {}
    model.eval()
    if held is not None and (final or (epoch + 1) % args.val_freq == 0):
        found = {f"held/{name}": value for name, value in base_scores(model, held, args, run.device).items()}
    saving = final or epoch % args.save_freq == 0
    if val is not None and saving:
        feats = extract(model.feature, val, args, run.device)
        drawer = EpisodeDrawer(val.labels, args.test_n_way, args.n_shot, 15, args.seed, val.classes)
        found["val/proto"] = 100 * float(accuracies(feats, drawer, "proto", args.episodes, run.device).mean())
        if found["val/proto"] > scores.values.get("val/best", -1.0):
            found["val/best"] = found["val/proto"]
            save(run, model, epoch, "best_model.tar")
    if saving:
        save(run, model, epoch, f"{epoch}.tar")
    model.train()
    scores.values |= found
    return found


def save(run: Run, model: PairModel, epoch: int, name: str) -> None:
    """CloserLookFewShot's file: `epoch` and `state`; ours adds the flags."""
    if run.rank == 0:
        checkpoint.save(run.dir / name, {"epoch": epoch, "state": model.state_dict(), "args": plain(run.args)})


def facts(run: Run, images: ImageList, model: PairModel, fam: aet.Family, local: int, steps: int) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    trained = sum(p.numel() for p in model.feature.parameters()) / 1e6
    rest = sum(p.numel() for p in model.parameters()) / 1e6 - trained
    out = {
        "data": f"{args.dataset} in {args.data_dir}: {len(images)} images of {len(images.classes)} base classes, "
        f"{args.holdout} of each held out",
        "batch": f"{local * run.world} images = {run.world} processes x {local}, {steps} steps an epoch, "
        f"{args.stop_epoch} epochs",
        "learning rate": f"{args.lr} ({args.recipe})",
        "parameters": f"{trained:.3f} M of {args.model} for {model.feature.num_features} features, {rest:.3f} M of "
        "classifier and decoder",
        "estimated time": estimate(run, model, local, steps),
    }
    ways = args.train_n_way if isinstance(model, ProtoNet) else args.num_classes
    expected = f"about {math.log(ways):.2f} = log({ways}) or more of the classifier"
    if has_decoder(args):
        mean, std = aet.normalisation(fam, args.aet_norm)
        probe = (aet.sample(20_000, fam, torch.Generator().manual_seed(0)).target - mean) / std
        square = float(probe.square().mean()) * (fam.dim if args.aet == "avt" else 1)
        out["transformations"] = (
            f"{fam.kind}, shift {fam.shift}, scale {fam.shrink}..{fam.enlarge}; the best constant has a squared error "
            f"of {aet.chance(probe):.3f}"
        )
        expected += f" + {args.aet_lambda} x about {square:.2f} of the decoder"
    out["expected initial loss"] = expected
    return out


@torch.no_grad()
def estimate(run: Run, model: PairModel, local: int, steps: int) -> str:
    """Minutes of the whole run from a timed forward pass of the encoder; a backward pass counts as two."""
    args = run.args
    x = torch.zeros(local, 3, args.image_size, args.image_size, device=run.device)
    passed = seconds(run, model, lambda: model.feature(follow(x, model)))
    passes = 3 * (2 if has_decoder(args) or args.cls_on_transformed else 1)
    steps *= args.stop_epoch
    return about(passed * passes * steps / 60, steps)


if __name__ == "__main__":
    cli(main)
