"""Score segmentations: python -m uvos_dino.evaluate --results FOLDER --basepath DAVIS --dataset DAVIS2017

FOLDER holds SEQ.pth (of uvos_dino.eval_oneshot or of the release) or SEQ/*.png (palette PNGs, 0: no object). Writes the
official package's two CSVs for each matching, and result.json.
"""

import argparse
import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser, natural
from shared_utils.run import cli
from uvos_dino import metrics
from uvos_dino.data import (
    ALL,
    HALF,
    LAYOUTS,
    Video,
    brightness,
    by_frame,
    files_of,
    open_videos,
    read_mask,
    read_stored,
    said,
)

MATCHES = ("frame", "sequence")
PNG, OTHERS = r".*\.png", r".*\.(jpg|jpeg|bmp)"  # the others may be pictures of the masks where there are PNGs
COLUMNS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def add_flags(p: argparse.ArgumentParser) -> None:
    """Flags of the benchmark and of the scores, which the segmentation script has too."""
    a = p.add_argument
    a("--basepath", "--data_dir", type=Path, default=os.environ.get("DATA_ROOT", "data"), help="root of the benchmark")
    a("--dataset", choices=list(LAYOUTS), default="DAVIS2017")
    a("--split", default="val", help=f"a list of the publisher's, or {ALL}: every folder of frames")
    a("--sequences", type=lambda text: text.split(","), default=[], help="only these, comma-separated")
    a("--match", choices=MATCHES, default="frame", help="which matching is printed first (both are computed): a "
      "new one in each frame, as released, or one a sequence, as in the official package")  # fmt: skip
    a("--max_proposals", type=natural, default=metrics.MAX_PROPOSALS, help="clusters that are accepted; 0: any number "
      "(the official package: 20, the release: 300)")  # fmt: skip
    a("--skip_ends", action="store_true", help="leave the first and last annotated frame of a sequence out, as "
      "DAVIS-2016's own evaluation does")  # fmt: skip
    a("--foreground", action="store_true", help="also FG-ARI and mIoU (MOVi-E, YouTube-VIS); a video in which no "
      "object counts for J and F then has these two alone")  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.evaluate", description=__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, required=True, help="folder of SEQ.pth or SEQ/*.png")
    add_flags(p)
    return p


class Segmentation(NamedTuple):
    labels: Mapping[int, np.ndarray]  # number of the frame: [h, w], cluster numbers, -1: none
    clusters: int


def read_results(folder: Path, video: Video) -> Segmentation:
    """What was written for a video, frame by frame.

    UserError when there is nothing or a file of another kind.
    """
    file = folder / f"{video.name}.pth"
    if file.is_file():
        saved = checkpoint.load(file)
        if isinstance(saved, Mapping) and "labels" in saved:
            return Segmentation(dict(enumerate(saved["labels"].numpy())), int(saved["clusters"]))
        try:  # the release's: {frame: [one-hot (1, K, 1, h, w)]}
            masks = {int(t): saved[t][0][0, :, 0] for t in saved}  # each [K, h, w]
            labels = {t: torch.where(m.amax(0) > 0.3, m.argmax(0), -1).numpy() for t, m in masks.items()}
            return Segmentation(labels, max(len(m) for m in masks.values()))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
            raise UserError(f"{file}: neither labels of uvos_dino.eval_oneshot nor the release's masks") from None
    paths = files_of(folder / video.name, PNG) or files_of(folder / video.name, OTHERS)
    if not paths:
        raise UserError(f"{folder}: nothing for {video.name}; expected {video.name}.pth or {video.name}/00000.png, ...")
    files, others = by_frame(paths, video.frames)
    if others:
        raise UserError(
            f"{folder / video.name}: masks of no frame: {few(path.name for path in others)}; expected the names of "
            f"{video.frames[0].parent}: {video.frames[0].stem}.png, ..."
        )
    stored = {t: read_stored(path) for t, path in files.items()}
    maps, kinds = {t: pixels for t, (pixels, _) in stored.items()}, {kind for _, kind in stored.values()}
    if "light" in kinds or (kinds == {"grey"} and brightness(list(maps.values()))):  # one object, white or soft
        maps = {t: (x >= HALF).astype(np.uint8) for t, x in maps.items()}
    there = metrics.numbers_of(maps.values())
    maps = {t: np.where(x == metrics.VOID, 0, metrics.renumber(x, there)) for t, x in maps.items()}
    return Segmentation({t: x.astype(np.int16) - 1 for t, x in maps.items()}, len(there))


def annotations(found: Segmentation, video: Video, skip_ends: bool) -> dict[int, Path]:
    """The annotated frames that count. UserError where one has no mask, or a mask no frame.

    The last frame of a video may be left out, as the release does: the mask before it stands for it.
    """
    wanted, last = list(video.masks.items()), len(video.frames) - 1
    if skip_ends and len(wanted) < 3:
        raise UserError(f"--skip_ends: {video.name} has {len(wanted)} annotated frames, nothing is left of it")
    wanted = wanted[1:-1] if skip_ends else wanted
    stands = found.labels.keys() | ({last} if last - 1 in found.labels else set())
    if missing := [video.frames[t].stem for t, _ in wanted if t not in stands]:
        raise UserError(
            f"{video.name}: no mask of frame {few(missing)}; expected one for each annotated frame but the last"
        )
    if max(found.labels) > last:
        raise UserError(f"{video.name}: masks of {max(found.labels) + 1} frames, where there are {last + 1}")
    return dict(wanted)


def few(names: Iterable[str]) -> str:
    """The first four, and how many there are."""
    names = list(names)
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")


def score_video(found: Segmentation, video: Video, args: argparse.Namespace) -> dict[str, Any]:
    """Statistics of every object for both matchings, the number of clusters, and what --foreground asks for.

    The objects are the numbers that occur in the frames that are scored, as the set counts them (`Layout.late`).
    """
    metrics.check_proposals(video.name, found.clusters, args.max_proposals)
    layout = LAYOUTS[args.dataset]
    labels, truth = [], []
    for t, path in annotations(found, video, args.skip_ends).items():
        truth.append(read_mask(path, layout.binary))
        labels.append(metrics.upsample(found.labels[t if t in found.labels else t - 1], *truth[-1].shape))
    start = next(iter(video.masks.values()))
    numbers, starts = metrics.counted(truth, read_mask(start, layout.binary), layout.late)
    if not numbers and not args.foreground:
        raise UserError(
            f"{start}: no object in the first annotated frame{' or later' * (layout.late != 'background')}, nothing to "
            "match; restore it, leave the video out (--sequences), or score FG-ARI and mIoU (--foreground)"
        )
    out: dict[str, Any] = {"clusters": found.clusters, "frames": len(truth), "objects": len(numbers)}
    out |= {"numbers": numbers, **{match: [] for match in MATCHES}}
    if numbers:
        known = [metrics.renumber(x, numbers) for x in truth]
        scores = metrics.video_scores(labels, known, found.clusters, len(numbers))
        for match in MATCHES:
            best = metrics.matched(scores, match, starts)
            for J, F, start_at in zip(best.J, best.F, starts):
                out[match].append([*metrics.statistics(J[start_at:]), *metrics.statistics(F[start_at:])])
    if args.foreground:
        whole = np.stack(labels), np.stack(truth)
        out["FG-ARI"], out["mIoU"] = metrics.rand_index(*whole), metrics.mean_iou(*whole, found.clusters)
    return out


def summary(videos: Mapping[str, dict[str, Any]], match: str) -> dict[str, float]:
    """The official global numbers in per cent: means over all objects of all sequences; empty where none counts."""
    if not any(video[match] for video in videos.values()):
        return {}
    jm, jr, jd, fm, fr, fd = np.mean([row for video in videos.values() for row in video[match]], 0)
    return dict(zip(COLUMNS, (100 * float(v) for v in ((jm + fm) / 2, jm, jr, jd, fm, fr, fd))))


def write_csvs(folder: Path, videos: Mapping[str, dict[str, Any]], split: str) -> None:
    """The official package's files, three decimals, under the folder of each matching."""
    for match in MATCHES:
        means = [COLUMNS, [f"{v / 100:.3f}" for v in summary(videos, match).values()]]
        each = [
            (f"{name}_{number}", f"{row[0]:.3f}", f"{row[3]:.3f}")
            for name, video in videos.items()
            for number, row in zip(video["numbers"], video[match])
        ]
        for kind, rows in (("global", means), ("per-sequence", [("Sequence", "J-Mean", "F-Mean"), *each])):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            checkpoint.write_text(folder / match / f"{kind}_results-{split}.csv", text.getvalue())


def score(args: argparse.Namespace, videos: list[Video], folder: Path, meta: Mapping[str, Any]) -> int:
    """Score `folder` and write what was found into it."""
    rows = {video.name: score_video(read_results(folder, video), video, args) for video in videos}
    result: dict[str, Any] = {match: summary(rows, match) for match in MATCHES}
    result["clusters"] = float(np.mean([row["clusters"] for row in rows.values()]))
    if args.foreground:
        for name in ("FG-ARI", "mIoU"):
            defined = [row[name] for row in rows.values() if not np.isnan(row[name])]
            result[name] = 100 * float(np.mean(defined)) if defined else float("nan")
    if without := [name for name, row in rows.items() if not row["objects"]]:
        print(f"  not in J and F, no object in the first annotated frame: {few(without)}")
    write_csvs(folder, rows, args.split)
    checkpoint.write_json(folder / "result.json", {**result, "sequences": rows, **meta})
    for match in sorted(MATCHES, key=lambda name: name != args.match):
        print(f"  matched by {match}: " + " ".join(f"{k} {v:.1f}" for k, v in result[match].items()))
    extra = " ".join(f"{name} {result[name]:.1f}" for name in ("FG-ARI", "mIoU") if name in result)
    print(f"  {result['clusters']:.1f} clusters a sequence {extra}-> {folder}/result.json", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    videos = open_videos(args.dataset, args.basepath, args.split, args.sequences)
    print(f"  data: {said(args.dataset, args.basepath, args.split, videos)}")
    return score(args, videos, args.results, {})


if __name__ == "__main__":
    cli(main)
