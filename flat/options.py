"""Flags of the training, what depends on others, and what they build."""

import argparse
import math
import os
from pathlib import Path

import torch
from torch import nn

from flat import aet, data
from flat.backbone import MODELS, Encoder, build, torchvision_names
from flat.methods.baselinetrain import BaselineTrain, make_head
from flat.methods.pair import BN_MODES, PairModel
from flat.methods.protonet import ProtoNet
from shared_utils import UserError, checkpoint, distributed
from shared_utils.flags import Parser, add_run_flags, at_least, natural, not_negative, positive
from shared_utils.init import add_init_flag, initialise

METHODS = ("baseline", "baseline++", "cosine", "protonet")
# optimiser, lr, weight decay, nesterov, images a step, steps an epoch (0: once through the data), schedule
RECIPES = {
    "closerlook": ("adam", 1e-3, 0.0, False, 16, 0, "none"),
    "rfs": ("sgd", 0.05, 5e-4, False, 64, 0, "60,80"),
    "bf3s": ("sgd", 0.1, 5e-4, True, 64, 1000, "20,23"),
    "cosine": ("sgd", 0.05, 5e-4, True, 64, 0, "cosine"),
    "snell": ("adam", 1e-3, 0.0, False, 64, 100, "half20"),
}


def add_data_flags(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    a("--dataset", default="miniImagenet", help=f"{', '.join(data.DATASETS)}; their layouts stand in flat/data.py")
    a("--data_dir", type=Path, default=os.environ.get("DATA_ROOT", "data"), help="folder of the data sets")
    a(
        "--image_size",
        "--img_size",
        type=natural,
        default=0,
        help="0: 84 (Conv4, ResNet12), 80 (WRN28), 224 (ResNet10/18), 32 for CIFAR",
    )
    a("--mean_std", choices=list(data.MEAN_STD), default="imagenet", help="normalisation of the images")
    a("--holdout", type=natural, default=0, help="images of each base class kept out of training, to be evaluated")
    a("--base_classes", type=natural, default=0, help="so many of the base classes; 0: all")
    a("--base_draw", type=natural, default=0, help="number of the draw of --base_classes")
    a("--per_class", type=natural, default=0, help="so many training images of each base class; 0: all")
    a("--cache", action="store_true", help="decode all images once and keep them in memory")


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="flat.train", description="Training on base classes with the transformation regulariser.")
    a = p.add_argument
    add_data_flags(p)
    a("--model", default="Conv4", help=", ".join(MODELS))
    a("--width", type=natural, default=0, help="channels of the first stage; 0: the published width")
    add_init_flag(p)
    a("--drop_block", type=float, default=0.1, help="rate of ResNet12's dropout and, in its last two blocks, DropBlock")
    a("--drop_block_steps", type=natural, default=40_000, help="steps over which DropBlock's rate rises from 0 "
      "(MetaOptNet); 0: the whole rate at once")  # fmt: skip
    a("--drop_block_size", type=natural, default=0, help="side of its squares; 0: 5, or 2 for CIFAR (MetaOptNet)")
    a("--method", default="baseline++", help=f"{', '.join(METHODS)} (baseline++: cosine with class norms, scale 2)")
    a(
        "--num_classes",
        type=positive,
        default=200,
        help="outputs of the classifier, at least the number of base classes",
    )
    a("--train_n_way", type=positive, default=5, help="classes of a training episode (protonet)")
    a("--test_n_way", type=positive, default=5, help="classes of a validation episode, and what n_query is scaled by")
    a("--n_shot", type=positive, default=5, help="support images of a class in an episode")
    a("--train_aug", action=argparse.BooleanOptionalAction, default=False, help="random crop, colour jitter, flip")
    a("--crop", choices=data.CROPS, help="of --train_aug: resized, padded by an eighth, or rfs, padded by 8 pixels "
      "(CIFAR 4) with its jitter (default: rfs with --recipe rfs, else resized)")  # fmt: skip
    a("--aet", choices=["aet", "avt", "none"], default="aet", help="L_AT: squared error, variational, or none")
    a(
        "--aet_lambda",
        type=not_negative,
        default=1.0,
        help="lambda, weight of L_AT (avt sums over 8 coefficients: lambda/8)",
    )
    a("--aet_warm", type=not_negative, default=0.0, help="w: weight lambda min(w progress, 1); 0: constant (EnAET: 10)")
    a("--aet_type", choices=["projective", "affine"], default="projective")
    a("--aet_shift", type=at_least(-1), default=-1, help="S, pixels a corner moves at most; -1: int(image_size / 8)")
    a("--shrink", type=float, help="smallest scale (default: .8, affine .7)")
    a("--enlarge", type=float, help="largest scale (default: 1.2, affine 1.3)")
    a("--rot", type=float, default=180.0, help="degrees, affine")
    a("--translate", type=float, default=0.2, help="of the side, affine")
    a("--shear", type=float, default=30.0, help="degrees, affine")
    a("--aet_norm", choices=["table", "estimate"], default="table", help="mean and std of theta: the releases', or "
      "from 200,000 draws")  # fmt: skip
    a("--aet_pad", choices=["grey", "reflect"], default="grey", help="what lies outside of the image")
    a("--aet_pool", choices=["flat", "gap"], default="flat", help="the decoder reads the classifier's features, or the "
      "averaged last map (Conv4)")  # fmt: skip
    a("--aet_targets", choices=["own", "shuffled"], default="own", help="shuffled: theta of another image (control)")
    a("--aet_smooth", action="store_true", help="SmoothL1 instead of the squared error")
    a("--decoder", choices=["linear", "block", "mlp"], default="linear")
    a("--bn", choices=BN_MODES, default="concat", help="batch norm of images and copies: together, apart, or apart "
      "with statistics of their own")  # fmt: skip
    a("--cls_on_transformed", type=int, choices=[0, 1], default=0, help="classify the copies too (control)")
    a("--divide", type=float, default=1000.0, help="divisor of avt's log-variance")
    a("--lrMul", type=float, default=10.0, help="learning rate of avt's fc2 over the others'")
    a("--avt_noise_eval", type=int, choices=[0, 1], default=0, help="noise at test time too, as in the AVT release")
    a("--recipe", choices=list(RECIPES), default="closerlook")
    a("--batch_size", type=natural, default=0, help="images a step, all processes together; 0: the recipe's")
    a("--lr", type=float, default=0.0, help="0: the recipe's")
    a("--stop_epoch", "--epochs", type=at_least(-1), default=-1, help="epochs; -1: by recipe, data set and "
      "method; 0: none, the network as it was initialised is stored")  # fmt: skip
    a(
        "--epoch_steps",
        type=at_least(-1),
        default=-1,
        help="steps of an epoch, 0: once through the data; -1: the recipe's",
    )
    a("--save_freq", type=positive, default=50, help="epochs between EPOCH.tar files")
    a("--val_freq", type=positive, default=10, help="epochs between evaluations on the held-out base images")
    a("--select", choices=["last", "val"], default="last", help="val: best_model.tar by prototypes on the val classes")
    a("--episodes", type=positive, default=600, help="validation episodes of --select val")
    a("--image-every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_run_flags(p, "flat/train/default")
    return p


def default_size(dataset: str, model: str) -> int:
    if dataset in ("cifarfs", "fc100"):
        return 32
    return {"Conv4": 84, "ResNet12": 84, "WRN28": 80}.get(model, 224)


def default_epochs(args: argparse.Namespace) -> int:
    if args.recipe == "bf3s":
        return 21 if args.dataset in ("cifarfs", "fc100") else 26
    if args.recipe == "snell":
        return 200
    if args.recipe != "closerlook":
        return 100
    if args.method == "protonet":
        return 600 if args.n_shot == 1 else 400
    return 200 if args.dataset == "CUB" else 400


def default_crop(args: argparse.Namespace) -> str:
    return "rfs" if args.recipe == "rfs" else "resized"


def resolve(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags."""
    args.image_size = args.image_size or default_size(args.dataset, args.model)
    if args.aet_shift < 0:
        args.aet_shift = aet.side_shift(args.image_size)
    affine = args.aet_type == "affine"
    args.shrink = (0.7 if affine else 0.8) if args.shrink is None else args.shrink
    args.enlarge = (1.3 if affine else 1.2) if args.enlarge is None else args.enlarge
    _, lr, _, _, batch, steps, _ = RECIPES[args.recipe]
    args.lr, args.batch_size = args.lr or lr, args.batch_size or batch
    if args.epoch_steps < 0:
        args.epoch_steps = 100 if args.method == "protonet" and args.recipe == "closerlook" else steps
    args.stop_epoch = default_epochs(args) if args.stop_epoch < 0 else args.stop_epoch
    args.crop = args.crop or default_crop(args)


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that contradict each other, before anything is loaded."""
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: unknown; choose from {', '.join(METHODS)}")
    if not 0 < args.shrink <= args.enlarge:
        raise UserError(f"--shrink {args.shrink} --enlarge {args.enlarge}: must be above 0 and in this order")
    if 4 * args.aet_shift >= args.image_size:
        raise UserError(f"--aet_shift {args.aet_shift}: must be below a quarter of --image_size {args.image_size}")
    if args.method == "protonet":
        if world > 1:
            raise UserError("--method protonet trains an episode in one process; leave torchrun away")
        if args.cls_on_transformed:
            raise UserError("--cls_on_transformed needs a classifier, which --method protonet has not")
        if not args.epoch_steps:
            raise UserError("--method protonet needs --epoch_steps, episodes of an epoch (CloserLookFewShot: 100)")
    elif args.batch_size % world or args.batch_size // world < 2:
        raise UserError(f"--batch_size {args.batch_size}: {world} processes need equal shares of 2 images or more")
    if args.aet_pool == "gap" and args.decoder == "block":
        raise UserError("--aet_pool belongs to the linear and mlp decoders; --decoder block has a pooling of its own")


def family(args: argparse.Namespace) -> aet.Family:
    return aet.Family(
        args.aet_type, args.image_size, args.aet_shift, args.shrink, args.enlarge, args.rot, args.translate, args.shear
    )


def has_decoder(args: argparse.Namespace) -> bool:
    """lambda = 0 is the plain baseline: no decoder, no pass over transformed images."""
    return args.aet != "none" and args.aet_lambda > 0


def build_model(args: argparse.Namespace, kind: str = "local") -> PairModel:
    """Encoder, then the classifier, then the decoder: what comes first starts equal in every arm.

    kind: of the batch norms, `sync` over processes.
    """
    encoder = build(args.model, args.image_size, args.width, args.drop_block, args.drop_block_size)
    distributed.convert_norm(encoder, kind)
    head = None if args.method == "protonet" else make_head(args.method, encoder.num_features, args.num_classes)
    decoder = None
    if has_decoder(args):
        own = args.decoder == "block" or args.aet_pool == "gap"
        stage = None
        if args.decoder == "block":
            stage = encoder.new_last_stage()
        c = encoder.channels if own else encoder.num_features
        decoder = aet.Decoder(args.decoder, c, family(args).dim, args.aet == "avt", stage)
        distributed.convert_norm(decoder, kind)
        if args.aet == "avt":
            encoder.add_noise(bool(args.avt_noise_eval))
            distributed.convert_norm(encoder, kind)
    if head is None:
        return ProtoNet(encoder, decoder, args.bn, args.aet_pool, args.train_n_way, args.n_shot)
    return BaselineTrain(encoder, head, decoder, args.bn, args.aet_pool, bool(args.cls_on_transformed))


def start_from(encoder: Encoder, args: argparse.Namespace) -> str:
    """--init: the encoder's weights from a run of this folder or a file of CloserLookFewShot (`state`), for ResNet10
    and ResNet18 also from what `initialise` reads; one line about them.

    UserError: no such file, weights of another network, or a backbone that others do not have.
    """
    path = Path(args.init)
    path = path / "checkpoint.pth" if path.is_dir() else path
    state = None
    if not args.init.startswith("timm:"):
        saved = checkpoint.load(path)
        state = saved.get("state") if isinstance(saved, dict) else None
    if state is not None:
        own = {key.removeprefix("feature."): value for key, value in state.items() if key.startswith("feature.")}
        try:  # theirs lists Conv4's layers twice; the noise is avt's
            report = checkpoint.load_strict(encoder, own, ("trunk.*.trunk.*", "noise.*"), ("noise.*",))
        except UserError as error:
            raise UserError(
                f"--init {args.init}, taken as {args.model} for {args.image_size} pixels: {error}"
            ) from None
        return f"{args.init}: {report}"
    view = torchvision_names(encoder)
    if view is None:
        raise UserError(
            f"--init {args.init}: no file of flat.train or CloserLookFewShot, and others have no {args.model}; "
            "--model ResNet18 takes weights of ResNet-18"
        )
    return initialise(view, args.init)


def build_optimizer(args: argparse.Namespace, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's, over every trained parameter; avt's fc2 in a group of its own (`lrMul` times the rate)."""
    kind, _, wd, nesterov, *_ = RECIPES[args.recipe]
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if not name.startswith("decoder.fc2.")], "scale": 1.0},
        {"params": [p for name, p in named if name.startswith("decoder.fc2.")], "scale": args.lrMul},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type == "cuda"
    if kind == "adam":
        return torch.optim.Adam(groups, args.lr, weight_decay=wd, fused=fused)
    return torch.optim.SGD(groups, args.lr, 0.9, weight_decay=wd, nesterov=nesterov, fused=fused)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Constant, x0.1 at milestones, halved every 20 epochs, or a cosine to 0; by epoch."""
    schedule = RECIPES[args.recipe][-1]
    if schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.stop_epoch))
    if schedule == "half20":
        return args.lr * 0.5 ** (epoch // 20)
    milestones = [] if schedule == "none" else [int(x) for x in str(schedule).split(",")]
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
