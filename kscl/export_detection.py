"""The backbone for detection: python -m kscl.export_detection --pretrained CHECKPOINT --out resnet50.pth

`detectron2` writes the names of its ResNet (as MoCo's conversion script does); a .pth file, which its checkpointer
reads as it does a .pkl, and which holds tensors alone. `torchvision` writes the plain
names, for torchvision.models.detection and most other libraries. The projection head stays behind.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from kscl.arch import DEPTHS as ARCHS
from kscl.arch import STEMS, build
from shared_utils import UserError, checkpoint
from shared_utils.evaluation import add_network_flags, load_backbone
from shared_utils.run import Parser, cli

DROP = ("fc.*", "projection_head.*", "prototypes.*")  # heads, of other methods too
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="kscl.export_detection", description=__doc__.splitlines()[0])
    add_network_flags(p, list(ARCHS), STEMS, "resnet50")
    p.add_argument("--format", choices=["torchvision", "detectron2"], default="detectron2")
    p.add_argument("--out", type=Path, required=True, help="file to write, .pth")
    return p


def detectron2_name(key: str) -> str:
    """layerK -> res(K+1), what is in no layer -> stem, bnK -> convK.norm, downsample.0/1 -> shortcut(.norm)."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    for k in (1, 2, 3, 4):
        key = key.replace(f"layer{k}.", f"res{k + 1}.").replace(f"bn{k}.", f"conv{k}.norm.")
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def detectron2_overrides(arch: str) -> str:
    """What a config of detectron2 needs for these weights (MoCo's detection folder)."""
    flags = f"MODEL.RESNETS.DEPTH {DEPTHS[arch]} MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB"
    flags += " MODEL.PIXEL_MEAN [123.675,116.280,103.530] MODEL.PIXEL_STD [58.395,57.120,57.375]"
    return flags + (" MODEL.RESNETS.RES2_OUT_CHANNELS 64" if DEPTHS[arch] < 50 else "")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.pretrained == "none":
        raise UserError("--pretrained none: there is nothing to export; give a checkpoint")
    if args.out.suffix != ".pth":
        raise UserError(f"{args.out}: the name must end in .pth (detectron2 unpickles a .pkl file by other code)")
    encoder, report = load_backbone(build, args, "resnet50", DROP)
    state: dict[str, Tensor] = {k: v.contiguous() for k, v in encoder.state_dict().items()}
    obj: Any = state
    if args.format == "detectron2":
        if args.arch not in DEPTHS or args.stem != "imagenet" or args.width != 64:
            raise UserError(
                f"detectron2 has no {args.arch} of width {args.width} with stem {args.stem}: "
                f"{', '.join(DEPTHS)} at full width only; --format torchvision writes any network"
            )
        renamed = {detectron2_name(k): v for k, v in state.items()}
        obj = {"model": renamed, "__author__": "MOCO", "matching_heuristics": True}
    checkpoint.save(args.out, obj)
    print(f"{report}\n{len(state)} tensors -> {args.out}")
    if args.format == "detectron2":
        print(f"config: MODEL.WEIGHTS {args.out} {detectron2_overrides(args.arch)}")
        print("MoCo: SyncBN and an extra norm after res5 (R50-C4), TEST.PRECISE_BN True; VOC 24k, COCO 2x schedule")
    return 0


if __name__ == "__main__":
    cli(main)
