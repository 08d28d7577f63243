"""The mini images in the layouts of fine-grained sets: python -m sage.lab.finegrained_mini cub [--root data/mini]

Written once below ROOT/finegrained; see sage/finegrained.py for the layouts of cub, cars and aircraft.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from shared_utils.data import ImageList, image_folder
from shared_utils.flags import Parser
from shared_utils.lab import mini
from shared_utils.run import cli


def write_mini(kind: str, images: Path, root: Path) -> None:
    """The mini images in the layout of `kind`, below `root`, once."""
    stamp = root / f"{kind}.stamp"
    version = (images / mini.STAMP).read_text()
    if stamp.is_file() and stamp.read_text() == version:
        return
    splits = {True: image_folder(images / "train"), False: image_folder(images / "val")}
    {"cub": _write_cub, "cars": _write_cars, "aircraft": _write_aircraft}[kind](splits, root)
    stamp.write_text(version)


def _write(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _samples(images: ImageList) -> list[tuple[Path, int]]:
    return list(zip(images.paths(), images.labels.tolist()))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_cub(splits: dict[bool, ImageList], root: Path) -> None:
    root = root / "CUB_200_2011"
    rows = [(path, y, train) for train, part in splits.items() for path, y in _samples(part)]
    names = [f"{y + 1:03d}.{name}" for y, name in enumerate(splits[True].classes)]
    for path, y, _ in rows:
        _copy(path, root / "images" / names[y] / path.name)
    _write(root / "classes.txt", [f"{y} {name}" for y, name in enumerate(names, 1)])
    _write(root / "images.txt", [f"{i} {names[y]}/{path.name}" for i, (path, y, _) in enumerate(rows, 1)])
    _write(root / "image_class_labels.txt", [f"{i} {y + 1}" for i, (_, y, _) in enumerate(rows, 1)])
    _write(root / "train_test_split.txt", [f"{i} {int(train)}" for i, (*_, train) in enumerate(rows, 1)])


def _write_cars(splits: dict[bool, ImageList], root: Path) -> None:
    from scipy.io import savemat

    root = root / "stanford_cars"
    (root / "devkit").mkdir(parents=True, exist_ok=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(splits[True].classes, dtype=object)})
    files = {True: "devkit/cars_train_annos.mat", False: "cars_test_annos_withlabels.mat"}
    for train, part in splits.items():
        kind = [("class", object), ("fname", object)]
        rows = np.empty(len(part), dtype=kind)
        for i, (path, y) in enumerate(_samples(part)):
            rows[i] = (y + 1, path.name)
            _copy(path, root / ("cars_train" if train else "cars_test") / path.name)
        savemat(root / files[train], {"annotations": rows})


def _write_aircraft(splits: dict[bool, ImageList], root: Path) -> None:
    root = root / "fgvc-aircraft-2013b/data"
    classes = splits[True].classes
    _write(root / "variants.txt", classes)
    for train, part in splits.items():
        name = "trainval" if train else "test"
        _write(root / f"images_variant_{name}.txt", [f"{path.stem} {classes[y]}" for path, y in _samples(part)])
        for path in part.paths():
            _copy(path, root / "images" / path.name)


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sage.lab.finegrained_mini", description=(__doc__ or "").splitlines()[0])
    p.add_argument("kind", choices=["cub", "cars", "aircraft"])
    p.add_argument("--root", type=Path, default=Path("data/mini"), help="parent folder of the mini sets")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    root = args.root / "finegrained"
    write_mini(args.kind, mini.ensure("images", args.root), root)
    print(root)
    return 0


if __name__ == "__main__":
    cli(main)
