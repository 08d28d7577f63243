"""A strip that shows what MDP does: one image of each set, its labels, and every class of both sets as a prototype.

python -m mdp.lab.strip
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdp.eval_seg import load_encoder, nearest_prototype
from mdp.main_pretrain import get_parser as training_parser
from mdp.own import open_named, own_folders, val_split
from mdp.visualize import MEAN, STD
from shared_utils import UserError
from shared_utils.flags import Parser, natural
from shared_utils.lab import tiles
from shared_utils.run import cli, set_threads

COMMAND = "bash mdp/run_pretrain.sh"
SIDE = 96


def get_parser() -> Parser:
    p = tiles.strip_parser("mdp", __doc__)
    p.add_argument("--anchors", type=natural, nargs="+", default=[3, 5], help="a validation image of each set")
    return p


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    _, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict", "bank"])
    set_threads(0, 0, torch.device("cpu"))
    encoder, _, proto, valid = load_encoder(args.pretrained, "k")
    root = Path(flags.data_root)
    names, own = flags.datasets.split(","), own_folders(flags.data)
    if len(args.anchors) != len(names):
        raise UserError(f"--anchors: give one number for each of {', '.join(names)}")
    sets = [open_named(name, own, root, val_split(name, own), flags.voc_background) for name in names]
    colours = torch.tensor([c for s in sets for c in s.palette] + [(0, 0, 0)]) / 255  # [C + 1, 3]
    classes = [f"{s.name} {c}" for s in sets for c in s.classes]
    starts = torch.tensor([0, *(len(s.classes) for s in sets)]).cumsum(0).tolist()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def painted(ids: Tensor) -> Tensor:
        return colours[ids].permute(2, 0, 1)

    rows: list[list] = [["image", "its labels", *(f"nearest of {name}" for name in names), "", "similarity to", ""]]
    for n, (found, i) in enumerate(zip(sets, args.anchors)):
        tiles.check_numbers([i], len(found))
        photo, label = found.load(i)
        x = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
        z = F.normalize(encoder(((x - mean) / std)[None]).float(), dim=1)  # [1, D, h, w]
        truth = torch.where(torch.from_numpy(label) == 255, len(classes), torch.from_numpy(label).long() + starts[n])
        line = [tiles.tile(x, SIDE, "", tiles.BLUE), tiles.tile(painted(truth), SIDE)]
        shares = []
        for a, b in zip(starts, starts[1:]):
            ids = a + nearest_prototype(z, proto[a:b], valid[a:b], label.shape)[0]
            line.append(tiles.tile(painted(ids), SIDE))
            shares.append(torch.bincount(ids.flatten(), minlength=len(classes)))
        # Of each set the class that most pixels outside the commonest one go to, and the commonest of its own set.
        shown = [int(share.argsort(descending=True)[1]) for share in shares] + [int(shares[n].argmax())]
        s = F.interpolate(torch.einsum("bdhw,cd->bchw", z, proto), size=label.shape, mode="bilinear")[0]  # [C, H, W]
        low, high = s[shown].amin(), s[shown].amax()
        line += [tiles.tile(tiles.heat((s[c] - low) / (high - low)), SIDE, classes[c]) for c in shown]
        rows.append(line)
    strip = tiles.grid(rows, 4)
    foot = tiles.words(
        f"{' and '.join(names)} have other classes for the same things, and nobody merges them: each class of each set "
        "is a prototype, each pixel is pulled to its own and pushed from all others. So every image can be read in "
        "either taxonomy (validation images, black: none; similarity: yellow is near).", 13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
