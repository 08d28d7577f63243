"""Segment videos of your own, without annotations: python -m uvos_dino.segment MY.mp4 --resume_path CHECKPOINT

A source is a video file, a folder of frames, or a folder with several of either below it. Each clip gives, in
--save_path, palette PNGs of numbered clusters under the frames' names (of a video: 00000.png, ...) in CLIP/, an overlay
CLIP.mp4, and CLIP.csv: of every number its first and last frame, in how many it is and its share of these.

A clip is clustered in windows of --window frames, each as `uvos_dino.eval_oneshot` clusters a whole video, but that
clusters are looked for only where key frames are; every patch of every frame is assigned to the nearest of them, as
there. `--window 0 --centroids all` gives the masks of the evaluation. Windows are joined as the paper joins the
three-frame windows inside a video (`uvos_dino.inference.Numbers`): an older cluster leads, and what lies within --tau
of it has its number. Memory grows with --window and --memory_gb, not with the clip.
"""

import argparse
import csv
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.data import load_image, walk
from shared_utils.flags import Parser, add_machine_flags, at_least, natural, not_negative, positive, runs_root
from shared_utils.pictures import davis_palette, save_picture, voc_palette
from shared_utils.run import cli, set_threads
from uvos_dino import clustering, metrics, video
from uvos_dino.data import FILMS, IMAGES, NORMS, files_of, fit
from uvos_dino.eval_oneshot import PNG_LIMIT, check_flags, chosen_device
from uvos_dino.inference import Numbers, load_model, project
from uvos_dino.model_cluster import AttEncoder

OVERLAY = 1280  # pixels of the longer side of the overlay, at most


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.segment", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("sources", nargs="+", type=Path, metavar="VIDEO|FOLDER", help="a video, a folder of frames, or one of several")
    a("--resume_path", "--pretrained", type=Path, required=True, help="checkpoint: a run's, or the released one")
    a("--num_heads", type=positive, help="heads of the block; default: the checkpoint's flag, else 8")
    a("--resolution", type=at_least(-1), nargs=2, metavar=("H", "W"), help="frames are stretched to this; -1 -1: their "
      "own size, cut to patches; default: as many pixels as in training, in the frames' proportions")  # fmt: skip
    a("--eval_norm", choices=list(NORMS), default="imagenet", help="statistics of the colours: those of training")
    a("--window", type=natural, default=18, help="frames that are clustered together; 0: the whole clip")
    a("--centroids", choices=["keys", "all"], default="keys", help="clusters are looked for in "
      "three frames around each key frame (stage A), or in all, as in the evaluation: slower")  # fmt: skip
    a("--ratio", type=positive, default=10, help="r: every r-th frame of a window gives keys, one at least")
    a("--tau", type=float, default=1.0, help="threshold on the symmetric divergence, in windows and between them")
    a("--memory_gb", type=not_negative, default=1.0, help="attention rows to keep; what is beyond is computed twice")
    a("--frame_batch", type=positive, default=16, help="frames that go through the encoder at once")
    a("--bf16", action="store_true", help="encoder in half precision (the clustering stays float32)")
    a("--fps", type=float, default=24.0, help="frames a second of the overlay of a folder; a video keeps its own")
    a("--save_path", type=Path, default=runs_root() / "uvos_dino/segment", help="folder of the results")
    add_machine_flags(p, workers=None)
    return p


class Clip(NamedTuple):
    name: str  # of its results below --save_path
    path: Path  # a video, or a folder
    frames: list[Path]  # of a folder


class Frame(NamedTuple):
    name: str  # of its PNG, without the ending
    size: tuple[int, int]  # H, W
    x: Tensor  # [3, h, w] in 0..1, what the network sees
    picture: np.ndarray  # [H', W', 3] uint8, under the overlay


def find_clips(sources: Sequence[Path]) -> list[Clip]:
    """The clips of the sources, in natural order. UserError for a source without any, and for what is ambiguous."""
    clips: list[Clip] = []
    for source in sources:
        if source.is_dir():
            found = []
            root = source.resolve().name
            for folder, _ in sorted(walk(source)):
                frames, films = files_of(folder, IMAGES), files_of(folder, FILMS)
                inside = folder.relative_to(source)
                if frames and films:
                    raise UserError(f"{folder}: frames ({frames[0].name}) and videos ({films[0].name}) in one folder; "
                                    "name the videos, or move them away")  # fmt: skip
                if frames:
                    found.append(Clip(str(inside) if inside.parts else root, folder, frames))
                found += [Clip(str(inside / film.stem), film, []) for film in films]
            if not found:
                raise UserError(f"{source}: no frames and no video below this folder; expected 00000.jpg, ... or *.mp4")
            clips += found
        elif source.is_file():
            clips.append(Clip(source.stem, source, []))
        else:
            raise UserError(f"{source}: no such video or folder; give a video, a folder of frames, or one of several")
    names: dict[str, Path] = {}
    for clip in clips:
        if clip.name in names:
            raise UserError(f"{names[clip.name]} and {clip.path}: the results of both would be {clip.name}; segment "
                            "them one by one, each with its own --save_path")  # fmt: skip
        names[clip.name] = clip.path
        stems = {path.stem for path in clip.frames}
        if len(stems) < len(clip.frames):
            raise UserError(f"{clip.path}: two frames have one name but for the ending; their masks would have one too")
    return clips


