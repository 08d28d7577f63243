"""The backbone for detection and segmentation: python -m sage.export --pretrained CHECKPOINT --out resnet50.pth

`torchvision` writes the plain names (torchvision.models.detection; mmdetection and mmsegmentation take them as
`init_cfg`); `detectron2` the names of its ResNet in a .pth file, which its checkpointer reads; `release` all networks
under the names of the original release, its aliases `backbone.*` and `decoder.layer5.*` included.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from sage.arch import DEPTHS, STEMS
from sage.options import backbone
from shared_utils import UserError, checkpoint
from shared_utils.evaluation import add_network_flags
from shared_utils.run import Parser, cli


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sage.export", description=(__doc__ or "").splitlines()[0])
    add_network_flags(p, list(DEPTHS), STEMS, "resnet50")
    p.add_argument("--format", choices=["torchvision", "detectron2", "release"], default="torchvision")
    p.add_argument("--out", type=Path, required=True, help="file to write, .pth")
    return p


def detectron2_name(key: str) -> str:
    """layerK -> res(K+1), what is in no layer -> stem, bnK -> convK.norm, downsample.0/1 -> shortcut(.norm)."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    for k in (1, 2, 3, 4):
        key = key.replace(f"layer{k}.", f"res{k + 1}.").replace(f"bn{k}.", f"conv{k}.norm.")
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def release_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a run with the release's aliases: its loader knows no file without them."""
    out = dict(state)
    for old, new in (("online_net.0.", "backbone."), ("decoder.final.", "decoder.layer5.")):
        out |= {new + key.removeprefix(old): value for key, value in state.items() if key.startswith(old)}
    return out


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.pretrained == "none":
        raise UserError("--pretrained none: there is nothing to export; give a checkpoint")
    if args.out.suffix != ".pth":
        raise UserError(f"{args.out}: the name must end in .pth (detectron2 unpickles a .pkl file by other code)")
    obj: Any
    if args.format == "release":
        loaded = checkpoint.load(args.pretrained)
        state = loaded.get("state_dict") if isinstance(loaded, dict) else None
        if not isinstance(state, dict) or not any(key.startswith("online_net.1.") for key in state):
            raise UserError(f"{args.pretrained}: --format release takes a checkpoint of sage.train")
        named = release_names(state)
        obj, count = {"state_dict": named, "author": "sage"}, len(named)
    else:
        encoder, report = backbone(args)
        plain: dict[str, Tensor] = {key: value.contiguous() for key, value in encoder.state_dict().items()}
        obj, count = plain, len(plain)
        print(report)
        if args.format == "detectron2":
            if args.arch in ("resnet10",) or args.stem != "imagenet" or args.width != 64:
                raise UserError(
                    f"detectron2 has no {args.arch} of width {args.width} with stem {args.stem}; --format torchvision "
                    "writes any network"
                )
            renamed = {detectron2_name(key): value for key, value in plain.items()}
            obj = {"model": renamed, "__author__": "sage", "matching_heuristics": True}
    checkpoint.save(args.out, obj)
    print(f"{count} tensors -> {args.out}")
    if args.format == "detectron2":
        print(
            f"config: MODEL.WEIGHTS {args.out} MODEL.RESNETS.DEPTH {args.arch.removeprefix('resnet')} "
            "MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB MODEL.PIXEL_MEAN [127.5,127.5,127.5] "
            "MODEL.PIXEL_STD [127.5,127.5,127.5] MODEL.BACKBONE.FREEZE_AT 0"
        )
        print("R50-C4 2x (an extra norm after res5, SyncBN) or R50-FPN 1x; batch 16, lr 0.02, 90k iterations")
    elif args.format == "torchvision":
        print(
            "mean and standard deviation of the input are 0.5 (bytes: 127.5); mmsegmentation: a dilated ResNet-50 with "
            f"init_cfg=dict(type='Pretrained', checkpoint='{args.out}'), FCN head, Cityscapes, crop 769, 40k iterations"
        )
    return 0


if __name__ == "__main__":
    cli(main)
