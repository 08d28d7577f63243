"""Semi-supervised evaluation: fine-tuning with 1 % or 10 % of the labels (release configs semi_classification).

    python -m sage.main_semi --pretrained runs/sage/pretrain/paper/checkpoint.pth --data_dir imagenet \\
        --labels 1percent.txt

The protocol tries nine cells, learning rate .001 .01 .1 times head factor 1 10 100, and reports the best.
"""

from pathlib import Path

from sage.finegrained import open_images
from sage.finetune import add_finetune_flags, check_flags, grid
from sage.options import add_flags, normalisation
from shared_utils import distributed
from shared_utils.evaluation import labelled_indices, subset
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import cli


def get_parser() -> Parser:
    p = Parser(prog="sage.main_semi", description=(__doc__ or "").splitlines()[0])
    add_flags(p)
    p.add_argument("--labels", type=Path, help="list of the labelled images, as SimCLR's (default: by --fraction)")
    p.add_argument("--fraction", type=float, default=0.01, help="share of each class that is labelled, drawn by --seed")
    add_finetune_flags(
        p, lr=[0.001, 0.01, 0.1], head_lr_mult=[1.0, 10.0, 100.0], weight_decay=5e-4, batch_size=256, total_epochs=20,
        lr_policy="step",
    )  # fmt: skip
    add_run_flags(p, "sage/semi", "pretrained")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    distributed.init(args.device)
    normalisation(args)  # what is not known is said before the data are read
    train, val = open_images(args)
    chosen = labelled_indices(train, args.labels, args.fraction, Path(args.data_dir) / "train", args.seed)
    check_flags(args, distributed.world(), len(chosen))
    facts = {"labelled": len(chosen), "of": len(train), "pretrained": args.pretrained}
    grid(args, "semi", subset(train, chosen), val, facts)
    return 0


if __name__ == "__main__":
    cli(main)
