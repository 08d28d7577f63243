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
from typing import Any

from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser
from shared_utils.lab.export import INPUT, add_export_flags, check, write_detectron2, write_safetensors
from shared_utils.run import cli

FORMATS = ("mmseg", "torchvision")


def export(state_dict: Mapping[str, Tensor], branch: str = "q", fmt: str = "mmseg") -> dict[str, Tensor]:
    """Select the weights that are transferred.

    Args:
        state_dict: keys ``encoder_q.backbone...``, ``encoder_q.decode_head...``, also below ``module.``.
        branch: ``q``, the trained encoder, or ``k``, its moving average.
        fmt: ``mmseg`` keeps ``backbone.*`` and ``decode_head.*``; ``torchvision`` keeps the backbone, unprefixed.
    Raises:
        UserError: not an MDP state dict, or one without that branch.
    """
    if branch not in ("q", "k"):
        raise UserError(f"branch '{branch}' is not known; choose q (trained) or k (moving average)")
    if fmt not in FORMATS:
        raise UserError(f"format '{fmt}' is not known; choose one of {', '.join(FORMATS)}")
    prefix = f"encoder_{branch}."
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "backbone.conv1.weight" not in own:
        first = next(iter(state_dict), "no key at all")
        raise UserError(f"not an MDP pretraining checkpoint: no {prefix}backbone.conv1.weight (its first key: {first})")
    if fmt == "torchvision":
        return {k.removeprefix("backbone."): v for k, v in own.items() if k.startswith("backbone.")}
    return {k: v for k, v in own.items() if k.startswith(("backbone.", "decode_head."))}


def load_pretrained(path: str | Path, branch: str = "q") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in mmsegmentation's names and the flags of their pretraining.

    Accepts a pretraining checkpoint or a file written by this exporter, whose flags are unknown ({}).
    """
    obj = checkpoint.load(path)
    if isinstance(obj, Mapping) and isinstance(obj.get("state_dict"), Mapping):
        try:
            return export(obj["state_dict"], branch), dict(obj.get("args") or {})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if isinstance(obj, Mapping) and isinstance(obj.get("backbone.conv1.weight"), Tensor):
        return dict(obj), {}
    raise UserError(
        f"{path}: not an MDP pretraining checkpoint and not an export of one; see python -m mdp.main_pretrain"
    )


def get_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, help="checkpoint.pth of python -m mdp.main_pretrain")
    p.add_argument("--branch", choices=["q", "k"], default="q", help="query encoder, or its moving average")
    add_export_flags(p, [*FORMATS, "detectron2", "safetensors"], "mmseg")
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
    elif args.format == "safetensors":
        make = f"mdp.models.ResNet({arch.removeprefix('resnet')}, {width})"
        if width == 64:
            make = f'timm.create_model("{arch}", num_classes=0, output_stride=8)'
        lines = [f"model = {make}", "model.load_state_dict(load_file(FILE))"]
        print(write_safetensors(state, args.out, "mdp", f"{arch}, width {width}, {INPUT}", lines, str(args.checkpoint)))
    else:
        checkpoint.save(args.out, state)
    dropped = len(obj["state_dict"]) - len(state)
    print(f"{args.out}: {len(state)} tensors of encoder_{args.branch} in {args.format} names, {dropped} others dropped")
    return 0


if __name__ == "__main__":
    cli(main)
