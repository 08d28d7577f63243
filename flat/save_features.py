"""Features of a split, once, from the frozen encoder: python -m flat.save_features --checkpoint RUN/checkpoint.pth

Writes features.pt beside the checkpoint (or --out) and prints what the decoder makes of these images. Networks of
CloserLookFewShot (`epoch`, `state`) load too; name theirs by --model, --image_size, --dataset.
"""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flat import aet, data
from flat.backbone import Encoder, build
from flat.methods.baselinetrain import BaselineTrain
from flat.methods.pair import PairModel
from flat.options import METHODS, build_model, default_crop, default_size, family, has_decoder
from flat.options import get_parser as training_parser
from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import ImageList, sample_rng
from shared_utils.evaluation import collect
from shared_utils.flags import Parser, add_machine_flags, at_least, natural
from shared_utils.layout import follow, place
from shared_utils.run import cli, set_threads

SUPPORT = 11  # seed of augmented support images
PROBE = 7  # seed of the transformations that a decoder is measured on: the same for every network
OWN = ("model", "width", "image_size", "mean_std", "dataset", "data_dir", "method", "base_classes", "base_draw",
       "holdout")  # fmt: skip


def extract(encoder: Encoder, images: ImageList, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Features [N, D] on the CPU, eval mode, no augmentation."""
    encoder.eval()
    images.transform = data.evaluation_pipeline(args.image_size)

    def embed(x: Tensor) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return [encoder(follow(data.normalise(x, args.mean_std), encoder))]

    (feats,), _ = collect(embed, images, device, 256, args.workers, everything=True)
    return feats


class Augmented(Dataset):
    """The images of a set, each as the draw of (seed, copy, index) makes it."""

    def __init__(self, images: ImageList, copy: int):
        self.images, self.copy, self.labels = images, copy, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        with sample_rng(SUPPORT, self.copy, index):
            return self.images[index]


def extract_augmented(
    encoder: Encoder, images: ImageList, args: argparse.Namespace, device: torch.device, copies: int
) -> Tensor:
    """Features [N, copies, D] on the CPU of each image under draws of the training's augmentation, eval mode."""
    encoder.eval()
    images.transform = data.training_pipeline(args.image_size, True, args.crop or default_crop(args))

    def embed(x: Tensor) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return [encoder(follow(data.normalise(x, args.mean_std), encoder))]

    out = []
    for copy in range(copies):
        views: Any = Augmented(images, copy)
        (feats,), _ = collect(embed, views, device, 256, args.workers, everything=True)
        out.append(feats)
    return torch.stack(out, 1)


@torch.no_grad()
def decoder_scores(
    model: PairModel, images: ImageList, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Squared error of the decoder, that of the best constant on the same draws, their ratio, quarter turns in %."""
    model.eval()
    images.transform = data.evaluation_pipeline(args.image_size)
    fam = family(args)
    mean, std = aet.normalisation(fam, args.aet_norm)
    draw = aet.sample(len(images), fam, torch.Generator().manual_seed(PROBE))
    target = ((draw.target - mean) / std).float()
    done = 0

    def embed(x: Tensor) -> list[Tensor]:
        nonlocal done
        theta = draw.theta[done : done + len(x)]
        done += len(x)
        pair = [data.normalise(z, args.mean_std) for z in (x, aet.warp(x, theta, args.aet_pad))]
        _, _, read, read_t = model.encode(*(follow(z, model) for z in pair))
        assert read_t is not None
        return [model.decode(read, read_t)[0]]

    (mu,), _ = collect(embed, images, device, 256, args.workers, everything=True)
    error, constant = float((mu - target).square().mean()), aet.chance(target)
    out = {"decoder_mse": error, "chance_mse": constant, "decoder_relative": error / constant}
    watched = aet.telemetry(mu, target, mean, std, fam)
    return out | {"rotation": float(watched["acc/rotation"])} if "acc/rotation" in watched else out


@torch.no_grad()
def base_scores(model: PairModel, held: ImageList, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """On held-out images of the base classes: accuracy of the classifier in %, and the decoder's scores."""
    out: dict[str, float] = {}
    if isinstance(model, BaselineTrain):
        feats = extract(model.feature, held, args, device)
        logits = model.classifier.eval()(feats.to(device)).cpu()
        out["base_accuracy"] = 100 * float((logits.argmax(1) == held.labels).float().mean())
    if model.decoder is not None:
        out |= decoder_scores(model, held, args, device)
    return out


def augmented_copies(wanted: int, recipe: str) -> int:
    """--aug_support: -1 is the recipe's."""
    return wanted if wanted >= 0 else 5 * (recipe == "rfs")


def load(path: Path, given: argparse.Namespace) -> tuple[Encoder, PairModel | None, argparse.Namespace, str]:
    """Encoder, the whole model where the file is of a run of ours, resolved flags, hash of the encoder's weights.

    Args:
        given: flags of `OWN` that are not None win over those of the file.

    UserError: not such a file, or weights that do not fit.
    """
    saved = checkpoint.load(path)
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        raise UserError(f"{path}: no `state` inside; give a checkpoint of flat.train or of CloserLookFewShot")
    args = training_parser().parse_args([])
    stored = saved.get("args", {})
    for name, value in stored.items():
        if name in vars(args):
            setattr(args, name, value)
    for name in OWN:
        if getattr(given, name, None) is not None:
            setattr(args, name, getattr(given, name))
    args.image_size = args.image_size or default_size(args.dataset, args.model)
    args.amp, args.workers, args.data_dir = given.amp, given.workers, Path(args.data_dir)
    state = saved["state"]
    weights = {k.removeprefix("feature."): v for k, v in state.items() if k.startswith("feature.")}
    try:
        if stored:
            model = build_model(args)
            # A run may be copied without its decoder: features need none.
            checkpoint.load_strict(model, state, missing_ok=("decoder.*",))
            if has_decoder(args) and not any(key.startswith("decoder.") for key in state):
                model.decoder = None
            encoder, whole = model.feature, model
        else:
            encoder, whole = build(args.model, args.image_size, args.width), None
            checkpoint.load_strict(encoder, weights, drop=("trunk.*.trunk.*",))  # theirs lists Conv4's layers twice
    except UserError as error:
        raise UserError(f"{path}, taken as {args.model} for {args.image_size} pixels: {error}") from None
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    return encoder, whole, args, digest.hexdigest()[:16]


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="flat.save_features", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("--checkpoint", "--pretrained", type=Path, required=True, help="of flat.train (checkpoint.pth, "
      "EPOCH.tar, best_model.tar), or of CloserLookFewShot")  # fmt: skip
    a("--split", choices=list(data.SPLITS), default="novel")
    a("--out", type=Path, help="default: features.pt (features_SPLIT.pt for another split) beside the checkpoint")
    a("--model", help="this and the following default to the checkpoint's own flags")
    a("--width", type=natural)
    a("--image_size", "--img_size", type=natural)
    a("--mean_std", choices=list(data.MEAN_STD))
    a("--dataset", help="another one for a test across domains")
    a("--data_dir", type=Path)
    a("--method", choices=METHODS, help="chooses the default head of flat.test")
    a(
        "--aug_support",
        type=at_least(-1),
        default=-1,
        help="so many augmented copies of every image too, which support a classifier in its place (rfs: "
        "n_aug_support_samples); -1: 5 after --recipe rfs, else 0",
    )
    a("--base_classes", type=natural)
    a("--base_draw", type=natural)
    a("--holdout", type=natural)
    add_machine_flags(p, amp="none")
    return p


def main(argv: list[str] | None = None) -> int:
    given = get_parser().parse_args(argv)
    device = distributed.init(given.device)
    set_threads(given.threads, given.workers, device)
    encoder, model, args, digest = load(given.checkpoint, given)
    found = data.read_dataset(args.dataset, args.data_dir)
    if not found[given.split]:
        raise UserError(
            f"{args.data_dir}: has no {data.SPLITS[given.split]}/CLASS/*, classes to test on; --split base takes the "
            "training classes, flat.predict labels photos of yours"
        )
    images = data.as_list(found[given.split])
    place(model or encoder, device)
    feats = extract(encoder, images, args, device)
    copies = augmented_copies(given.aug_support, args.recipe)
    augmented = extract_augmented(encoder, images, args, device, copies) if copies else None
    scores: dict[str, float] = {}
    if model is not None and model.decoder is not None:
        scores |= {f"{given.split}_{k}": v for k, v in decoder_scores(model, images, args, device).items()}
    if model is not None and args.holdout and given.dataset is None:  # of the data that it was trained on
        names = data.pick_classes(sorted(found["base"]), args.base_classes, args.base_draw)
        held = data.as_list({name: found["base"][name] for name in names}, 0, args.holdout)
        scores |= {f"held_{k}": v for k, v in base_scores(model, held, args, device).items()}
    default = "features.pt" if given.split == "novel" else f"features_{given.split}.pt"
    out = given.out or given.checkpoint.with_name(default)
    checkpoint.save(out, {
        "features": feats, "labels": images.labels, "classes": images.classes, "count": len(feats),
        "split": given.split, "dataset": args.dataset, "method": args.method, "scores": scores, "weights": digest,
        "recipe": args.recipe, **({} if augmented is None else {"augmented": augmented}),
    })  # fmt: skip
    where = f"{args.dataset}, {given.split}: {len(feats)} images of {len(images.classes)} classes"
    beside = f" and {copies} augmented copies of each" if copies else ""
    print(f"flat/features: {where}{beside} -> {list(feats.shape)}, {out}", flush=True)
    print("  " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()), flush=True)
    print(f"  next: python -m flat.test --features {quote(str(out))}", flush=True)
    return 0


if __name__ == "__main__":
    cli(main)
