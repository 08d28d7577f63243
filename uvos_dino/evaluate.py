"""Score segmentations: python -m uvos_dino.evaluate --results FOLDER --basepath DAVIS --dataset DAVIS2017

FOLDER holds SEQ.pth (of uvos_dino.eval_oneshot or of the release) or SEQ/*.png (palette PNGs, 0: no object). Writes the
official package's two CSVs for each matching, and result.json.
"""

import argparse
import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shared_utils import UserError, checkpoint, mini
from shared_utils.data import load_image
from shared_utils.run import Parser, cli, natural
from uvos_dino import metrics
from uvos_dino.data import LAYOUTS, Video, open_videos, read_mask

MATCHES = ("frame", "sequence")
COLUMNS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def add_flags(p: argparse.ArgumentParser) -> None:
    """Flags of the benchmark and of the scores, which the segmentation script has too."""
    a = p.add_argument
    a("--basepath", "--data_dir", type=Path, default=os.environ.get("DATA_ROOT", "data"), help="root of the benchmark")
    a("--dataset", choices=list(LAYOUTS), default="DAVIS2017")
    a("--split", default="val")
    a("--sequences", type=lambda text: text.split(","), default=[], help="only these, comma-separated")
    a("--synthetic", action="store_true", help="the mini data, generated, instead of --basepath")
    a("--match", choices=MATCHES, default="frame", help="which matching is printed first (both are computed): a "
      "new one in each frame, as released, or one a sequence, as in the official package")  # fmt: skip
    a("--max_proposals", type=natural, default=metrics.MAX_PROPOSALS, help="clusters that are accepted; 0: any number "
      "(the official package: 20, the release: 300)")  # fmt: skip
    a("--foreground", action="store_true", help="also FG-ARI and mIoU (MOVi-E, YouTube-VIS)")


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.evaluate", description=__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, required=True, help="folder of SEQ.pth or SEQ/*.png")
    add_flags(p)
    return p


class Segmentation(NamedTuple):
    labels: np.ndarray  # [T, h, w], cluster numbers, -1: none
    clusters: int


def read_results(folder: Path, video: Video) -> Segmentation:
    """What was written for a video. UserError when there is nothing, or a file of another kind."""
    file = folder / f"{video.name}.pth"
    if file.is_file():
        saved = checkpoint.load(file)
        if isinstance(saved, Mapping) and "labels" in saved:
            return Segmentation(saved["labels"].numpy(), int(saved["clusters"]))
        try:  # the release's: {frame: [one-hot (1, K, 1, h, w)]}
            masks = [saved[t][0][0, :, 0] for t in sorted(saved)]  # each [K, h, w]
            labels = [torch.where(m.amax(0) > 0.3, m.argmax(0), -1) for m in masks]
            return Segmentation(torch.stack(labels).numpy(), max(len(m) for m in masks))
        except (TypeError, IndexError, KeyError, AttributeError, RuntimeError):
            raise UserError(f"{file}: neither labels of uvos_dino.eval_oneshot nor the release's masks") from None
    paths = sorted((folder / video.name).glob("*.png"))
    if not paths:
        raise UserError(f"{folder}: nothing for {video.name}; expected {video.name}.pth or {video.name}/00000.png, ...")
    arrays = [np.asarray(load_image(path, None)) for path in paths]
    odd = next((p for p, x in zip(paths, arrays) if x.ndim != 2 or x.shape != arrays[0].shape), None)
    if odd is not None:
        raise UserError(f"{odd}: not a palette PNG of the size of the others")
    whole = np.stack(arrays).astype(np.int32)
    return Segmentation(whole - 1, int(whole.max()))


def pairs(found: Segmentation, video: Video, binary: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels at the annotation's size and the annotation [H, W], frame after frame; missing frames repeat the last."""
    for t, path in video.masks.items():
        truth = read_mask(path, binary)
        yield metrics.upsample(found.labels[min(t, len(found.labels) - 1)], *truth.shape), truth


def score_video(found: Segmentation, video: Video, args: argparse.Namespace) -> dict[str, Any]:
    """Statistics of every object for both matchings, the number of clusters, and what --foreground asks for."""
    metrics.check_proposals(video.name, found.clusters, args.max_proposals)
    labels, truth = (list(x) for x in zip(*pairs(found, video, LAYOUTS[args.dataset].binary)))
    first = truth[0][truth[0] != metrics.VOID]
    objects = int(first.max(initial=0))
    if not objects:
        raise UserError(f"{next(iter(video.masks.values()))}: no object in the first annotated frame, nothing to match")
    scores = metrics.video_scores(labels, truth, found.clusters, objects)
    out: dict[str, Any] = {"clusters": found.clusters, "frames": len(truth), "objects": objects}
    for match in MATCHES:
        best = metrics.matched(scores, match)
        out[match] = [[*metrics.statistics(best.J[o]), *metrics.statistics(best.F[o])] for o in range(objects)]
    if args.foreground:
        whole = np.stack(labels), np.stack(truth)
        out["FG-ARI"], out["mIoU"] = metrics.rand_index(*whole), metrics.mean_iou(*whole, found.clusters)
    return out


def summary(videos: Mapping[str, dict[str, Any]], match: str) -> dict[str, float]:
    """The official global numbers in per cent: means over all objects of all sequences."""
    jm, jr, jd, fm, fr, fd = np.mean([row for video in videos.values() for row in video[match]], 0)
    return dict(zip(COLUMNS, (100 * float(v) for v in ((jm + fm) / 2, jm, jr, jd, fm, fr, fd))))


def write_csvs(folder: Path, videos: Mapping[str, dict[str, Any]], split: str) -> None:
    """The official package's files, three decimals, under the folder of each matching."""
    for match in MATCHES:
        (folder / match).mkdir(parents=True, exist_ok=True)
        with open(folder / match / f"global_results-{split}.csv", "w", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerows([COLUMNS, [f"{v / 100:.3f}" for v in summary(videos, match).values()]])
        with open(folder / match / f"per-sequence_results-{split}.csv", "w", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(("Sequence", "J-Mean", "F-Mean"))
            for name, video in videos.items():
                for number, row in enumerate(video[match], 1):
                    writer.writerow((f"{name}_{number}", f"{row[0]:.3f}", f"{row[3]:.3f}"))


def score(args: argparse.Namespace, videos: list[Video], folder: Path, meta: Mapping[str, Any]) -> int:
    """Score `folder` and write what was found into it."""
    rows = {video.name: score_video(read_results(folder, video), video, args) for video in videos}
    result: dict[str, Any] = {match: summary(rows, match) for match in MATCHES}
    result["clusters"] = float(np.mean([row["clusters"] for row in rows.values()]))
    if args.foreground:
        for name in ("FG-ARI", "mIoU"):
            result[name] = 100 * float(np.nanmean([row[name] for row in rows.values()]))
    try:
        write_csvs(folder, rows, args.split)
        (folder / "result.json").write_text(json.dumps({**result, "sequences": rows, **meta}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror})") from None
    for match in sorted(MATCHES, key=lambda name: name != args.match):
        print(f"  matched by {match}: " + " ".join(f"{k} {v:.1f}" for k, v in result[match].items()))
    extra = " ".join(f"{name} {result[name]:.1f}" for name in ("FG-ARI", "mIoU") if name in result)
    print(f"  {result['clusters']:.1f} clusters a sequence {extra}-> {folder}/result.json", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.synthetic:
        args.dataset, args.basepath = "DAVIS2017", mini.ensure("davis")
    videos = open_videos(args.dataset, args.basepath, args.split, args.sequences)
    return score(args, videos, args.results, {})


if __name__ == "__main__":
    cli(main)
