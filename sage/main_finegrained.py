"""Fine-grained recognition by fine-tuning: CUB-200-2011, Stanford Cars, FGVC-Aircraft.

    python -m sage.main_finegrained --pretrained runs/sage/pretrain/paper/checkpoint.pth --dataset cub --data_dir DIR

The layouts are at the head of sage/finegrained.py. Linear protocol of the same sets: sage.main_lincls --dataset cub.
Which sets the paper uses is not confirmed.
"""

from sage.finegrained import READERS, open_images
from sage.finetune import add_finetune_flags, check_flags, grid
from sage.options import add_flags, normalisation
from shared_utils import UserError, distributed
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import cli


def get_parser() -> Parser:
    p = Parser(prog="sage.main_finegrained", description=(__doc__ or "").splitlines()[0])
    add_flags(p)
    add_finetune_flags(
        p, lr=[0.01], head_lr_mult=[1.0], weight_decay=1e-4, batch_size=64, total_epochs=100, lr_policy="cosine"
    )
    add_run_flags(p, "sage/finegrained", "pretrained")
    p.set_defaults(dataset="cub")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.dataset not in READERS:
        raise UserError(f"--dataset {args.dataset}: choose from {', '.join(READERS)}")
    distributed.init(args.device)
    normalisation(args)  # what is not known is said before the data are read
    train, val = open_images(args)
    check_flags(args, distributed.world(), len(train))
    facts = {"dataset": args.dataset, "pretrained": args.pretrained}
    grid(args, "finegrained", train, val, facts)
    return 0


if __name__ == "__main__":
    cli(main)
