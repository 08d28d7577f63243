"""A strip that shows what KSCL does: the K views of an image, the subspace that their keys span, and its query in it.

python -m kscl.lab.strip
"""

import torch
import torch.nn.functional as F

from kscl import arch
from kscl.builder import KSCL, ReleaseKeys
from kscl.data import Views, training_images
from kscl.main_kscl import get_parser as training_parser
from kscl.subspace import RankRule, own_match
from shared_utils import augment
from shared_utils.data import Keyed
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.run import cli, set_threads

COMMAND = "bash kscl/run_pretrain.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("kscl", __doc__)
    p.add_argument("--anchors", type=natural, nargs="+", default=[33, 615], help="training images, a row each")
    p.add_argument("--epoch", type=natural, default=0, help="whose views are drawn")
    return p


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict"])
    set_threads(0, 0, torch.device("cpu"))
    images = training_images(flags.data_dir, flags.per_class)
    tiles.check_numbers(args.anchors, len(images))
    recipe = augment.moco_v2 if flags.aug_plus else augment.moco_v1
    views = Keyed(Views(images, recipe(flags.img_size), flags.shots), flags.seed)
    rule = RankRule(flags.max_rank, flags.rank_rule, flags.energy, flags.rel_gamma, flags.rank)
    encoder = arch.build(flags.arch, flags.width, flags.stem)
    model = KSCL(encoder, rule, flags.moco_dim, flags.moco_k, flags.moco_m, bool(flags.center)).eval()
    ReleaseKeys(model).load_state_dict(saved["state_dict"])

    im_q, im_k = (torch.stack(x) for x in zip(*(views[(args.epoch, a)] for a in args.anchors)))
    q = model(im_q)[0]  # [A, D]
    Z = F.normalize(model.encoder_k(im_k.flatten(0, 1)), dim=1).unflatten(0, im_k.shape[:2]).mT  # [A, D, K]
    own = model.subspaces(Z)[0]
    s = own_match(q, own, flags.sim)  # [A]
    others = torch.einsum("ad,pdm->pam", q, model.queue).square().sum(0).sqrt()  # [A, M] lengths
    alone = torch.einsum("ad,adk->ak", q, Z)  # cosine of the query with each key

    rows = []
    for i in range(len(args.anchors)):
        share = (own.l[i] / own.l[i].sum()).tolist()
        rank = int(own.rank[i])
        colours = [tiles.BLUE if k < rank else tiles.GREY for k in range(flags.shots)]
        eigenvalues = tiles.column(
            [
                tiles.bars(share, (110, 64), colours),
                tiles.words(f"{100 * share[0]:.0f} %; {rank} direction{'s' * (rank > 1)} kept", 12),
            ],
            centred=True,
        )
        cells = [tiles.tile(augment.denormalise(im_q[i]), 64, "query", tiles.BLUE)]
        cells += [tiles.tile(augment.denormalise(x), 64, f"{alone[i, k]:.2f}") for k, x in enumerate(im_k[i][:8])]
        said = f"query in its own subspace: {s[i]:.3f}\nin {others.shape[1]} others: {others[i].mean():.3f} on average"
        rows.append(tiles.row([*cells, eigenvalues, tiles.words(said, 13, width=230)], 8))
    strip = tiles.column(rows, 8)
    foot = tiles.words(
        f"One query view and {flags.shots} key views of an image (below each its cosine with the query). Bars: "
        f"eigenvalues of the keys' Gram matrix; blue: the fewest directions that hold {100 * flags.energy:.0f} %. The "
        "logit is the length of the query's projection onto the subspace, against the subspaces of past images.",
        13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
