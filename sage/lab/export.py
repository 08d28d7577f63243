"""The backbone for detection and segmentation: python -m sage.lab.export --pretrained CHECKPOINT --out resnet50.pth

`torchvision` writes the plain names (torchvision.models.detection; mmdetection and mmsegmentation take them as
`init_cfg`); `detectron2` the names of its ResNet in a .pth file, which its checkpointer reads; `release` all networks
under the names of the original release, its aliases `backbone.*` and `decoder.layer5.*` included; `safetensors` the
plain names with a model card.
"""

import argparse

from torch import Tensor

from sage.arch import DEPTHS, STEMS, build
from sage.weights import DROP, NORMS, input_norm
from shared_utils import UserError, checkpoint
from shared_utils.evaluation import add_network_flags, load_backbone, stored_flags
from shared_utils.flags import Parser
from shared_utils.lab.export import Input, add_export_flags, check, resnet, write_backbone, write_detectron2
from shared_utils.run import cli

# normalisation of the input: in words, and as detectron2's config
INPUT = {
    "half": (
        "mean and standard deviation 0.5 (bytes: 127.5)",
        "MODEL.PIXEL_MEAN [127.5,127.5,127.5] MODEL.PIXEL_STD [127.5,127.5,127.5]",
    ),
    "imagenet": (
        "ImageNet's mean and standard deviation (bytes: 123.675, 116.28, 103.53; 58.395, 57.12, 57.375)",
        "MODEL.PIXEL_MEAN [123.675,116.280,103.530] MODEL.PIXEL_STD [58.395,57.120,57.375]",
    ),
    None: (
        "the mean and standard deviation of its training, which the file does not tell (--normalise)",
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of its training, which the file does not tell (--normalise);",
    ),
}


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sage.lab.export", description=(__doc__ or "").splitlines()[0])
    add_network_flags(p, list(DEPTHS), STEMS, "resnet50")
    p.add_argument("--normalise", choices=["auto", *NORMS], default="auto", help="what the backbone's input had in "
      "training, where the file does not tell")  # fmt: skip
    add_export_flags(p, ["torchvision", "detectron2", "release", "safetensors", "hub"], "torchvision")
    return p


def release_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a run with the release's aliases: its loader knows no file without them."""
    out = dict(state)
    for old, new in (("online_net.0.", "backbone."), ("decoder.final.", "decoder.layer5.")):
        out |= {new + key.removeprefix(old): value for key, value in state.items() if key.startswith(old)}
    return out


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    if args.format == "release":
        loaded = checkpoint.load(args.pretrained)
        state = loaded.get("state_dict") if isinstance(loaded, dict) else None
        if not isinstance(state, dict) or not any(key.startswith("online_net.1.") for key in state):
            raise UserError(f"{args.pretrained}: --format release takes a checkpoint of sage.train")
        named = release_names(state)
        checkpoint.save(args.out, {"state_dict": named, "author": "sage"})
        print(f"{len(named)} tensors -> {args.out}")
        return 0
    encoder, report = load_backbone(build, args, "resnet50", DROP)
    plain, network = encoder.state_dict(), (args.arch, args.width, args.stem)
    print(report)
    norm = args.normalise
    if norm == "auto":
        norm = "half" if args.pretrained == "none" else input_norm(str(args.pretrained))
    said, pixels = INPUT[norm]
    if args.format == "detectron2":
        line = write_detectron2(plain, args.out, *network, author="sage")
        print(f"{line} {pixels} MODEL.BACKBONE.FREEZE_AT 0")
        print("R50-C4 2x (an extra norm after res5, SyncBN) or R50-FPN 1x; batch 16, lr 0.02, 90k iterations")
        return 0
    name = f"{args.arch}, width {args.width}, stem {args.stem}, input of {said}"
    if args.format == "hub" and norm is None:
        raise UserError(f"{args.pretrained}: does not tell the normalisation of its input; give --normalise")
    size = stored_flags(args.pretrained).get("img_size") or 224
    x = Input(size, (0.5,) * 3, (0.5,) * 3) if norm == "half" else Input(size)
    print(write_backbone(args, plain, "sage", name, resnet(*network, "sage.arch.build"), x))
    if args.format == "torchvision":
        print(
            f"the input has {said}; mmsegmentation: a dilated ResNet-50 with "
            f"init_cfg=dict(type='Pretrained', checkpoint='{args.out}'), FCN head, Cityscapes, crop 769, 40k iterations"
        )
    return 0


if __name__ == "__main__":
    cli(main)
