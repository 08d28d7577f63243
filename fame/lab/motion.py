"""The small tier's generated set: the mini videos' motions and backgrounds as folders of frames, and more of them.

    data/CLASS/VIDEO/img_00001.jpg   anno/{train,test}list0{1,2}.txt   attributes.csv (background, digit)

    python -m fame.lab.motion

UCF101's lists in the release's layout; no PyAV is needed. Motion is the class. In list 1 the background is tied to it
in training and that of another class in test, in list 2 it is independent of it.
"""

import csv
from pathlib import Path

from PIL import Image

from shared_utils.flags import Parser
from shared_utils.lab import mini, mini_draw
from shared_utils.run import cli

KIND = "motion"
PER_CLASS = {"train01": 50, "test01": 25, "train02": 30, "test02": 25}


def write(folder: Path) -> None:
    """Render every clip into `folder`."""
    rows = []
    (folder / "anno").mkdir()
    for part, count in PER_CLASS.items():
        lines = []
        for index in range(len(mini_draw.MOTIONS) * count):
            frames, factors = mini_draw.render_clip(part, index, count)
            name = f"{factors['class']}/v_{factors['class']}_{part}_c{index % count + 1:02d}"
            (folder / "data" / name).mkdir(parents=True)
            for number, frame in enumerate(frames, 1):
                Image.fromarray(frame).save(folder / "data" / name / f"img_{number:05d}.jpg", quality=95)
            lines.append(f"{name}.avi\n")
            rows.append({"path": f"{name}.avi", "list": part, **factors})
        (folder / "anno" / f"{part[:-2]}list{part[-2:]}.txt").write_text("".join(lines))
    with open(folder / "attributes.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


mini.WRITERS.setdefault(KIND, write)  # beside the sets of all folders: the same root, lock and stamp


def get_parser() -> Parser:
    p = Parser(prog="fame.lab.motion", description=__doc__.splitlines()[0])
    p.add_argument("--root", type=Path, default=mini.ROOT, help="parent folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    print(mini.ensure(KIND, get_parser().parse_args(argv).root))
    return 0


if __name__ == "__main__":
    cli(main)
