"""Pretrained networks for the evaluations: which one a checkpoint holds, strict loading, features of test clips."""

import argparse
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import models

from fame import augment
from fame.backbone import ARCHS, build
from fame.data import TestClips, VideoSet
from shared_utils import UserError, checkpoint, evaluation
from shared_utils.flags import positive
from shared_utils.init import HEADS as OTHERS
from shared_utils.init import initialise
from shared_utils.run import plain_errors, worker_init

# Flags whose default is what a run of ours has stored in its checkpoint, and the value where there is none.
STORED = {"arch": "I3D", "width": 16, "crop_size": 112, "frame_per_clip": 16, "stride": 2}
HEADS = ("id_head.*", "fc.*")  # of pretraining


def add_weights_flags(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    a("--pretrained", default="none", help="checkpoint of a run or of the release, or none: random weights")
    a("-a", "--arch", choices=ARCHS, help="default: the checkpoint's, else I3D")
    a("--width", type=positive, help="channels of the first layer of tiny; default: the checkpoint's")
    p.set_defaults(**dict.fromkeys(STORED), backbone_sha256="")


def add_network_flags(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    add_weights_flags(p)
    a("-cpv", "--clip_per_video", type=positive, default=10, help="test clips of a video, evenly spaced")
    a("--val_resize", default="auto", help="short side of a test video before the centre crop: pixels, none (the "
      "release), or auto: 128 for crops of 112, in proportion for others")  # fmt: skip


def from_checkpoint(args: argparse.Namespace) -> None:
    """Fill in the flags that were left to the checkpoint. UserError: it is of no network of this folder."""
    stored = evaluation.stored_flags(args.pretrained)
    for name, fallback in STORED.items():
        if getattr(args, name) is None:
            setattr(args, name, stored.get(name, fallback))
    if args.arch not in ARCHS:
        raise UserError(
            f"{args.pretrained}: holds a {args.arch}, which is no video network; give a run of fame.train or the "
            "release's file"
        )


def resolve(args: argparse.Namespace) -> None:
    """Fill in the flags that were left to the checkpoint, and --val_resize. UserError: a value out of range."""
    from_checkpoint(args)
    side = {"auto": str(round(args.crop_size * 8 / 7)), "none": "0"}.get(args.val_resize, args.val_resize)
    if not side.isdecimal() or 0 < int(side) < args.crop_size:
        raise UserError(f"--val_resize {args.val_resize}: auto, none, or at least the crop's {args.crop_size} pixels")
    args.val_resize = side


def load(args: argparse.Namespace, model: nn.Module, head: bool = False) -> str:
    """The weights of --pretrained into `model`; a line about it. Only heads may be dropped or stay new, or (`head`)
    nothing.

    UserError: a file of another architecture.
    """
    if args.pretrained == "none":
        return f"{args.arch}, random weights"
    state = checkpoint.read_weights(args.pretrained)
    drop = () if head else HEADS
    state = {key: value for key, value in state.items() if head or not key.startswith(("id_head.", "fc."))}
    try:
        report = checkpoint.load_strict(model, state, missing_ok=("*.num_batches_tracked", *drop))
    except UserError as error:
        raise UserError(f"{args.pretrained}, taken as {args.arch}: {error}") from None
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode() + value.contiguous().cpu().numpy().tobytes())
    args.backbone_sha256 = digest.hexdigest()[:16]  # a probe of weights that have since changed is not resumed
    return f"{args.arch}, {args.pretrained}: {report}"


def trunk(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, str]:
    """The network without a head, in eval mode on `device`, and a line about its weights."""
    model = build(args.arch, width=args.width)
    report = load(args, model)
    return model.requires_grad_(False).eval().to(device), report


def start_from(network: nn.Module, spec: str) -> str:
    """--init: the trunk's weights, and a head of the same shape, from a run, a file, or torchvision:NAME (trained on
    Kinetics-400); one line about them.

    UserError: no such file or name, or weights of another network.
    """
    drop = (*OTHERS, "id_head.*")
    if not spec.startswith("torchvision:"):
        return initialise(network, spec, HEADS, drop)
    try:
        state = models.get_model(spec.removeprefix("torchvision:"), weights="DEFAULT").state_dict()
        return f"{spec}: {checkpoint.load_strict(network, state, drop, HEADS)}"
    except UserError as error:
        raise UserError(f"--init {spec}: {error}; --arch must name the same network") from None
    except Exception as error:  # whatever names and downloads raise
        reason = " ".join(str(error).split())[:120]
        known = "r2plus1d_18, r3d_18 and s3d"
        raise UserError(f"--init {spec}: torchvision cannot give it ({reason}); it has {known}") from None


@torch.no_grad()
def outputs(
    embed: Callable[[Tensor], Tensor],
    videos: VideoSet,
    args: argparse.Namespace,
    device: torch.device,
    stats: tuple[tuple[float, ...], tuple[float, ...]] = (augment.MEAN, augment.STD),
    everything: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs [V, clips, C] (float32, on the device) of `embed` for a few videos after the other, and labels [V].

    They are those of this process's contiguous share of the videos, or of all. `embed` takes clips [N, 3, T, S, S].
    """
    first, last = (0, len(videos)) if everything else evaluation.share(len(videos))
    clips = TestClips(videos, args.crop_size, int(args.val_resize), args.clip_per_video)
    loader = DataLoader(
        Subset(clips, range(first, last)),
        max(1, 40 // args.clip_per_video),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
        generator=torch.Generator(),
    )
    for batch in plain_errors(loader):
        x = batch["clips"].to(device, non_blocking=True)  # [V, clips, 3, T, S, S]
        out = embed(augment.normalise(x.flatten(0, 1), stats)).float()
        yield out.unflatten(0, x.shape[:2]), batch["label"]
