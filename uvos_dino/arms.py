"""Table of the arms that `run_arms.sh` trained: python -m uvos_dino.arms runs/uvos_dino/arms/small/davis2016 [--record]

Mean and sample standard deviation over the seeds. `--record` writes the rows of the small tier into results.csv and
compact logs into uvos_dino/logs/; `--plot FILE.png` draws the number of clusters and J over training.
"""

import argparse
import json
from pathlib import Path

from shared_utils import UserError
from shared_utils.arms import Arms, Seeds
from shared_utils.run import cli

OTHER_TAU = "0.3"


def read(folder: Path) -> dict[str, float] | None:
    """Metrics of the run in `folder` from its evaluations; None while the last one is not there."""
    file = folder.with_name(f"{folder.name}-test") / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    out = {
        "J": result["frame"]["J-Mean"],
        "JF": result["frame"]["J&F-Mean"],
        "J_sequence": result["sequence"]["J-Mean"],
        "clusters": result["clusters"],
    }
    other = folder.with_name(f"{folder.name}-tau{OTHER_TAU}") / "result.json"
    if other.is_file():
        result = json.loads(other.read_text())
        out |= {"J_other": result["frame"]["J-Mean"], "clusters_other": result["clusters"]}
    return out


ARMS = Arms(
    paper="uvos_dino",
    home=Path(__file__).resolve().parent,
    arms={
        "random": "random block",
        "semantic": "semantic loss only",
        "motion": "motion loss only",
        "uniform": "both losses, no entropy weights",
        "both": "both losses",
        "both_long": "both losses, 300 iterations",
        "both_noaug": "both losses, no augmentation",
    },
    metrics={"J": "J (matched by frame)", "JF": "J&F (matched by frame)", "J_sequence": "J (matched by sequence)"},
    shown={
        "clusters": "clusters a sequence",
        "J_other": f"J at tau {OTHER_TAU}",
        "clusters_other": f"clusters at tau {OTHER_TAU}",
    },
    sets={"davis2016": "12 sequences of DAVIS-2016, 12 x 24 patches, our own DINO"},
    claim="J",
    baseline="random",
    pairs=[
        ("both", "random"), ("both", "semantic"), ("motion", "random"), ("semantic", "random"), ("both", "motion"),
        ("both", "uniform"), ("both_long", "both"), ("both_noaug", "both"),
    ],
    curve=(
        "step", "loss", "slot_loss", "motion_loss", "train/attn_entropy", "train/attn_frame_share", "probe/clusters",
        "probe/J",
    ),
    command="export DATA_ROOT=/path/to/data SET={set} && "
    "ARMS='{arms}' SEEDS='{seeds}' bash uvos_dino/run_arms.sh small",
    read=read,
)  # fmt: skip


def courses(seeds: Seeds, name: str) -> list[list[tuple[float, float]]]:
    """(iteration, value) of a probed number, a list a seed."""
    return [[(row["step"], row[name]) for row in run["curve"] if name in row] for run in seeds.values()]


def plot(name: str, file: Path) -> None:
    """Clusters and J over training from the recorded logs of the set `name`, a line a seed, as a picture."""
    from PIL import Image, ImageDraw

    found = {arm: seeds for arm, seeds in ARMS.logs(name).items() if any(courses(seeds, "probe/clusters"))}
    if not found:
        raise UserError(f"{ARMS.home}/logs: no recorded run of {name} was probed; run uvos_dino/run_arms.sh first")
    colours = ["#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#444444"]
    W, H, M = 420, 260, 48
    image = Image.new("RGB", (2 * W, H + 18 * len(found)), "white")
    draw = ImageDraw.Draw(image)
    for panel, (key, title) in enumerate((("probe/clusters", "clusters a sequence"), ("probe/J", "J, per cent"))):
        lines = {arm: courses(seeds, key) for arm, seeds in found.items()}
        points = [point for runs in lines.values() for run in runs for point in run]
        last, top = max(x for x, _ in points), 1.05 * max(y for _, y in points)
        left, base = panel * W + M, H - 34
        draw.line([(left, 20), (left, base), (left + W - M - 16, base)], fill="black")
        draw.text((left, 4), title, fill="black")
        draw.text((left, base + 6), "0", fill="black")
        draw.text((left + W - M - 70, base + 6), f"{last:.0f} its", fill="black")
        draw.text((left - 44, 20), f"{top:.0f}", fill="black")
        for colour, runs in zip(colours, lines.values()):
            for run in runs:
                spots = [(left + x / last * (W - M - 16), base - y / top * (base - 20)) for x, y in run]
                draw.line(spots, fill=colour, width=2)
    for i, (colour, arm) in enumerate(zip(colours, found)):
        draw.line([(M, H + 8 + 18 * i), (M + 24, H + 8 + 18 * i)], fill=colour, width=3)
        draw.text((M + 32, H + 2 + 18 * i), ARMS.arms[arm], fill="black")
    image.save(file)


def get_parser() -> argparse.ArgumentParser:
    p = ARMS.parser(__doc__ or "")
    p.add_argument("--plot", type=Path, help="draw the recorded courses of the set to this PNG")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    code = ARMS.main(args)
    if args.plot:
        plot(args.root.resolve().name, args.plot)
        print(f"courses -> {args.plot}")
    return code


if __name__ == "__main__":
    cli(main)
