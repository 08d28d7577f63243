"""A strip that shows what the method does: a video, and its clusters before and after the block is trained.

    python -m uvos_dino.lab.strip

`uvos_dino.visualize` draws any sequence of a benchmark, with attention maps and moving pictures.
"""

import numpy as np
import torch

from shared_utils import UserError
from shared_utils.flags import Parser, positive
from shared_utils.lab import mini, tiles
from shared_utils.run import cli, set_threads
from uvos_dino import metrics
from uvos_dino.data import open_videos, read_mask, read_video
from uvos_dino.inference import load_model, segment
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.train_RGB_cluster import get_parser as training_parser

SIDE = 84
COMMAND = "bash uvos_dino/run_dino.sh && bash uvos_dino/run_train.sh"


def get_parser() -> Parser:
    p = tiles.strip_parser("uvos_dino", __doc__, "train")
    a = p.add_argument
    a("--sequence", default="shape-val-01", help="of the mini data's validation list")
    a("--tau", type=float, default=0.3, help="largest divergence within a cluster")
    a("--ratio", type=positive, default=4, help="every so many frames give keys")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if not args.tau > 0:
        raise UserError(f"--tau {args.tau}: must be above 0")
    _, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND)
    device = torch.device("cpu")
    set_threads(0, 0, device)
    trained = load_model(args.pretrained)[0]
    torch.manual_seed(flags.seed)
    first = AttEncoder(trained.encoder, flags.num_t, flags.num_heads, 0.0, 0.0).eval()
    video = open_videos("DAVIS2017", mini.ensure("davis"), "val", [args.sequence])[0]
    size = tuple(np.asarray(read_mask(video.masks[0], False)).shape)
    frames = read_video(video.frames, size)  # [T, 3, H, W]
    pictures = (frames.permute(0, 2, 3, 1) * 255).byte().numpy()
    chosen = np.linspace(0, len(frames) - 1, 4).round().astype(int)
    rows: list[list] = [["frames", *(tiles.tile(pictures[t], SIDE) for t in chosen), ""]]
    for name, model in {"random\nblock": first, "trained\nblock": trained}.items():
        found = segment(model, frames, device, "imagenet", args.ratio, args.tau)
        labels = found.labels.view(len(frames), *model.encoder.grid(*size)).numpy()
        best = []
        for t, file in video.masks.items():
            truth = read_mask(file, False)
            shown = metrics.upsample(labels[t], *truth.shape)
            numbers = metrics.numbers_of([truth])
            truth = metrics.renumber(truth, numbers)
            best.append(metrics.best_mean(metrics.frame_ious(shown, truth, found.number, len(numbers))))
        said = f"{found.number} cluster{'s' * (found.number > 1)}\nJ {100 * np.mean(best):.0f}"
        rows.append([name, *(tiles.tile(metrics.coloured(labels[t], *size), SIDE) for t in chosen), tiles.words(said)])
    strip = tiles.grid(rows, 3)
    foot = tiles.words(
        "Each patch of all frames attends to the patches of the key frames; patches whose attention rows agree are one "
        "cluster (one colour). The losses make rows agree where patches belong together; no label, no optical flow. "
        "J: overlap of the best clusters with the objects.", 13, width=strip.width,
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
