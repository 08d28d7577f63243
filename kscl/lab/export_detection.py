"""The backbone for detection: python -m kscl.lab.export_detection --pretrained CHECKPOINT --out resnet50.pth

`detectron2` writes the names of its ResNet (as MoCo's conversion script does), `torchvision` the plain
names, for torchvision.models.detection and most other libraries, `safetensors` the same with a model card.
The projection head stays behind.
"""

import argparse

from kscl.arch import ARCHS, DROP, STEMS, build
from shared_utils.evaluation import add_network_flags, load_backbone
from shared_utils.flags import Parser
from shared_utils.lab.export import INPUT, add_export_flags, check, resnet, write_backbone, write_detectron2
from shared_utils.run import cli

MEAN_STD = "MODEL.PIXEL_MEAN [123.675,116.280,103.530] MODEL.PIXEL_STD [58.395,57.120,57.375]"


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="kscl.lab.export_detection", description=__doc__.splitlines()[0])
    add_network_flags(p, ARCHS, STEMS, "resnet50")
    add_export_flags(p, ["torchvision", "detectron2", "safetensors", "hub"], "detectron2")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    encoder, report = load_backbone(build, args, "resnet50", DROP)
    state, network = encoder.state_dict(), (args.arch, args.width, args.stem)
    print(report)
    if args.format == "detectron2":
        print(f"{write_detectron2(state, args.out, *network)} {MEAN_STD}")
        print("MoCo: SyncBN and an extra norm after res5 (R50-C4), TEST.PRECISE_BN True; VOC 24k, COCO 2x schedule")
    else:
        name = f"{args.arch}, width {args.width}, stem {args.stem}, {INPUT}"
        print(write_backbone(args, state, "kscl", name, resnet(*network, "kscl.arch.build")))
    return 0


if __name__ == "__main__":
    cli(main)
