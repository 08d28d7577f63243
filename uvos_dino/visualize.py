"""Look at a segmentation: python -m uvos_dino.visualize --resume_path CHECKPOINT --basepath DAVIS --sequences dog

A strip of frames, and below it the clusters in colours; with --point Y X (in shares of the frame) also the attention of
that point of the first frame, in DINO and in the block. `--gif` writes all of it as a moving picture.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared_utils import UserError
from shared_utils.flags import Parser, positive, runs_root
from shared_utils.pictures import davis_palette, save_picture
from shared_utils.run import cli
from uvos_dino import clustering, metrics
from uvos_dino.data import ALL, LAYOUTS, NORMS, normalise, open_videos, read_video
from uvos_dino.eval_oneshot import chosen_device
from uvos_dino.inference import encode_frames, load_model


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.visualize", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--resume_path", "--pretrained", type=Path, required=True, help="checkpoint of a run, or the released one")
    a("--basepath", "--data_dir", type=Path, default=Path("data"), help="root of the benchmark")
    a("--dataset", choices=list(LAYOUTS), default="DAVIS2017")
    a("--split", default="val", help=f"a list of the publisher's, or {ALL}: every folder of frames")
    a("--sequences", type=lambda text: text.split(","), default=[], help="the first of them is drawn")
    a("--resolution", type=positive, nargs=2, default=[320, 480], metavar=("H", "W"))
    a("--eval_norm", choices=list(NORMS), default="release")
    a("--ratio", type=positive, default=10)
    a("--tau", type=float, default=1.0)
    a("--count", type=positive, default=6, help="frames of the strip")
    a("--point", type=float, nargs=2, metavar=("Y", "X"), help="whose attention is drawn, each in 0..1")
    a("--gif", type=Path, help="also every frame with its clusters, to this file")
    a("--device", default="auto")
    a("--out", type=Path, default=runs_root() / "uvos_dino/picture.png")
    return p


def overlay(frames: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 half covered by the colours of their clusters [T, h, w]."""
    palette = np.array(davis_palette(), np.float32).reshape(256, 3)
    colours = palette[1 + metrics.upsample(labels, *frames.shape[1:3]) % 254]
    return (0.5 * frames + 0.5 * colours).astype(np.uint8)


def heat(frames: np.ndarray, weights: Tensor) -> np.ndarray:
    """Frames [T, H, W, 3] uint8, dark but where the weights [T, h, w] are large (each frame to its own maximum)."""
    share = (weights / weights.amax((1, 2), keepdim=True)).numpy()
    return (frames * (0.15 + 0.85 * metrics.upsample(share, *frames.shape[1:3])[..., None])).astype(np.uint8)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if not args.tau > 0:
        raise UserError(f"--tau {args.tau}: must be above 0")
    if args.point and not all(0 <= x < 1 for x in args.point):
        raise UserError(f"--point {args.point[0]} {args.point[1]}: shares of height and width, at least 0 and below 1")
    device = chosen_device(args.device)
    video = open_videos(args.dataset, args.basepath, args.split, args.sequences)[0]
    model = load_model(args.resume_path)[0].to(device)
    h, w = model.encoder.grid(*args.resolution)
    frames = read_video(video.frames, tuple(args.resolution))  # [T, 3, H, W]
    pictures = (frames.permute(0, 2, 3, 1) * 255).byte().numpy()
    with torch.no_grad():
        k = encode_frames(model, frames, args.eval_norm, device, 16)
        q, key, scale = model.inference_heads(k)
        keys = key[clustering.key_frames(len(frames), args.ratio)]
        found = clustering.cluster(clustering.Rows(q, keys, scale, 4e9, device), len(frames), args.tau)
        labels = found.labels.view(-1, h, w).numpy()
        chosen = np.linspace(0, len(frames) - 1, min(args.count, len(frames))).round().astype(int)
        rows = [pictures[chosen], overlay(pictures[chosen], labels[chosen])]
        if args.point:
            place = int(args.point[0] * h) * w + int(args.point[1] * w)
            shown = torch.from_numpy(chosen)
            dino = model.encoder(normalise(frames[:1].to(device), args.eval_norm)).attn.mean(1)[0, 1 + place, 1:].cpu()
            # The block's attention of the point over the tokens of the shown frames.
            block = clustering.attention(q[:1, :, place : place + 1], key[shown], scale)[0].cpu().view(-1, h, w)
            blank = torch.zeros(len(chosen), h, w) + 1e-6
            blank[0] = dino.view(h, w)
            rows += [heat(pictures[chosen], blank), heat(pictures[chosen], block)]
    save_picture(Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])), args.out)
    print(f"{video.name}: {found.number} clusters -> {args.out}")
    if args.gif:
        moving = [Image.fromarray(x) for x in overlay(pictures, labels)]
        save_picture(moving[0], args.gif, save_all=True, append_images=moving[1:], duration=100, loop=0)
        print(f"moving picture -> {args.gif}")
    return 0


if __name__ == "__main__":
    cli(main)
