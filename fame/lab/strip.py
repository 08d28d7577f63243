"""A strip that shows what FAME does: a clip, its motion, its mask, the merged clip, and where the network looks.

python -m fame.lab.strip
"""

import torch
import torch.nn.functional as F

from fame import augment
from fame.backbone import build
from fame.data import TestClips, open_videos
from fame.fame import make_mask, merge, motion_and_colour, seed_map
from fame.moco.builder import MoCo, ReleaseKeys
from fame.train import get_parser as training_parser
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.run import cli, set_threads

COMMAND = "bash fame/run_pretrain.sh"
SIDE = 80


def get_parser() -> Parser:
    p = tiles.strip_parser("fame", __doc__)
    p.add_argument("--anchors", type=natural, nargs="+", default=[25, 100], help="training videos, two or more")
    return p


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict"])
    set_threads(0, 0, torch.device("cpu"))
    videos = open_videos(flags, train=True)
    tiles.check_numbers(args.anchors, len(videos))
    clips = TestClips(videos, flags.crop_size, flags.crop_size, 1)
    x = torch.cat([clips[i]["clips"] for i in args.anchors])  # [N, 3, T, S, S] in 0..1
    encoder = build(flags.arch, flags.moco_dim, width=flags.width)
    model = MoCo(encoder, flags.moco_dim, flags.moco_k, flags.moco_m, flags.moco_t).eval()
    ReleaseKeys(model).load_state_dict(saved["state_dict"])
    mask = make_mask(x, flags.mask, flags.beta, flags.hue, flags.bins, flags.laplace)  # [N, S, S]
    merged = merge(x, mask, torch.arange(len(x)).roll(1), flags.alpha)
    motion = seed_map(motion_and_colour(x)[0])  # [N, S, S]
    z, z_merged = (F.normalize(model.encoder_q(augment.normalise(c)), dim=1) for c in (x, merged))  # [N, D]
    own, lent = (z * z_merged).sum(1), (z.roll(1, 0) * z_merged).sum(1)  # [N]
    at = torch.linspace(0, x.shape[2] - 1, 3).round().long().tolist()

    def frames(clip: torch.Tensor, which: list[int]) -> list:
        return [tiles.tile(clip[:, t], SIDE) for t in which]

    rows: list[list] = [["clip", "", "", "motion", "mask", "merged clip", "", "", "cosine with"]]
    for n in range(len(x)):
        rows.append(
            [
                *frames(x[n], at), tiles.tile(tiles.heat(motion[n]), SIDE), tiles.tile(mask[n].float(), SIDE),
                *frames(merged[n], at), tiles.words(f"its clip {own[n]:.2f}\nthe lender {lent[n]:.2f}"),
            ]
        )  # fmt: skip
    strip = tiles.grid(rows, 3)
    foot = tiles.words(
        f"What moves (and has the colours of what moves), {100 * flags.beta:.0f} % of the pixels, is cut out and "
        "pasted on another clip; the result and a second, untouched clip of the same video are each other's positives. "
        "Cosine: of the merged clip's embedding, pretrained, with those of its own clip and of the one that lent the "
        "background.",
        13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
