"""Mini data: small data sets that need no download, in the real layouts of the real ones.

``mini_draw`` draws the samples (moving, scaled, coloured digits and shapes on textures). The five kinds:

- ``images``        ImageNet folders, ten digit classes, with the nuisance factors in ``attributes.csv``
- ``segmentation``  VOC, ADE20K and Cityscapes trees: three visual domains, three conflicting sets of classes
- ``video``         UCF101 folders and lists: the motion is the class, the background a shortcut (01) or not (02)
- ``davis``         DAVIS-2016 sequences: one filled shape before a background in three parts
- ``fewshot``       splits of disjoint classes (digit x drawing style)

    python -m shared_utils.lab.mini [--root data/mini] KIND [KIND ...]|all
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared_utils import UserError
from shared_utils.flags import Parser
from shared_utils.lab import mini_draw
from shared_utils.pictures import davis_palette, voc_palette
from shared_utils.run import cli

ROOT = Path("data/mini")
STAMP = "mini.stamp"

FIRST_GROUP = {"test01": 1, "train01": 3, "test02": 7, "train02": 9}  # five clips a group
FPS = 25
CITIES = {"train": ("aachen", "bochum", "hanover"), "val": ("frankfurt", "munster")}


def _jpg(path: Path, rgb: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, quality=95)


def _png(path: Path, array: np.ndarray, palette: Sequence[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)  # turns mode L into mode P, the indices stay
    image.save(path)


def _lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def _table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_images(folder: Path) -> None:
    rows = []
    for split, count in mini_draw.IMAGES_PER_CLASS.items():
        for index in range(10 * count):
            image, factors = mini_draw.render_image(split, index)
            path = f"{split}/{factors['class']}/{factors['class']}_{split}_{index % count:05d}.jpg"
            _jpg(folder / path, image)
            rows.append({"path": path, **factors})
    _table(folder / "attributes.csv", rows)


def _write_segmentation(folder: Path) -> None:
    voc, ade, city = folder / "VOCdevkit/VOC2012", folder / "ade/ADEChallengeData2016", folder / "cityscapes"
    palette = voc_palette()
    for split in ("train", "val"):
        names = [f"2012_{1000 * (split == 'val') + i:06d}" for i in range(mini_draw.DOMAINS["voc"].counts[split])]
        for i, name in enumerate(names):
            image, label = mini_draw.render_scene("voc", split, i)
            _jpg(voc / f"JPEGImages/{name}.jpg", image)
            _png(voc / f"SegmentationClassAug/{name}.png", label, palette)
        for part in ("train", "trainaug") if split == "train" else ("val",):
            _lines(voc / f"ImageSets/Segmentation/{part}.txt", names)
        for i in range(mini_draw.DOMAINS["ade"].counts[split]):
            image, label = mini_draw.render_scene("ade", split, i)
            name = f"{'training' if split == 'train' else 'validation'}/ADE_{split}_{i + 1:08d}"
            _jpg(ade / f"images/{name}.jpg", image)
            _png(ade / f"annotations/{name}.png", label)
        for i in range(mini_draw.DOMAINS["cityscapes"].counts[split]):
            image, label = mini_draw.render_scene("cityscapes", split, i)
            town = CITIES[split][i % len(CITIES[split])]
            name = f"{split}/{town}/{town}_{i // len(CITIES[split]):06d}_000019"
            _png(city / f"leftImg8bit/{name}_leftImg8bit.png", image)
            _png(city / f"gtFine/{name}_gtFine_labelTrainIds.png", label)


def _avi(path: Path, frames: np.ndarray) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError(f"mini data of kind video is encoded with PyAV: pip install av ({error})") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"qmin": "2", "qmax": "4"})  # UCF101's own codec
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate, stream.thread_count = "yuv420p", 2_000_000, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_video(folder: Path) -> None:
    rows, lists = [], folder / "ucfTrainTestlist"
    for part, count in mini_draw.CLIPS_PER_CLASS.items():
        lines = []
        for index in range(len(mini_draw.MOTIONS) * count):
            frames, factors = mini_draw.render_clip(part, index)
            group, clip = divmod(index % count, 5)
            name = f"{factors['class']}/v_{factors['class']}_g{group + FIRST_GROUP[part]:02d}_c{clip + 1:02d}.avi"
            _avi(folder / "UCF-101" / name, frames)
            lines.append(name + (f" {index // count + 1}" if part.startswith("train") else ""))
            rows.append({"path": name, "list": part, "frames": len(frames), **factors})
        _lines(lists / f"{part[:-2]}list{part[-2:]}.txt", lines)
    _lines(lists / "classInd.txt", [f"{number} {name}" for number, name in enumerate(mini_draw.MOTIONS, 1)])
    _table(folder / "attributes.csv", rows)


def _write_davis(folder: Path) -> None:
    palette = davis_palette()
    for split, count in mini_draw.SEQUENCES.items():
        names = [f"shape-{split}-{index:02d}" for index in range(count)]
        pairs = []
        for index, name in enumerate(names):
            for step, (frame, mask) in enumerate(zip(*mini_draw.render_sequence(split, index))):
                image, annotation = f"JPEGImages/480p/{name}/{step:05d}.jpg", f"Annotations/480p/{name}/{step:05d}.png"
                _jpg(folder / image, frame)
                _png(folder / annotation, mask, palette)
                pairs.append(f"/{image} /{annotation}")
        _lines(folder / f"ImageSets/2016/{split}.txt", pairs)
        _lines(folder / f"ImageSets/2017/{split}.txt", names)


def _write_fewshot(folder: Path) -> None:
    for split in mini_draw.FEWSHOT_DIGITS:
        names = mini_draw.fewshot_classes(split)
        for index in range(len(names) * mini_draw.FEWSHOT_PER_CLASS):
            name = names[index // mini_draw.FEWSHOT_PER_CLASS]
            _png(
                folder / f"{split}/{name}/{name}_{index % mini_draw.FEWSHOT_PER_CLASS:03d}.png",
                mini_draw.render_fewshot(split, index),
            )
    splits = {split: mini_draw.fewshot_classes(split) for split in mini_draw.FEWSHOT_DIGITS}
    (folder / "splits.json").write_text(json.dumps(splits, indent=1) + "\n")


# --- the folders on disk ---------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], None]] = {
    "images": _write_images,
    "segmentation": _write_segmentation,
    "video": _write_video,
    "davis": _write_davis,
    "fewshot": _write_fewshot,
}


def _check(kind: str) -> None:
    if kind not in WRITERS:
        raise UserError(f"unknown mini data kind '{kind}': choose from {', '.join(WRITERS)}")


def _stamp(kind: str) -> str:
    return f"mini data, kind {kind}, version {mini_draw.version(kind)}\n"


def _fresh(kind: str, folder: Path) -> bool:
    try:
        return (folder / STAMP).read_text() == _stamp(kind)
    except OSError:
        return False


def ensure(kind: str, root: Path | str = ROOT) -> Path:
    """Write ``<root>/<kind>`` unless this version of it is there already; return that folder.

    The data is written beside its place and renamed into it, under a lock: a killed writer leaves nothing half-made,
    and of two processes the second waits and finds the work done. Raises UserError for an unknown kind, a root that
    cannot be written, and a folder of that name that this module did not make (it is never touched).
    """
    _check(kind)
    root = Path(root)
    folder, work, old = root / kind, root / f".{kind}.writing", root / f".{kind}.old"
    if _fresh(kind, folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _fresh(kind, folder):
                return folder
            if folder.exists() and not (folder / STAMP).is_file():
                raise UserError(f"{folder} is not mini data (it has no {STAMP}): choose another root, or move it away")
            for leftover in (work, old):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                work.mkdir()
                WRITERS[kind](work)
                (work / STAMP).write_text(_stamp(kind))
                if folder.exists():
                    os.rename(folder, old)
                os.rename(work, folder)
            finally:
                for leftover in (work, old):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write mini data to {root}: {error}") from error
    return folder


def get_parser() -> Parser:
    p = Parser(prog="python -m shared_utils.lab.mini", description="Write mini data sets.")
    p.add_argument("kinds", nargs="+", metavar="KIND", help=f"{', '.join(WRITERS)}, or all")
    p.add_argument("--root", type=Path, default=ROOT, help="parent folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Command line: write the named kinds and print one line for each."""
    args = get_parser().parse_args(argv)
    kinds = [kind for name in args.kinds for kind in (WRITERS if name == "all" else [name])]
    for kind in kinds:  # all of them before the first is written
        _check(kind)
    for kind in kinds:
        start = time.perf_counter()
        folder = ensure(kind, args.root)
        files = Counter(path.suffix[1:] for path in folder.rglob("*.*") if path.name != STAMP and path.is_file())
        counts = ", ".join(f"{count} {suffix}" for suffix, count in files.most_common())
        print(f"{folder}: {counts} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    cli(main)
