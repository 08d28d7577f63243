"""A strip that shows what FLAT does: images, transformed copies, and what the decoder reads off the features of both.

    python -m flat.strip

The quadrilateral is where the copy's frame lies in the image: green by the transformation that was drawn, red by the
one that the decoder tells.
"""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flat import aet, data
from flat.options import build_model, family, get_parser as training_parser, has_decoder
from shared_utils import UserError, checkpoint, mini, tiles
from shared_utils.data import mix_key
from shared_utils.run import Parser, cli, set_threads

COMMAND = "bash flat/run_train.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("flat", __doc__, "train")
    p.add_argument("--anchors", type=int, nargs="+", default=[70, 150, 190, 250, 330, 410, 470], help="numbers of training images")
    p.add_argument("--draw", type=int, default=0, help="number of the draw of the transformations")
    return p


def frame_in_image(theta: Tensor, s: int) -> Tensor:
    """Where the corners TL, TR, BR, BL of s x s copies are taken from, [n, 4, 2], by output-to-input theta [n, 8]."""
    matrix = torch.cat([theta, torch.ones_like(theta[:, :1])], 1).view(-1, 3, 3)
    corners = torch.cat([aet.image_corners(s), torch.ones(4, 1, dtype=torch.float64)], 1)  # [4, 3]
    at = corners @ matrix.mT  # [n, 4, 3]
    return at[..., :2] / at[..., 2:].clamp_min(0.1)


def outlined(image: Tensor, quads: list[tuple[Tensor, tiles.Colour]], side: int = 64, border: int = 20) -> Image.Image:
    """An image [3, s, s] in 0..1 within a border, both in pixels, and quadrilaterals [4, 2] in pixels of s over it."""
    zoom = side / image.shape[-1]
    out = Image.new("RGB", (side + 2 * border, side + 2 * border), "white")
    out.paste(tiles.picture(image, side), (border, border))
    draw = ImageDraw.Draw(out)
    for quad, colour in quads:
        points = [(float(x) * zoom + border, float(y) * zoom + border) for x, y in quad]
        draw.line([*points, points[0]], fill=colour, width=2)
        draw.ellipse([points[0][0] - 4, points[0][1] - 4, points[0][0] + 4, points[0][1] + 4], fill=colour)
    return out


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state"])
    if not has_decoder(flags) or flags.aet_type != "projective" :
        raise UserError(f"{args.pretrained}: trained without projective transformations; take another run")
    set_threads(0, 0, torch.device("cpu"))
    found = data.read_dataset(flags.dataset, mini.ensure("fewshot") if flags.synthetic else flags.data_dir)
    names = data.pick_classes(sorted(found["base"]), flags.base_classes, flags.base_draw)
    last = flags.holdout + flags.per_class if flags.per_class else None
    images = data.as_list({name: found["base"][name] for name in names}, flags.holdout, last)
    images.transform = data.evaluation_pipeline(flags.image_size)
    tiles.check_numbers(args.anchors, len(images))
    model = build_model(flags)
    checkpoint.load_strict(model, saved["state"])
    model.eval()
    fam = family(flags)
    pixels = torch.stack([images[i][0] for i in args.anchors])  # [n, 3, s, s] bytes
    drawn = aet.sample(len(pixels), fam, torch.Generator().manual_seed(mix_key(args.draw, 3) >> 1))
    copies = aet.warp(pixels, drawn.theta, flags.aet_pad)
    x, x_t = data.normalise(pixels, flags.mean_std), data.normalise(copies, flags.mean_std)
    _, mu, _ = model(x, x_t)
    mean, std = aet.normalisation(fam, flags.aet_norm)
    true, told = (frame_in_image(theta, fam.s) for theta in (drawn.theta, mu.double() * std + mean))  # [n, 4, 2]
    error = (told - true).norm(dim=2).mean(1)  # pixels

    rows = [
        ["image"] + [tiles.tile(x, 64) for x in pixels / 255],
        ["copy"] + [tiles.tile(x, 64, "", tiles.BLUE) for x in copies / 255],
        ["decoded"] + [
            outlined(x, [(a, tiles.GREEN), (b, tiles.RED)]) for x, a, b in zip(pixels / 255, true, told)
        ],
        [""] + [f"off by {e:.0f} pixels" for e in error],
    ]  # fmt: skip
    strip = tiles.grid(rows, 8)
    foot = tiles.words(
        f"Training images ({fam.s} pixels) and copies under random projective transformations. Where the copy's frame "
        "lies in the image: green, as drawn; red, as the decoder tells from the features of both (dot: the upper left "
        "corner). It is trained beside the classifier of the base classes, without labels.", 13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
