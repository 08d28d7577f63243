"""The encoder for other programs: python -m flat.lab.export --pretrained RUN/checkpoint.pth --out conv4.safetensors

ResNet10 and ResNet18 get the names that torchvision and timm share; Conv4, ResNet12 and WRN28, which neither has, keep
their own. Classifier, decoder and the noise of `--aet avt` stay behind.
"""

import argparse
from pathlib import Path

from torch import Tensor

from flat import save_features
from flat.backbone import WIDTHS, Encoder, torchvision_names
from shared_utils.flags import Parser, natural
from shared_utils.lab.export import Input, Made, add_export_flags, check, write_backbone
from shared_utils.run import cli

BLOCKS = {"ResNet10": 1, "ResNet18": 2}  # of each of the four stages


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="flat.lab.export", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("--pretrained", required=True, help="of flat.train (checkpoint.pth, EPOCH.tar), or of CloserLookFewShot")
    a("--model", help="this and the following default to the checkpoint's own flags")
    a("--width", type=natural)
    a("--image_size", "--img_size", type=natural)
    add_export_flags(p, ["safetensors", "hub"], "safetensors")
    return p


def names_and_lines(encoder: Encoder, model: str, size: int, width: int) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors under the names they are exported with, and how they are loaded."""
    state = {key: value for key, value in encoder.state_dict().items() if not key.startswith("noise.")}
    made = f"flat.backbone.build({model!r}, {size}, {width})"
    view = torchvision_names(encoder)
    if view is not None and width in (0, WIDTHS[model]):
        state = view.state_dict()
        block = "timm.models.resnet.BasicBlock"
        made = f"timm.models.resnet.ResNet({block}, {(BLOCKS[model],) * 4}, num_classes=0)"
    return state, [f"model = {made}", "model.load_state_dict(load_file(FILE))"]


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    given = save_features.get_parser().parse_args(["--checkpoint", args.pretrained])
    given.model, given.width, given.image_size = args.model, args.width, args.image_size
    encoder, _, flags, _ = save_features.load(Path(args.pretrained), given)
    state, lines = names_and_lines(encoder, flags.model, flags.image_size, flags.width)
    name = f"{flags.model}, input of {flags.image_size} pixels, normalised by {flags.mean_std}"
    timm = {"architecture": "resnet18", "num_classes": 0, "model_args": {"layers": [BLOCKS.get(flags.model)] * 4}}
    x = Input(flags.image_size, *save_features.data.MEAN_STD[flags.mean_std])
    print(write_backbone(args, state, "flat", name, Made(lines, timm if " = timm." in lines[0] else None), x))
    return 0


if __name__ == "__main__":
    cli(main)
