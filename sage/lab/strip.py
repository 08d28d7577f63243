"""A strip that shows what SaGe does: views, what the decoder made of them as training went on, and how far it is off.

    python -m sage.lab.strip

The recovered images are those that the run's checkpoint keeps (`sage.gallery`), the distances those of its evaluator.
"""

from pathlib import Path

import numpy as np
import torch

from sage import arch
from sage.builder import Evaluator
from sage.data import Views, denormalise, drawn, normalise, training_images
from sage.gallery import Gallery
from sage.train import get_parser as training_parser
from sage.weights import guess_network
from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser, positive
from shared_utils.lab import tiles
from shared_utils.run import cli, set_threads

COMMAND = "bash sage/run_evaluator.sh && bash sage/run_pretrain.sh"
SIDE = 64
NAMES = {"sage": "SaGe:\nfeatures", "pixel": "pixels\nalone"}  # arms that recover images


def get_parser() -> Parser:
    p = tiles.strip_parser("sage", __doc__)
    p.add_argument("--against", type=Path, help="checkpoint of another arm with the same views, below the first")
    p.add_argument("--views", type=positive, default=2, help="rows, of the views that the run kept")
    return p


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    saved, flags = tiles.open_run(args.pretrained, training_parser(), COMMAND, ["state_dict"])
    if not saved.get("gallery", {}).get("stages"):
        raise UserError(f"{args.pretrained}: keeps no recovered images (--mode byol or --gallery 0); take another run")
    set_threads(0, 0, torch.device("cpu"))
    data_dir = Path(flags.data_dir)
    images = training_images(data_dir, flags.list_file, flags.per_class)
    shown = np.linspace(0, len(images) - 1, min(flags.gallery, len(images))).astype(int)
    views = Views(images, flags.img_size, False, flags.blur_max)
    gallery = Gallery(drawn(views, shown, flags.seed, flags.aug_backend), 1, 1)
    gallery.load_state_dict(saved["gallery"])
    count = max(1, min(args.views, len(gallery.inputs)))
    state = {k.removeprefix("r_function."): v for k, v in saved["state_dict"].items() if k.startswith("r_function.")}
    evaluator = None
    if state:
        own = guess_network({k.removeprefix("0."): v for k, v in state.items() if k.startswith("0.")})
        name, width, imagenet = own or (flags.arch, flags.width, False)
        backbone, projector = arch.build(name, width, "imagenet" if imagenet else flags.stem), None
        if "1.fc0.weight" in state:
            hid, out = state["1.fc0.weight"].shape[0], state["1.fc1.weight"].shape[0]
            projector = arch.Neck(backbone.num_features, hid, out)
        evaluator = Evaluator(backbone, projector, flags.evaluator_norm).eval()
        checkpoint.load_strict(evaluator, state)

    def features_off(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """Mean over the evaluator's maps of |h(x) - h(made)|^2 / |h(x)|^2, [N]."""
        assert evaluator is not None
        pairs = zip(evaluator(x, [2, 3, 4]), evaluator(made, [2, 3, 4]))
        return torch.stack([(a - b).square().sum((1, 2, 3)) / a.square().sum((1, 2, 3)) for a, b in pairs]).mean(0)

    runs = {flags.mode: gallery.stages}
    if args.against:
        other, theirs = tiles.open_run(args.against, training_parser(), COMMAND, ["gallery"])
        same = ("seed", "img_size", "gallery", "blur_max", "per_class", "data_dir", "list_file", "total_epochs",
                "aug_backend")  # fmt: skip
        if differing := [name for name in same if getattr(theirs, name) != getattr(flags, name)]:
            raise UserError(f"{args.against}: its --{differing[0]} is not that of {args.pretrained}")
        runs[theirs.mode] = other["gallery"]["stages"]
    x = normalise(gallery.inputs[:count])
    rows: list[list] = [["", "view", *(f"update {stage['step']}" for stage in gallery.stages), "difference"]]
    for mode, stages in runs.items():
        made = [normalise(stage["images"][:count]) for stage in stages]
        off = [features_off(x, y) if evaluator is not None else None for y in made]
        for i in range(count):
            line: list = [NAMES[mode] if i == 0 else "", tiles.tile(denormalise(x[i]), SIDE, "", tiles.BLUE)]
            for stage, y, share in zip(stages, made, off):
                told = f"{stage['error'][i]:.2f}" + ("" if share is None else f" | {share[i]:.2f}")
                line.append(tiles.tile(denormalise(y[i]), SIDE, told))
            rows.append(
                [*line, tiles.tile(tiles.heat((denormalise(x[i]) - denormalise(made[-1][i])).abs().mean(0)), SIDE)]
            )
    strip = tiles.grid(rows, 8)
    foot = tiles.words(
        "A decoder recovers the view from the encoder's last feature map; SaGe trains it, and the encoder, on what a "
        "frozen evaluator sees of both images, instead of on the pixels. Below: squared error of the pixels"
        f"{' | of the features of the evaluator (share of their size)' if evaluator is not None else ''}.", 13,
        width=max(620, strip.width),
    )  # fmt: skip
    print(tiles.save(tiles.column([strip, foot], 6), args.out))
    return 0


if __name__ == "__main__":
    cli(main)
