"""Top-1 and top-5 of the class head, and the quality of the pseudo-labels: python -m sscl.eval_cls --pretrained RUN

The head is that of the query network, h(f(x)), without alignment or calibration; the momentum copy's stands beside it
(`ema_`). `--pseudo` predicts the unlabelled training images as training does, but by the finished network on plain
views, and counts how often argmax is right before and after the calibration, at equal coverage.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_utils import UserError, checkpoint, distributed
from shared_utils.augment import plain
from shared_utils.data import ImageList
from shared_utils.evaluation import (
    add_data_flags,
    check_cache,
    collect,
    freeze,
    gather_rows,
    stored_flags,
    topk,
    write_result,
)
from shared_utils.flags import Parser, add_machine_flags, positive
from shared_utils.layout import place
from shared_utils.run import cli, set_threads
from sscl.calibration import Alignment, calibrate, log_similarity
from sscl.data import labelled_images, open_evaluation, training_images
from sscl.watch import equal_coverage
from sscl.weights import add_network_flags, load_encoder

COVERAGES = (0.2, 0.5, 1.0)


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sscl.eval_cls", description=(__doc__ or "").splitlines()[0])
    add_network_flags(p.add_argument)
    add_data_flags(p)
    a = p.add_argument
    a("--split_file", type=Path, help="--pseudo: the run's list of labelled images, where it lies elsewhere now")
    a("--pseudo", action="store_true", help="also the pseudo-labels of the run's own unlabelled training images")
    a(
        "--eval_calibrated",
        action="store_true",
        help="also top-1 of the calibrated prediction (an extra)",
    )
    a("--batch_size", type=positive, default=256)
    add_machine_flags(p, output_dir="sscl/cls")
    return p


def run_state(path: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint of sscl.main. UserError: another file."""
    saved = checkpoint.load(path)
    state = saved.get("state_dict") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or "prototypes" not in state:
        raise UserError(f"{path}: holds no prototypes; give a checkpoint of sscl.main")
    return dict(state)


def accuracy(logits: Tensor, truth: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in per cent."""
    top1, top5 = (100 * topk(logits, truth) / len(truth)).tolist()
    return top1, top5


def pseudo_scores(kinds: Mapping[str, Tensor], truth: Tensor) -> dict[str, float]:
    """Accuracy in per cent of argmax of each distribution [N, C] among its own most confident share, as NAME@SHARE."""
    return {
        f"{name}@{round(100 * share)}": 100 * float(equal_coverage(d, truth, share))
        for name, d in kinds.items()
        for share in COVERAGES
    }


class Predictor:
    """Both copies of a checkpoint's encoder on a device."""

    def __init__(self, args: argparse.Namespace, classes: int, device: torch.device):
        self.args, self.device = args, device
        self.query, self.report = load_encoder(args, classes)
        self.momentum, _ = load_encoder(args, classes, "momentum")
        for network in (self.query, self.momentum):
            freeze(network)
            place(network, device)

    def __call__(self, images: ImageList) -> tuple[list[Tensor], Tensor]:
        """[logits of the query, logits of the copy, embeddings of the copy] [N, ...] and labels, on every process."""

        def outputs(x: Tensor) -> list[Tensor]:
            logits, z = self.momentum(x)
            return [self.query.logits(x), logits, z]

        images.transform = plain(self.args.img_size)
        mine, _ = collect(outputs, images, self.device, self.args.batch_size, self.args.workers)
        return [gather_rows(rows, len(images), self.device) for rows in mine], images.labels


def unlabelled_images(args: argparse.Namespace, flags: Mapping[str, Any]) -> tuple[ImageList, Tensor]:
    """The training images of the run with these flags, below --data_dir, and which it had no label of [N] bool.

    UserError: its flags choose other labelled images here than in training; all images are labelled.
    """
    if flags.get("labelled"):
        raise UserError("--pseudo: nobody has labelled the run's unlabelled images; leave it out")
    own = argparse.Namespace(**{**flags, "data": Path(args.data_dir)})
    if args.split_file and not own.split_file:
        raise UserError("--split_file: the run had no list of labelled images; leave it out")
    if own.split_file:
        own.split_file = args.split_file or Path(own.split_file)
        if not own.split_file.is_file():
            raise UserError(
                f"{own.split_file}: the run's list of labelled images is not there; give it as --split_file"
            )
    images = training_images(own.data, own.per_class, args.cache, own.imbalance)
    labelled = torch.tensor(labelled_images(own, images), dtype=torch.long)
    if own.split_sha256 != flags["split_sha256"]:
        raise UserError(
            f"--data_dir {args.data_dir}: the run's flags choose other labelled images here (sha256 "
            f"{own.split_sha256}) than in training ({flags['split_sha256']}); give the images and list of the run"
        )
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[labelled] = False
    if not bool(rest.any()):
        raise UserError(f"--pseudo: all {len(images)} training images are labelled; leave it out")
    return images, rest


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    flags = stored_flags(args.pretrained)
    train, val = open_evaluation(args, flags)
    classes = len(train.classes)
    networks = Predictor(args, classes, device)
    state = run_state(args.pretrained)
    calibrates = int(state["proto_epoch"]) >= 0
    if args.eval_calibrated and not calibrates:
        raise UserError(f"--eval_calibrated: {args.pretrained} was trained without prototypes")
    own = unlabelled_images(args, flags) if args.pseudo else None
    wanted = {"give a smaller --val_dir": (len(val), 2 * classes + networks.query.dim)}
    if own is not None:  # logits of both copies, the embedding, and each of the distributions
        wanted["leave --pseudo out"] = (len(own[0]), 6 * classes + networks.query.dim)
    check_cache(wanted)
    if distributed.rank() == 0:
        print(f"sscl/cls: {networks.report}; {len(val)} val images", flush=True)
    (logits, ema, z), truth = networks(val)
    result: dict[str, Any] = dict(zip(("top1", "top5"), accuracy(logits, truth)))
    result |= dict(zip(("ema_top1", "ema_top5"), accuracy(ema, truth)))
    how = {key: flags.get(key, default) for key, default in (("calib_weight", 0.5), ("tau_s", 0.1))}
    kind = "product" if flags.get("calib", "none") == "none" else flags["calib"]

    def calibrated(p: Tensor, z: Tensor) -> Tensor:
        log_q = log_similarity(z, state["prototypes"], how["tau_s"])
        return calibrate(p, log_q, kind, state["alignment.qbar"], how["calib_weight"])

    if args.eval_calibrated:
        result["calibrated_top1"] = accuracy(calibrated(logits.softmax(1), z), truth)[0]
    if own is not None:
        images, rest = own
        (logits, _, z), truth = networks(images)
        p, z, truth = logits.softmax(1)[rest], z[rest], truth[rest]
        alignment = Alignment(classes, flags["da"])
        alignment.pbar.copy_(state["alignment.pbar"])
        kinds = {"raw": p, "aligned": alignment(p)}
        if calibrates:
            kinds["calib"] = calibrated(kinds["aligned"], z)
        result |= pseudo_scores(kinds, truth) | {"unlabelled": int(rest.sum())}
    saved = checkpoint.load(args.pretrained)
    result["minutes"] = round(saved["progress"]["seconds"] / 60, 2)
    write_result(args, result | {"pretrained": args.pretrained, "data_dir": str(args.data_dir)})
    return 0


if __name__ == "__main__":
    cli(main)
