"""Nearest-neighbour test of a backbone's pooled features, without any training.

    python -m sage.main_knn --pretrained runs/sage/pretrain/small/checkpoint.pth --data_dir DATA_DIR

Where DATA_DIR has class folders and neither val nor test, one image at a time is left out and classified by the others.
`knn1` the nearest training image's label; `knn20` and `knn200` weighted votes, exp(cosine / .07). In per cent.
"""

from pathlib import Path

from torch import Tensor

from sage.data import plain
from sage.finegrained import open_images
from sage.options import add_flags, backbone, normalisation
from shared_utils import distributed
from shared_utils.data import ImageList
from shared_utils.evaluation import freeze, own_rows, protocol, write_result
from shared_utils.flags import Parser, add_machine_flags, positive
from shared_utils.layout import place
from shared_utils.neighbours import features, knn_accuracy
from shared_utils.run import cli, set_threads


def get_parser() -> Parser:
    p = Parser(prog="sage.main_knn", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    add_flags(p)
    a("--feature_dir", type=Path, help="keep features in .npy files there (mapped, not in memory: for ImageNet)")
    a("--batch_size", type=positive, default=256, help="images a process")
    add_machine_flags(p, amp="none", output_dir="sage/knn")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    norm = normalisation(args)
    train, val = open_images(args, leave_one_out=True)
    train.transform = val.transform = plain(args.img_size, norm, args.aug_backend)
    encoder, report = backbone(args)
    freeze(encoder)
    encoder = place(encoder, device)
    if distributed.rank() == 0:
        print(f"sage/knn: {report}; {protocol(train, val, 200)}", flush=True)

    def embed(name: str, images: ImageList) -> Tensor:
        out = args.feature_dir / f"{name}.npy" if args.feature_dir else None
        return features(encoder.pooled, images, device, args.batch_size, args.workers, args.amp == "bf16", out)

    bank, own = embed("train", train), own_rows(train, val)
    queries = bank if val is train else embed("val", val)
    result: dict[str, object] = {
        f"knn{k}": knn_accuracy(bank, train.labels, queries, val.labels, k, 0.07, device, own) for k in (1, 20, 200)
    }
    result |= {"pretrained": args.pretrained, "backbone_sha256": args.backbone_sha256, "data_dir": str(args.data_dir)}
    result |= {"normalise": norm, "protocol": protocol(train, val, 200)}
    write_result(args, result)
    return 0


if __name__ == "__main__":
    cli(main)
