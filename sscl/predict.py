"""Classes of a folder of images by a run's class head: python -m sscl.predict --pretrained RUN FOLDER --out FILE.csv

Network, size of the images and names of the classes are the checkpoint's. The views are plain: shorter side resized,
centre cropped. No alignment and no calibration, as in the evaluation.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from shared_utils import UserError, checkpoint, distributed, predictions
from shared_utils.augment import plain
from shared_utils.data import flat_folder, tell
from shared_utils.evaluation import check_cache, collect, freeze, prepare_data
from shared_utils.flags import Parser, add_machine_flags, positive
from shared_utils.layout import place
from shared_utils.run import cli, set_threads
from sscl.weights import add_network_flags, class_names, load_encoder


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sscl.predict", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("folder", type=Path, help="images at any depth, without labels")
    add_network_flags(a)
    a("--out", type=Path, help="file, class, confidence (default: predictions.csv beside the checkpoint)")
    a("--classes", type=Path, help="names of the classes, one a line, where the checkpoint has none; else numbers")
    a("--copy", choices=["query", "momentum"], default="query", help="whose class head")
    a("--img_size", type=positive, help="pixels of a crop; default: the checkpoint's")
    a("--batch_size", type=positive, default=64)
    add_machine_flags(p)
    return p


def names_of(path: str, file: Path | None) -> list[str]:
    """The classes of the checkpoint's head. UserError: it has no trained head, or `file` names another number."""
    saved = checkpoint.load(path)
    state = saved.get("state_dict") if isinstance(saved, dict) else None
    if not state or "encoder_q.fc.weight" not in state:
        raise UserError(f"{path}: holds no class head; give a checkpoint of sscl.main")
    if saved["args"].get("no_labels"):
        raise UserError(f"{path}: trained without labels, so its class head has learnt nothing; give another run")
    count = len(state["encoder_q.fc.weight"])
    if file is None:
        return class_names(state) or [str(c) for c in range(count)]
    return predictions.read_names(file, count)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    classes = names_of(args.pretrained, args.classes)
    prepare_data(args)  # --img_size
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    encoder, report = load_encoder(args, len(classes), args.copy)
    freeze(encoder)
    place(encoder, device)
    images = flat_folder(args.folder)
    check_cache({"predict a part of the folder at a time": (len(images), len(classes))})
    skipped = f"; not read: {tell(images.unread)}" if images.unread else ""
    print(f"sscl/predict: {report}; {len(images)} images of {args.img_size} pixels{skipped}", flush=True)
    images.transform = plain(args.img_size)

    def probabilities(x: Tensor) -> list[Tensor]:
        return [encoder.logits(x).softmax(1)]

    (p,), _ = collect(probabilities, images, device, args.batch_size, args.workers, everything=True)  # [N, C]
    out = args.out or Path(args.pretrained).with_name("predictions.csv")
    print("  " + predictions.write_csv(out, args.folder, images.paths(), classes, p))
    return 0


if __name__ == "__main__":
    cli(main)
