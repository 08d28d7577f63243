"""A strip that shows what FLAT does: images, transformed copies, and what the decoder reads off the features of both.

    python -m flat.lab.strip

The quadrilateral is where the copy's frame lies in the image: green by the transformation that was drawn, red by the
one that the decoder tells.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flat import aet, data
from flat.episodes import EpisodeDrawer
from flat.methods.baselinefinetune import predict
from flat.options import build_model, family, has_decoder
from flat.options import get_parser as training_parser
from shared_utils import UserError, checkpoint
from shared_utils.data import mix_key
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.run import cli, set_threads

COMMAND = "bash flat/run_train.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("flat", __doc__, "train")
    p.add_argument(
        "--anchors", type=natural, nargs="+", default=[190, 250, 330, 410], help="numbers of training images"
    )
    p.add_argument("--draw", type=natural, default=0, help="number of the draw of the transformations")
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
    if not has_decoder(flags) or flags.aet_type != "projective":
        raise UserError(f"{args.pretrained}: trained without projective transformations; take another run")
    set_threads(0, 0, torch.device("cpu"))
    found = data.read_dataset(flags.dataset, flags.data_dir)
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

    rows: list[list[Image.Image | str]] = [
        ["image"] + [tiles.tile(x, 64) for x in pixels / 255],
        ["copy"] + [tiles.tile(x, 64, "", tiles.BLUE) for x in copies / 255],
        ["decoded"] + [outlined(x, [(a, tiles.GREEN), (b, tiles.RED)]) for x, a, b in zip(pixels / 255, true, told)],
        ["", *(f"off by {e:.0f} pixels" for e in error)],
    ]

    # One episode of the novel classes: a support image each, queries below the class that the nearest mean gives them.
    novel = data.as_list(found["novel"])
    novel.transform = images.transform
    drawer = EpisodeDrawer(novel.labels, 5, 1, 3, args.draw, novel.classes)
    episode = drawer.draw(np.array([args.draw]))
    support, query = (torch.stack([novel[i][0] for i in part.flatten().tolist()]) for part in episode[:2])
    f_s, f_q = (model.feature(data.normalise(y, flags.mean_std)) for y in (support, query))  # [5, D], [15, D]
    given = predict("proto", f_s.view(1, 5, 1, -1), f_q.view(1, 5, 3, -1), np.zeros(1, np.int64), 0)[0]  # [15]
    right = given == torch.arange(5).repeat_interleave(3)
    classes = []
    for way in range(5):
        cells = [tiles.tile(support[way] / 255, 64, "", tiles.BLUE)]
        for n in (given == way).nonzero().flatten().tolist()[:4]:
            cells.append(tiles.tile(query[n] / 255, 48, "", tiles.GREEN if right[n] else tiles.RED))
        classes.append(tiles.column(cells, 3, centred=True))
    few = tiles.column([tiles.words("5 novel classes, one image each; their queries", 12), tiles.row(classes, 3)], 4)
    strip = tiles.row([tiles.grid(rows, 6), few], 20)
    foot = tiles.words(
        "Left: where the copy's frame lies in the image, green as drawn, red as the decoder tells from the features of "
        "both (dot: upper left corner; trained without labels, beside the classifier of the base classes). Right: "
        f"features alone, nearest of 5 means; {int(right.sum())} of 15 queries are right (green).", 13,
        width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
