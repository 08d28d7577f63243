"""The backbone for other programs: python -m sscl.lab.export --pretrained CHECKPOINT --out resnet50.safetensors

`safetensors` writes torchvision's names, which timm shares, and a model card; `torchvision` the same names as a .pth
file of tensors alone. Both heads stay behind.
"""

import argparse

from shared_utils.flags import Parser
from shared_utils.lab.export import INPUT, add_export_flags, check, resnet, write_backbone
from shared_utils.run import cli
from sscl.weights import add_network_flags, load_encoder


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sscl.lab.export", description=(__doc__ or "").splitlines()[0])
    add_network_flags(p.add_argument)
    add_export_flags(p, ["torchvision", "safetensors", "hub"], "safetensors")
    p.add_argument("--copy", choices=["query", "momentum"], default="query", help="whose backbone")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    encoder, report = load_encoder(args, None, args.copy)
    print(report)
    name = f"{args.arch}, width {args.width}, stem {args.stem}, {INPUT}"
    made = resnet(args.arch, args.width, args.stem, "sscl.arch.build")
    print(write_backbone(args, encoder.backbone.state_dict(), "sscl", name, made))
    return 0


if __name__ == "__main__":
    cli(main)
