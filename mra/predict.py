"""Classes of your own images as CSV: python -m mra.predict FOLDER --pretrained RUN --out predictions.csv

A line an image, `file,class,confidence`, in the order of the names; confidence is the softmax's.
"""

from pathlib import Path

from mra import nets, transforms
from shared_utils import distributed
from shared_utils.data import flat_folder, tell
from shared_utils.evaluation import collect
from shared_utils.flags import Parser, add_machine_flags, positive
from shared_utils.layout import follow, place
from shared_utils.predictions import read_names, write_csv
from shared_utils.run import cli, set_threads


def get_parser() -> Parser:
    p = Parser(prog="mra.predict", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("folder", type=Path, help="images anywhere below it")
    a("--pretrained", "--checkpoint", required=True, help="folder or checkpoint of a run of "
      "main_supervised, main_fixmatch (its averaged weights) or main_fewshot (its base classes)")  # fmt: skip
    a("--out", type=Path, default=Path("predictions.csv"), help="file of the table")
    a("--classes", type=Path, help="names of the classes, one a line, in place of those in the checkpoint")
    a("--batch_size", type=positive, default=64)
    add_machine_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    network, flags = nets.load_run(args.pretrained, device)
    classes: list[str] = flags["classes"]
    if args.classes:
        classes = read_names(args.classes, len(classes))
    images = flat_folder(args.folder)
    skipped = f"; not read: {tell(images.unread)}" if images.unread else ""
    print(f"mra/predict: {args.pretrained}; {len(images)} images of {flags['input_size']} pixels{skipped}", flush=True)
    images.transform = transforms.test_transform(flags["input_size"], flags.get("mean_std", "imagenet"))
    place(network, device)
    (probabilities,), _ = collect(
        lambda x: [network(follow(x, network)).softmax(1)], images, device, args.batch_size, args.workers,
        everything=True,
    )  # fmt: skip
    print("  " + write_csv(args.out, args.folder, images.paths(), classes, probabilities))
    return 0


if __name__ == "__main__":
    cli(main)
