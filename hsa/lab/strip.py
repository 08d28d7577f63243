"""A strip that shows what HSA does: images and the neighbours that are their positives, as training goes on.

    python -m hsa.lab.strip

Neighbours by the pooled features of the momentum encoder: of the run's first weights (made again from its seed), those
that the checkpoint holds (of the last refresh), and of its last weights. Green: of the image's class.
"""

import numpy as np
import torch

from hsa import arch
from hsa.builder import CsMl, ReleaseKeys
from hsa.cutmix import draw_box, paste
from hsa.data import Neighbours, training_images
from hsa.main_moco import INIT_DROP
from hsa.main_moco import get_parser as training_parser
from shared_utils.augment import denormalise, plain
from shared_utils.flags import Parser, natural
from shared_utils.init import initialise
from shared_utils.lab import tiles
from shared_utils.neighbours import features
from shared_utils.run import cli, seed_everything, set_threads

COMMAND = "bash hsa/run_pretrain.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("hsa", __doc__)
    p.add_argument("--anchors", type=natural, nargs="+", default=[33, 615], help="training images, a row each")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict", "neighbours"])
    device = torch.device("cpu")
    set_threads(0, 0, device)
    images = training_images(flags.data_dir, flags.per_class, False, plain(flags.img_size))
    tiles.check_numbers(args.anchors, len(images))
    nearby = Neighbours(images, flags.clus_pos_num, flags.seed)
    nearby.load_state_dict(saved["neighbours"])
    seed_everything(flags.seed)
    encoder = arch.build(flags.arch, flags.width, flags.stem)
    if flags.init:
        initialise(encoder, flags.init, drop=INIT_DROP)
    model = CsMl(encoder, flags.moco_dim, flags.moco_k, flags.moco_m, flags.inter_head if flags.inter_weight else None)

    def searched() -> torch.Tensor:
        model.encoder_k.eval()
        return nearby.nearest(features(lambda x: model.encoder_k(x, pre_out=True), images, device), device)

    kept, held = nearby.index.clone(), nearby.epoch
    stages = {"first weights": searched(), f"epoch {held}, in training": kept}
    ReleaseKeys(model).load_state_dict(saved["state_dict"])
    stages[f"epoch {saved['epoch']}, the end"] = searched()

    shown = min(3, kept.shape[1])
    label = images.labels
    columns = [[tiles.words("image")], [tiles.words("CutMix")]]
    for a in args.anchors:
        columns[0].append(tiles.tile(images.image(a), 64, "", tiles.BLUE))
        x, other = (images.transform(images.image(i))[None] for i in (a, int(kept[a, 0])))  # type: ignore[misc]
        mixed = paste(x, other, draw_box(flags.img_size, flags.img_size, flags.alpha, np.random.default_rng(a)))
        columns[1].append(tiles.tile(denormalise(mixed[0]), 64))
    middle = []
    for name, index in stages.items():
        nearby.set(index, held)
        rows = [tiles.words(name if nearby.purity is None else f"{name}: {nearby.purity:.0f} %")]
        for a in args.anchors:
            cells = [
                tiles.tile(images.image(m), 64, "", tiles.GREEN if label[m] == label[a] >= 0 else tiles.GREY)
                for m in index[a, :shown].tolist()
            ]
            rows.append(tiles.row(cells, 1))
        middle.append(tiles.column(rows))
    share = ""
    if images.has_labels:
        counts = torch.bincount(label).double()
        chance = 100 * float((counts * (counts - 1)).sum()) / (len(images) * (len(images) - 1))
        share = f"; %: share of all {len(images)} x {kept.shape[1]} that are of their image's class (green; chance "
        share += f"{chance:.0f} %)"
    strip = tiles.row([tiles.column(columns[0]), *middle, tiles.column(columns[1])], 12)
    foot = tiles.words(
        f"Nearest images in the momentum encoder's features become positives beside the image's own view{share}. A "
        "blend of image and neighbour has both as positives.", 13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
