"""Nearest-neighbour evaluation of the pooled features (or of the projected ones), without any training.

    python -m kscl.main_knn --pretrained runs/kscl/pretrain/small/checkpoint.pth --data_dir DATA_DIR

Where DATA_DIR has class folders and neither val nor test, one image at a time is left out and classified by the others.
`knn200` k = 200, weights exp(cosine / .1), the monitor of MoCo's CIFAR demo (--k, --tau); `knn` k = 20, weights
exp(cosine / .07); `few_shot` with 10 labelled images a class; `purity` share of an image's 5 nearest training images
that have its label. All in per cent.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from kscl import arch
from shared_utils import UserError, checkpoint, distributed
from shared_utils.augment import plain
from shared_utils.data import ImageList
from shared_utils.evaluation import (
    add_data_flags,
    add_network_flags,
    freeze,
    load_backbone,
    open_splits,
    own_rows,
    protocol,
    write_result,
)
from shared_utils.flags import Parser, add_aug_flag, add_machine_flags, positive
from shared_utils.layout import place
from shared_utils.neighbours import features, few_shot, knn_accuracy, neighbours, purity
from shared_utils.run import cli, set_threads


def get_parser() -> Parser:
    p = Parser(prog="kscl.main_knn", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_network_flags(p, arch.ARCHS, arch.STEMS, "resnet50")
    add_data_flags(p)
    add_aug_flag(p)
    a("--features", choices=["backbone", "projected"], default="backbone", help="pooled, or after the projection head")
    a("--k", type=positive, default=200, help="neighbours of knn200")
    a("--tau", type=float, default=0.1, help="temperature of knn200's weights")
    a("--feature_dir", type=Path, help="keep features in .npy files there (mapped, not in memory: for ImageNet)")
    a("--batch_size", type=positive, default=256, help="images a process")
    add_machine_flags(p, amp="none", output_dir="kscl/knn")
    return p


def with_head(pretrained: str) -> Callable[[str, int, str], arch.Encoder]:
    """`arch.build` with a projection head of the checkpoint's size. UserError: it has none."""
    last = checkpoint.read_weights(pretrained).get("fc.2.weight") if pretrained != "none" else None
    if last is None:
        raise UserError(f"--features projected: {pretrained} has no projection head (fc.0, fc.2)")

    def build(name: str, width: int, stem: str) -> arch.Encoder:
        encoder = arch.build(name, width, stem)
        encoder.fc = arch.mlp_head(encoder.num_features, len(last))
        return encoder

    return build


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if not args.tau > 0:
        raise UserError(f"--tau {args.tau}: must be above 0")
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    train, val = open_splits(args, leave_one_out=True)
    train.transform = val.transform = plain(args.img_size, args.aug_backend)
    pooled = args.features == "backbone"
    build, drop = (arch.build, arch.DROP) if pooled else (with_head(args.pretrained), ())
    encoder, report = load_backbone(build, args, "resnet50", drop)
    freeze(encoder)
    encoder = place(encoder, device)
    if distributed.rank() == 0:
        print(f"kscl/knn, {args.features} features: {report}; {protocol(train, val, max(args.k, 20))}", flush=True)

    def embed(name: str, images: ImageList) -> Tensor:
        out = args.feature_dir / f"{name}.npy" if args.feature_dir else None
        return features(
            lambda x: encoder(x, pre_out=pooled), images, device, args.batch_size, args.workers, args.amp == "bf16", out
        )

    bank, own = embed("train", train), own_rows(train, val)
    queries = bank if val is train else embed("val", val)
    labels, truth = train.labels, val.labels
    nearest = neighbours(bank, min(5, len(train) - 1), device)
    result: dict[str, object] = {
        "knn200": knn_accuracy(bank, labels, queries, truth, args.k, args.tau, device, own),
        "knn": knn_accuracy(bank, labels, queries, truth, 20, 0.07, device, own),
        "few_shot": few_shot(bank, labels, queries, truth, 10, device=device, own=own),
        "purity": purity(nearest, labels),
    }
    result |= {"features": args.features, "pretrained": args.pretrained, "backbone_sha256": args.backbone_sha256}
    write_result(args, result | {"data_dir": str(args.data_dir), "protocol": protocol(train, val, max(args.k, 20))})
    return 0


if __name__ == "__main__":
    cli(main)