def pictures(clip: Clip) -> Iterator[tuple[str, np.ndarray]]:
    """Names without ending and pictures [H, W, 3] uint8 of a clip, one after the other."""
    if clip.frames:
        for path in clip.frames:
            yield path.stem, np.asarray(load_image(path))
    else:
        for number, picture in enumerate(video.pictures(clip.path)):
            yield f"{number:05d}", picture


def trained_pixels(path: Path) -> int:
    """Of a frame of the training; the release's 192 x 384 where the checkpoint does not tell."""
    saved = checkpoint.load(path)
    height, width = (saved.get("args") or {}).get("resolution") or (192, 384)
    return height * width


def chosen_size(resolution: Sequence[int] | None, shape: tuple[int, int], pixels: int, patch: int) -> tuple[int, int]:
    """H, W for the network, for frames of this shape: --resolution, or about so many pixels in their proportions."""
    if resolution:
        return (resolution[0], resolution[1])
    scale = (pixels / (shape[0] * shape[1])) ** 0.5
    return tuple(max(1, round(side * scale / patch)) * patch for side in shape)  # type: ignore[return-value]


def read(clip: Clip, resolution: Sequence[int] | None, pixels: int, patch: int) -> Iterator[Frame]:
    """The frames as they are needed. UserError where one has another size than the first."""
    first = size = (0, 0)
    for name, rgb in pictures(clip):
        shape = (rgb.shape[0], rgb.shape[1])
        if not first[0]:
            first, size = shape, chosen_size(resolution, shape, pixels, patch)
        if shape != first:
            raise UserError(f"{clip.path}, frame {name}: {shape[0]} x {shape[1]} pixels, the first has {first[0]} x "
                            f"{first[1]}; the frames of a clip have one size")  # fmt: skip
        shrink = min(1.0, OVERLAY / max(shape))
        small = rgb if shrink == 1 else cv2.resize(rgb, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        yield Frame(name, shape, fit(rgb, size, patch, clip.path), small)


def windows(frames: Iterator[Frame], length: int) -> Iterator[list[Frame]]:
    """Runs of `length` frames, the last one of half to one and a half times as many where there are several; 0: all."""
    held: list[Frame] = []
    for frame in frames:
        held.append(frame)
        if length and len(held) == length + -(-length // 2):
            yield held[:length]
            held = held[length:]
    yield held


def overlay(picture: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] uint8 half covered by the colours of the numbers [h, w] uint8."""
    colours = np.array(voc_palette(), np.uint8).reshape(256, 1, 3)
    shown = cv2.applyColorMap(metrics.upsample(numbers, *picture.shape[:2]), colours)
    return cv2.addWeighted(picture, 0.5, shown, 0.5, 0)


class Results:
    """What a clip leaves: PNGs, the overlay, and the table of its numbers."""

    def __init__(self, folder: Path, name: str, rate: Fraction):
        self.folder, self.table = folder / name, folder / f"{name}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.palette, self.written = davis_palette(), 0
        self.rows: dict[int, list] = {}  # number: first and last frame, in how many, sum of its shares
        self.names: set[str] = set()
        self.movie = video.Writer(folder / f"{name}.mp4", rate)

    def add(self, frame: Frame, numbers: np.ndarray) -> None:
        """A frame's numbers [h, w] uint8."""
        image = Image.fromarray(metrics.upsample(numbers, *frame.size))
        image.putpalette(self.palette)
        save_picture(image, self.folder / f"{frame.name}.png")
        self.movie.add(overlay(frame.picture, numbers))
        self.names.add(f"{frame.name}.png")
        counts = np.bincount(numbers.ravel())
        for number in np.flatnonzero(counts).tolist():
            row = self.rows.setdefault(number, [frame.name, "", 0, 0.0])
            row[1:] = frame.name, row[2] + 1, row[3] + counts[number] / numbers.size

    def close(self, whole: bool) -> None:
        self.movie.close(whole)
        if not whole:
            return
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["number", "first", "last", "frames", "share"])
        for number, (first, last, count, share) in sorted(self.rows.items()):
            table.writerow([number, first, last, count, f"{share / count:.4f}"])
        checkpoint.write_text(self.table, text.getvalue())
        if older := {path.name for path in self.folder.glob("*.png")} - self.names:
            print(f"  {self.folder}: {len(older)} PNGs of an earlier clip are left there ({min(older)}, ...)")


def segment_clip(args: argparse.Namespace, clip: Clip, model: AttEncoder, device: torch.device, pixels: int) -> None:
    """All of one clip, window by window."""
    from tqdm import tqdm

    started, count = time.perf_counter(), 0
    total, rate = (len(clip.frames), Fraction(args.fps)) if clip.frames else video.said(clip.path)
    frames = read(clip, args.resolution, pixels, model.encoder.patch_size)
    results, numbers, whole = Results(args.save_path, clip.name, rate), Numbers(args.tau, PNG_LIMIT), False

    def write(some: list[Frame], shown: np.ndarray) -> None:
        for frame, labels in zip(some, shown):
            results.add(frame, labels)

    # Beside the encoder, the next window is decoded and the last one written; no more than these three are in memory.
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=total or None, desc=clip.name, unit="frame", disable=None, leave=False) as bar,
    ):
        left = windows(frames, args.window)
        ahead, written = pool.submit(next, left, None), pool.submit(lambda: None)
        try:
            while some := ahead.result():
                ahead = pool.submit(next, left, None)
                x = torch.stack([frame.x for frame in some])  # [T, 3, H, W]
                heads = project(model, x, device, args.eval_norm, args.ratio, args.frame_batch, args.bf16)
                rows = clustering.Rows(*heads, 1e9 * args.memory_gb, device)
                keys = clustering.key_frames(len(some), args.ratio) // clustering.WINDOW
                found = clustering.cluster(
                    rows, len(some), args.tau, None if args.centroids == "all" else set(keys.tolist())
                )
                del rows
                shown = numbers(found, heads).view(len(some), *model.encoder.grid(*x.shape[-2:]))
                written.result()
                written = pool.submit(write, some, shown.numpy().astype(np.uint8))
                count += len(some)
                bar.update(len(some))
            written.result()
            whole = True
        finally:
            wait([ahead])
            wait([written])
            results.close(whole)
    anew = f", {numbers.lost} numbers given anew" if numbers.lost else ""
    print(f"  {clip.path}: {count} frames, {numbers.window} windows, {len(results.rows)} clusters{anew}, "
          f"{time.perf_counter() - started:.1f} s -> {results.folder}, {results.movie.path}", flush=True)  # fmt: skip
    if count < total:
        print(f"  caution: {clip.path}: its header names {total} frames, {count} could be decoded; copy it again, if "
              "it was cut")  # fmt: skip
    if len(results.rows) == 1:
        print(f"  caution: {clip.path}: one cluster everywhere separates nothing; give a lower --tau than "
              f"{args.tau:g}, or train longer")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check_flags(args)
    if not args.fps > 0:
        raise UserError(f"--fps {args.fps}: must be above 0")
    device = chosen_device(args.device)
    set_threads(args.threads, 0, device)
    clips = find_clips(args.sources)
    model, loaded, _ = load_model(args.resume_path, {"num_heads": args.num_heads})
    model.to(device)
    pixels = trained_pixels(args.resume_path)
    print(f"uvos_dino/segment -> {args.save_path}\n  device: {device}\n  model: {loaded}")
    for clip in clips:  # every one is looked at before the first is segmented
        for made in (clip.name, f"{clip.name}.mp4"):
            if (args.save_path / made).resolve() == clip.path.resolve():
                raise UserError(f"--save_path {args.save_path}: the results would overwrite {clip.path}; name another")
        first = next(read(clip, args.resolution, pixels, model.encoder.patch_size))
        h, w = model.encoder.grid(*first.x.shape[-2:])
        count = len(clip.frames) or video.said(clip.path)[0]
        some = args.window or count
        rows = 4e-9 * some * h * w * len(clustering.key_frames(some, args.ratio)) * h * w
        print(f"  {clip.path}: {count or '?'} frames of {first.size[0]} x {first.size[1]}, {h} x {w} patches; "
              f"attention rows of a window of {some} frames: {rows:.2g} GB")  # fmt: skip
    try:
        args.save_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_path {args.save_path}: cannot write here ({error.strerror})") from None
    for clip in clips:
        segment_clip(args, clip, model, device, pixels)
    return 0


if __name__ == "__main__":
    cli(main)
