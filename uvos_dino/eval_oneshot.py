"""Segment videos with a trained block: python -m uvos_dino.eval_oneshot --resume_path CHECKPOINT --basepath DAVIS

Writes, for each sequence, the cluster of every patch (SEQ.pth) and, in the official layout, palette PNGs at the size of
the annotations (SEQ/00000.png, cluster number + 1); then scores them (see uvos_dino.evaluate).
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser, add_machine_flags, add_output_flag, at_least, boolean, not_negative, positive
from shared_utils.pictures import davis_palette, save_picture
from shared_utils.provenance import result_folder
from shared_utils.run import cli, plain, provenance, set_threads
from uvos_dino import evaluate, metrics
from uvos_dino.data import LAYOUTS, NORMS, Video, open_videos, read_mask, read_video, said
from uvos_dino.inference import load_model, segment

PNG_LIMIT = 254  # clusters that a palette file can hold: 0 is background, 255 void


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.eval_oneshot", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--resume_path", "--pretrained", type=Path, required=True, help="checkpoint: a run's, or the released one")
    a("--num_heads", type=positive, help="heads of the block; default: the checkpoint's flag, else 8")
    a("--resolution", type=at_least(-1), nargs=2, default=[320, 480], metavar=("H", "W"), help="-1 -1: the frames' own "
      "size, cut to multiples of the encoder's patch")  # fmt: skip
    a("--eval_norm", choices=list(NORMS), default="release", help="release: Kinetics' statistics, unlike in training")
    a("--drop_last_frame", type=boolean, default=True, help="leave the last frame out, as released; its mask is then "
      "the one before it")  # fmt: skip
    a("--ratio", type=positive, default=10, help="r: every r-th frame gives keys")
    a("--tau", type=float, default=1.0, help="threshold of the clustering on the symmetric divergence")
    a("--memory_gb", type=not_negative, default=4.0, help="attention rows to keep; what is beyond is computed twice")
    a("--frame_batch", type=positive, default=16, help="frames that go through the encoder at once")
    a("--bf16", action="store_true", help="encoder in half precision (the clustering stays float32)")
    add_output_flag(p, "uvos_dino/segment", "resume_path", names=["--save_path"])
    a("--png", type=boolean, default=True, help="write palette PNGs where the clusters fit")
    a("--release_masks", action="store_true", help="write the release's one-hot SEQ.pth instead (large)")
    add_machine_flags(p, workers=None)
    evaluate.add_flags(p)
    return p


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that make no sense, before anything is loaded."""
    if not args.tau > 0:
        raise UserError(f"--tau {args.tau}: must be above 0")
    if args.resolution and min(args.resolution) < 1 and args.resolution != [-1, -1]:
        raise UserError(f"--resolution {args.resolution[0]} {args.resolution[1]}: two sizes, or -1 -1")


def chosen_device(name: str) -> torch.device:
    """UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available; give auto, cpu, cuda or cuda:N") from None
    return torch.device(name)


def write_pngs(folder: Path, video: Video, labels: np.ndarray, binary: bool) -> None:
    """Palette PNGs [H, W] of patch labels [T, h, w] for every frame; frames beyond T repeat the last."""
    height, width = read_mask(next(iter(video.masks.values())), binary).shape
    folder.mkdir(parents=True, exist_ok=True)
    palette = davis_palette()
    for t, frame in enumerate(video.frames):
        image = Image.fromarray(metrics.upsample(labels[min(t, len(labels) - 1)] + 1, height, width).astype(np.uint8))
        image.putpalette(palette)
        save_picture(image, folder / f"{frame.stem}.png")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check_flags(args)
    device = chosen_device(args.device)
    set_threads(args.threads, 0, device)
    videos = open_videos(args.dataset, args.basepath, args.split, args.sequences)
    model, loaded, minutes = load_model(args.resume_path, {"num_heads": args.num_heads})
    model.to(device)
    binary = LAYOUTS[args.dataset].binary
    if args.resolution[0] > 0:
        model.encoder.grid(*args.resolution)
    args.save_path = result_folder(args, "save_path")
    print(f"uvos_dino/eval -> {args.save_path}\n  device: {device}\n  model: {loaded}")
    print(f"  data: {said(args.dataset, args.basepath, args.split, videos)}")
    print("  flags: " + " ".join(f"--{k} {v}" for k, v in plain(args).items() if v is not None), flush=True)

    for video in videos:
        started = time.perf_counter()
        last = max(1, len(video.frames) - 1) if args.drop_last_frame else len(video.frames)
        frames = read_video(video.frames[:last], tuple(args.resolution), model.encoder.patch_size)  # [T, 3, H, W]
        found = segment(
            model, frames, device, args.eval_norm, args.ratio, args.tau, args.frame_batch, 1e9 * args.memory_gb,
            args.bf16,
        )  # fmt: skip
        h, w = model.encoder.grid(*frames.shape[-2:])
        labels = found.labels.view(last, h, w)
        file = args.save_path / f"{video.name}.pth"
        if args.release_masks:
            onehot = torch.nn.functional.one_hot(labels, found.number).permute(0, 3, 1, 2).float()  # [T, K, h, w]
            checkpoint.save(file, {t: [masks[None, :, None]] for t, masks in enumerate(onehot)})
        else:
            checkpoint.save(file, {"labels": labels.to(torch.int32), "clusters": found.number})
        if args.png and found.number <= PNG_LIMIT:
            write_pngs(args.save_path / video.name, video, labels.numpy(), binary)
        print(
            f"  {video.name}: {last} frames, {found.number} clusters, {time.perf_counter() - started:.1f} s", flush=True
        )
    meta = {"minutes": minutes, "flags": plain(args), **provenance()}
    return evaluate.score(args, videos, args.save_path, meta)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cli(main)
