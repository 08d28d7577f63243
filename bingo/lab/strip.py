"""A strip that shows what BINGO does: an anchor, its bag, and how the student comes to map the bag to the anchor.

    python -m bingo.lab.strip

The numbers are those of the loss: for the student's embedding of a member, the place of the teacher's embedding of the
anchor among those of all training images (1: it matches the anchor best; half of the images: chance). "Before" is a
student with random weights.
"""

from pathlib import Path

import torch
from torch import Tensor

from bingo.arch import Encoder, build, mlp_head
from bingo.data import load_bags
from bingo.main_moco import get_parser as training_parser
from bingo.options import train_images
from bingo.teachers import head_of
from shared_utils import UserError, checkpoint
from shared_utils.augment import plain
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.neighbours import features
from shared_utils.run import cli, set_threads

COMMAND = "bash bingo/run_pretrain.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("bingo", __doc__)
    p.add_argument("--anchors", type=natural, nargs="+", default=[33, 412], help="training images, a row each")
    p.add_argument("--corr_npy", type=Path, help="file of the bags, where it is no longer where the run read it")
    return p


def places(student: Tensor, teacher: Tensor, anchors: Tensor, members: Tensor) -> Tensor:
    """For the student's embeddings of `members` [A, M]: place [A, M] of the teacher's of their anchor [A] among all.

    student, teacher: [N, D], normalised.
    """
    s = student[members] @ teacher.T  # [A, M, N]
    own = s.gather(2, anchors[:, None, None].expand(-1, members.shape[1], 1))
    return 1 + (s > own).sum(2)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict"])
    device = torch.device("cpu")
    set_threads(0, 0, device)
    if flags.loss == "intra":
        raise UserError(f"{args.pretrained}: trained without bags (--loss intra); take another run")
    images = train_images(flags)
    tiles.check_numbers(args.anchors, len(images))
    bags, _ = load_bags(args.corr_npy or flags.corr_npy, images, flags.clus_pos_num)
    if bags.array.ndim == 1:
        raise UserError(f"{flags.corr_npy}: groups without an order; take a run with nearest neighbours as bags")
    images.transform = plain(flags.img_size)
    state = {k.removeprefix("module."): v for k, v in saved["state_dict"].items()}

    def network(which: str, arch: str, width: int, stem: str, alg: str = "moco") -> Encoder:
        """`which` of the two, in eval mode; its head has the widths of the checkpoint's."""
        own = {k.removeprefix(which): v for k, v in state.items() if k.startswith(which)}
        encoder = build(arch, width, stem)
        if alg != "torchvision":
            encoder.fc, _ = head_of(own, alg, encoder.num_features)
        checkpoint.load_strict(encoder, own)
        return encoder.eval()

    torch.manual_seed(flags.seed)
    trained = network("encoder_q.", flags.s_arch, flags.s_width, flags.s_stem)
    teaching = network("encoder_k.", flags.t_arch, flags.t_width, flags.t_stem, flags.pretrain_alg)
    random = build(flags.s_arch, flags.s_width, flags.s_stem).eval()
    random.fc = mlp_head(random.num_features, len(state["queue"]), flags.hidden)
    untrained, distilled, teacher = (
        features(net, images, device) for net in (random, trained, teaching)
    )  # [N, D] each
    anchors, members = torch.tensor(args.anchors), torch.from_numpy(bags.array)  # [A], [N, K]
    before, after = (places(bank, teacher, anchors, members[anchors]) for bank in (untrained, distilled))  # [A, K]
    every = torch.arange(len(images)).split(100)
    medians = [torch.cat([places(b, teacher, a, members[a]) for a in every]).median() for b in (untrained, distilled)]

    rows = []
    for r, a in enumerate(args.anchors):
        cells = [tiles.tile(images.image(a), 76, "anchor", tiles.BLUE)]
        for m, place, now in zip(members[a].tolist(), before[r].tolist(), after[r].tolist()):
            same = images.label(m) == images.label(a)
            cells.append(tiles.tile(images.image(m), 76, f"{place} -> {now}", tiles.GREEN if same else tiles.GREY))
        rows.append(tiles.row(cells, 10))
    side = tiles.words(
        f"Bag: the {members.shape[1]} images nearest to the anchor for the frozen teacher (green: of its class). Each "
        "must lead the student to the anchor: the place, among all images, of the teacher's embedding of the anchor "
        f"for the student's embedding of the member, random weights -> distilled. All {len(images)} bags, median: "
        f"{int(medians[0])} -> {int(medians[1])}.", 13, width=300,
    )  # fmt: skip
    print(tiles.save(tiles.row([tiles.column(rows, 8), side], 20), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
