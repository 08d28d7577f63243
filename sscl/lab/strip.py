"""A strip that shows what SsCL does: unlabelled images, their pseudo-labels calibrated, and the positives they choose.

python -m sscl.lab.strip
"""

import torch

from shared_utils import UserError, augment
from shared_utils.data import Keyed
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.lab.tiles import BLUE, GREEN, GREY
from shared_utils.run import cli, set_threads
from sscl import losses
from sscl.arch import Encoder, build
from sscl.calibration import Alignment, calibrate, log_similarity, sharpen
from sscl.data import Unlabelled, augmentations, training_images
from sscl.main import get_parser as training_parser
from sscl.model import SsCL
from sscl.weights import Whole

COMMAND = "bash sscl/run_train.sh"
SIDE = 64


def get_parser() -> Parser:
    p = tiles.strip_parser("sscl", __doc__, "train")
    p.add_argument("--anchors", type=natural, nargs="+", default=[356, 966], help="training images, a row each")
    return p


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict"])
    if flags.no_labels or flags.calib == "none" or flags.neighbours == "off" or not flags.lambda_c:
        raise UserError(f"{args.pretrained}: an arm without the exchange of both branches; take another run")
    if flags.labelled:
        raise UserError(f"{args.pretrained}: on own folders, whose true classes nobody knows; take another run")
    set_threads(0, 0, torch.device("cpu"))
    images = training_images(flags.data, flags.per_class, False, flags.imbalance)
    tiles.check_numbers(args.anchors, len(images))
    encoder = Encoder(build(flags.arch, flags.width, flags.stem), len(images.classes), flags.dim)
    alignment = Alignment(len(images.classes), flags.da, flags.da_m)
    model = SsCL(encoder, alignment, flags.moco_k, flags.moco_m, flags.sim == "prob", flags.bn_splits).eval()
    Whole(model).load_state_dict(saved["state_dict"])

    recipes = augmentations(flags.img_size, flags.weak, flags.strong, not flags.no_flip, flags.min_scale)
    views = Keyed(Unlabelled(images, recipes, ("weak",)), flags.seed)
    weak = torch.stack([views[(0, i)]["weak"] for i in args.anchors])  # [A, 3, H, W]
    p, z = model.predict(weak), model.encoder_k.embed(weak)  # [A, C], [A, D]
    log_q = log_similarity(z, model.prototypes, flags.tau_s)
    aligned = model.alignment(p)
    tilde = sharpen(calibrate(aligned, log_q, flags.calib, model.alignment.qbar, flags.calib_weight), flags.sharpen_t)
    sure = torch.ones(len(p), dtype=torch.bool)  # whom they would choose, were they sure of themselves
    who = losses.Memory(tilde.argmax(1), sure, tilde, torch.tensor(args.anchors))
    chosen = model.nearest(who, z, flags.num_pos, flags.sim)

    header = ["unlabelled", "prediction p", "similarity q", "calibrated", "positives from the queue"]
    rows: list[list] = [header]
    for i, a in enumerate(args.anchors):
        truth = images.label(a)
        line: list = [tiles.tile(augment.denormalise(weak[i]), SIDE, f"class {images.classes[truth]}", BLUE)]
        for d in (aligned[i], log_q[i].exp(), tilde[i]):
            colours = [GREEN if c == truth else GREY for c in range(len(d))]
            says = tiles.words(f"says {images.classes[int(d.argmax())]}", 12)
            line.append(tiles.column([tiles.bars(d.tolist(), (130, SIDE), colours), says], centred=True))
        cells = []
        for place, valid in list(zip(chosen.place[i].tolist(), chosen.valid[i].tolist()))[:4]:
            if valid and int(model.queue_index[place]) >= 0:
                number = int(model.queue_index[place])
                same = images.label(number) == truth
                cells.append(tiles.tile(images.image(number), SIDE, images.classes[images.label(number)],
                             GREEN if same else GREY))  # fmt: skip
        rows.append([*line, tiles.row(cells, 2) if cells else "none"])
    strip = tiles.grid(rows, 10)
    foot = tiles.words(
        "The class branch's prediction is multiplied by the similarity of the embedding with the class prototypes; the "
        "product is the pseudo-label (bars: classes, green: the true one, which training does not see). In return "
        "confident images of the same pseudo-label are positives of the contrastive branch.", 13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
