"""A strip that shows what MRA does: image, attention, what is kept, what the autoencoder paints, the augmented image.

    python -m mra.lab.strip

`mra.visualize` draws the same of any images and any autoencoder, with every flag of the operator.
"""

import argparse

import torch

from mra import data, transforms
from mra.main_pretrain import get_parser as training_parser
from mra.mra import SOURCES, add_mra_flags, build
from mra.visualize import rows
from shared_utils import UserError
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.run import cli, set_threads

COMMAND = "bash mra/run_pretrain.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("mra", __doc__)
    p.add_argument(
        "--attn_source", choices=SOURCES, default="last_attn", help="score of a patch; default: the small tier's"
    )
    p.add_argument(
        "--anchors", type=natural, nargs="+", default=[0, 900, 2100, 3300], help="numbers of training images"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    _, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND)
    device = torch.device("cpu")
    set_threads(0, 0, device)
    images = data.open_unlabelled(argparse.Namespace(**{**vars(flags), "cache": False}))
    images.transform = transforms.test_transform(flags.input_size)
    tiles.check_numbers(args.anchors, len(images))
    operator_flags = Parser()
    add_mra_flags(operator_flags)
    own = operator_flags.parse_args(["--mae_ckpt", str(args.pretrained), "--attn_source", args.attn_source])
    operator, _ = build(own, flags.input_size, device)
    if operator is None:
        raise UserError(f"{args.pretrained}: no autoencoder in it")
    x = torch.stack([images[i][0] for i in args.anchors])
    noise, _ = operator.draw(len(x), torch.Generator().manual_seed(0))
    shown, attention, kept, painted, out = rows(x, operator.parts(x, noise), operator)
    header = ["image", "attention", "kept", "painted", "MRA"]
    side = 80
    block = [
        [
            tiles.tile(shown[i], side), tiles.tile(tiles.heat(attention[i, 0]), side), tiles.tile(kept[i], side),
            tiles.tile(painted[i], side), tiles.tile(out[i], side, "", tiles.BLUE),
        ]
        for i in range(len(x))
    ]  # fmt: skip
    half = (len(x) + 1) // 2
    parts = (
        [tiles.grid([header, *block[:half]], 1), tiles.grid([header, *block[half:]], 1)]
        if half < len(x)
        else [tiles.grid([header, *block], 1)]
    )
    strip = tiles.row(parts, 20)
    foot = tiles.words(
        f"A frozen masked autoencoder keeps the {100 - 100 * own.mask_ratio:.0f} % of the patches that its class token "
        "attends to most (yellow) and paints the others anew from them; the classifier trains on the last image, with "
        "the label of the first.", 13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
