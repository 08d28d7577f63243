"""Nearest-neighbour evaluation of a backbone's pooled features, without any training.

    python -m hsa.main_knn --pretrained runs/hsa/pretrain/small/checkpoint.pth --data_dir DATA_DIR

Where DATA_DIR has class folders and neither val nor test, one image at a time is left out and classified by the others.
`knn` k = 20, weights exp(cosine / .07); `knn10` k = 10, majority vote; `few_shot` with 10 labelled images a class;
`purity` share of an image's 5 nearest training images that have its label. With --bags, neighbours of every training
image from elsewhere (another network, random ones): `bag_gap`, the mean cosine of these pairs minus that of all pairs,
and `overlap`, the share of them among an image's own K nearest. All in per cent but the gap. Not in the release.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hsa.arch import ARCHS, DROP, STEMS, build
from shared_utils import UserError, distributed
from shared_utils.augment import plain
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
    p = Parser(prog="hsa.main_knn", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_network_flags(p, ARCHS, STEMS, "resnet50")
    add_data_flags(p)
    add_aug_flag(p)
    a("--bags", type=Path, help="integers [N, K] in an .npy file, or [N] group numbers")
    a("--clus_pos_num", type=positive, default=5, help="K, neighbours that count")
    a("--feature_dir", type=Path, help="keep features in .npy files there (mapped, not in memory: for ImageNet)")
    a("--batch_size", type=positive, default=256, help="images a process")
    add_machine_flags(p, amp="none", output_dir="hsa/knn")
    return p


CHUNK = 8192  # rows whose sums are formed in double precision at a time


def mean_cosine(feats: Tensor) -> float:
    """Over all pairs of different rows; by the norm of the sum, without forming the pairs."""
    return group_cosine(feats, torch.zeros(len(feats), dtype=torch.int64))


def group_cosine(feats: Tensor, groups: Tensor) -> float:
    """Mean over all pairs of different rows of the same group; feats [N, D], group numbers [N]."""
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), feats.shape[1], dtype=torch.float64)
    squares = 0.0
    for rows, numbers in zip(feats.split(CHUNK), group.split(CHUNK)):
        rows = rows.double()
        sums.index_add_(0, numbers, rows)
        squares += float(rows.square().sum())
    return (float(sums.square().sum()) - squares) / max(1, int((counts * (counts - 1)).sum()))


def bag_scores(feats: Tensor, array: Tensor, own: Tensor | None) -> dict[str, float]:
    """Gap, and overlap for bags that are lists of neighbours.

    Args:
        feats: [N, D] normalised; array: [N, K] members, or [N] group numbers; own: [N, K] the features' own neighbours.
    """
    if array.ndim == 2:
        total = 0.0
        for rows, members in zip(feats.split(CHUNK), array.split(CHUNK)):
            total += sum(float((rows * feats[column]).sum(1).double().sum()) for column in members.T)
        pairs = total / array.numel()
    else:
        pairs = group_cosine(feats, array)
    out = {"bag_gap": pairs - mean_cosine(feats)}
    if array.ndim == 2 and own is not None:
        out["overlap"] = 100 * float((array[:, :, None] == own[:, None, :]).any(2).double().mean())
    return out


def load_bags(path: Path, count: int, k: int) -> Tensor:
    """[N, at most k] row numbers, or [N] group numbers, for `count` images. UserError: anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of neighbours; give an .npy file with a row for each training image")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # of many kinds
        raise UserError(f"{path}: not a readable .npy array ({' '.join(str(error).split())[:80]})") from None
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer) or len(array) != count:
        raise UserError(f"{path}: holds {array.dtype} {list(array.shape)}, expected integers [{count}, K]")
    if array.ndim == 2 and (array.min() < 0 or array.max() >= count):
        raise UserError(f"{path}: indices {array.min()}..{array.max()} for {count} images")
    return torch.from_numpy(array.astype(np.int64))[..., :k] if array.ndim == 2 else torch.from_numpy(array)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    train, val = open_splits(args, leave_one_out=True)
    train.transform = val.transform = plain(args.img_size, args.aug_backend)
    bags = load_bags(args.bags, len(train), args.clus_pos_num) if args.bags else None
    encoder, report = load_backbone(build, args, "resnet50", DROP, ("{}",))
    freeze(encoder)
    encoder = place(encoder, device)
    if distributed.rank() == 0:
        print(f"hsa/knn: {report}; {protocol(train, val, 200)}", flush=True)

    def embed(name: str, images) -> Tensor:  # type: ignore[no-untyped-def]
        out = args.feature_dir / f"{name}.npy" if args.feature_dir else None
        return features(
            lambda x: encoder(x, pre_out=True), images, device, args.batch_size, args.workers, args.amp == "bf16", out
        )

    bank, own = embed("train", train), own_rows(train, val)
    queries = bank if val is train else embed("val", val)
    labels, truth = train.labels, val.labels
    nearest = neighbours(bank, min(max(5, args.clus_pos_num), len(train) - 1), device)
    result: dict[str, object] = {
        "knn": knn_accuracy(bank, labels, queries, truth, 20, 0.07, device, own),
        "knn200": knn_accuracy(bank, labels, queries, truth, 200, 0.1, device, own),  # as MoCo's CIFAR-10 notebook
        "knn10": knn_accuracy(bank, labels, queries, truth, 10, None, device, own),
        "few_shot": few_shot(bank, labels, queries, truth, 10, device=device, own=own),
        "purity": purity(nearest[:, :5], labels),
    }
    if bags is not None and distributed.rank() == 0:  # who writes the result
        result |= bag_scores(bank, bags, nearest[:, : args.clus_pos_num])
    result |= {"pretrained": args.pretrained, "backbone_sha256": args.backbone_sha256, "data_dir": str(args.data_dir)}
    result["protocol"] = protocol(train, val, 200)
    write_result(args, result)
    return 0


if __name__ == "__main__":
    cli(main)
