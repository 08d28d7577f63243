"""An MDP pretraining checkpoint as plain weights for mmsegmentation, or its backbone under other libraries' names.

    python -m mdp.lab.export_mmseg runs/mdp/pretrain/small/checkpoint.pth --out mdp_r50.pth
    python -m mdp.lab.export_mmseg CHECKPOINT --out backbone.pth --format torchvision    (mmdetection reads these too)
    python -m mdp.lab.export_mmseg CHECKPOINT --out backbone.pth --format detectron2
    python -m mdp.lab.export_mmseg CHECKPOINT --out backbone.safetensors --format safetensors    (and a model card)

The projector and the classifier of the cross-entropy arms stay behind: fine-tuning starts with a new ``conv_seg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from mdp.transfer import FORMATS, export
from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser
from shared_utils.lab.export import (
    INPUT,
    LOADED,
    Made,
    add_export_flags,
    by_timm,
    check,
    write_backbone,
    write_detectron2,
)
from shared_utils.run import cli


def get_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, help="checkpoint.pth of python -m mdp.main_pretrain")
    p.add_argument("--branch", choices=["q", "k"], default="q", help="query encoder, or its moving average")
    add_export_flags(p, [*FORMATS, "detectron2", "safetensors", "hub"], "mmseg")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(str(args.checkpoint), args.out, args.format)
    obj = checkpoint.load(args.checkpoint)
    if not isinstance(obj, Mapping) or not isinstance(obj.get("state_dict"), Mapping):
        raise UserError(f"{args.checkpoint}: not an MDP pretraining checkpoint (no state_dict inside)")
    try:
        fmt = args.format if args.format in FORMATS else "torchvision"
        state = export(obj["state_dict"], args.branch, fmt)
    except UserError as error:
        raise UserError(f"{args.checkpoint}: {error}") from None
    flags = obj.get("args") or {}
    arch, width = str(flags.get("arch", "resnet50")), int(flags.get("base_channels", 64))
    if args.format == "detectron2":
        line = write_detectron2(state, args.out, arch, width, "imagenet", author="mdp")
        print(f"{line} MODEL.PIXEL_MEAN [123.675,116.280,103.530] MODEL.PIXEL_STD [58.395,57.120,57.375]")
    elif args.format in ("safetensors", "hub"):
        make = Made([f"model = mdp.models.ResNet({arch.removeprefix('resnet')}, {width})", LOADED])
        args.pretrained = args.checkpoint
        made = by_timm(arch, output_stride=8) if width == 64 else make
        print(write_backbone(args, state, "mdp", f"{arch}, width {width}, {INPUT}", made))
    else:
        checkpoint.save(args.out, state)
    dropped = len(obj["state_dict"]) - len(state)
    print(f"{args.out}: {len(state)} tensors of encoder_{args.branch} in {args.format} names, {dropped} others dropped")
    return 0


if __name__ == "__main__":
    cli(main)
