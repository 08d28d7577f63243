"""What a frozen backbone knows of each attribute of an image: nearest neighbours, a linear classifier, and the pixels.

    python -m sage.main_attributes --pretrained CHECKPOINT --data_dir data/mini/images --img_size 32

For each column of DATA_DIR/attributes.csv (the mini images: class, the shape; hue, texture, background): `knn20` and
`linear` accuracy in per cent, and their means over the columns. `recon` is the mean squared error, of values in -1..1,
that a freshly trained decoder reaches on validation images from the frozen stage-4 maps, `recon_mean_image` what the
mean training image reaches. --no_attributes: the reconstruction alone, for any set.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sage.arch import decoder_for
from sage.data import as_input, attribute_labels, plain
from sage.finegrained import open_images
from sage.options import add_flags, backbone, normalisation
from shared_utils import UserError, distributed
from shared_utils.data import mix_key
from shared_utils.evaluation import check_cache, collect, freeze, write_result
from shared_utils.flags import Parser, add_machine_flags, at_least, natural, not_negative, positive
from shared_utils.layout import place
from shared_utils.neighbours import knn_accuracy
from shared_utils.run import cli, set_threads


def get_parser() -> Parser:
    p = Parser(prog="sage.main_attributes", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    add_flags(p)
    a("--no_attributes", action="store_true", help="only the reconstruction; needs no attributes.csv")
    a(
        "--penalty",
        type=not_negative,
        default=1e-3,
        help="half of the squared weights of a linear classifier counts so much",
    )
    a("--recon_updates", type=natural, default=600, help="Adam updates of the fresh decoder; 0: no reconstruction")
    a("--recon_lr", type=float, default=1e-3)
    a("--recon_batch", type=at_least(2), default=64)
    a("--decoder_width", type=natural, default=0, help="channels of the bottleneck; 0: 8 x --width")
    a("--batch_size", type=positive, default=256)
    a("--seed", type=natural, default=0, help="of the fresh decoder and its batches")
    add_machine_flags(p, output_dir="sage/attributes")
    return p


def linear_accuracy(train: Tensor, y: Tensor, val: Tensor, truth: Tensor, penalty: float) -> float:
    """Top-1 in per cent of multinomial logistic regression on standardised features [N, D], fitted by L-BFGS to its
    minimum (no learning rate to choose)."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, val = ((f - mean) / std for f in (train, val))
    classes = int(max(y.max(), truth.max())) + 1
    w = torch.zeros(train.shape[1], classes, requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ w + b, y) + penalty / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return 100 * float(((val @ w + b).argmax(1) == truth).double().mean())


def reconstruction(
    args: argparse.Namespace, train: list[Tensor], val: list[Tensor], device: torch.device
) -> dict[str, float]:
    """Errors on validation images of a fresh decoder trained on frozen maps; `train`, `val`: maps [N, C, s, s] and
    images [N, 3, S, S] in -1..1."""
    torch.manual_seed(args.seed)
    decoder = decoder_for(args.arch, args.width, args.stem, args.img_size, args.decoder_width).to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), args.recon_lr)
    scale = train[0].std()  # networks whose maps differ in scale alone are treated alike
    maps, images = train[0] / scale, train[1]
    for update in range(args.recon_updates):
        draw = torch.Generator().manual_seed(mix_key(args.seed, update) % 2**63)
        rows = torch.randint(len(maps), (min(args.recon_batch, len(maps)),), generator=draw)
        for group in optimizer.param_groups:  # linear to 0
            group["lr"] = args.recon_lr * (1 - update / args.recon_updates)
        loss = F.mse_loss(decoder(maps[rows].to(device)), images[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    decoder.eval()
    total = 0.0
    with torch.no_grad():
        for some, wanted in zip((val[0] / scale).split(args.batch_size), val[1].split(args.batch_size)):
            total += float((decoder(some.to(device)).cpu() - wanted).square().mean((1, 2, 3)).sum())
    blank = float((val[1] - images.mean(0)).square().mean())
    return {"recon": total / len(val[0]), "recon_mean_image": blank}


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if not args.recon_lr > 0:
        raise UserError(f"--recon_lr {args.recon_lr}: must be above 0")
    device = distributed.init(args.device)
    if distributed.world() > 1:
        raise UserError("main_attributes runs in one process; start it without torchrun")
    set_threads(args.threads, args.workers, device)
    norm = normalisation(args)
    train, val = open_images(args)
    # -1..1: what a decoder recovers, whatever the backbone sees
    train.transform = val.transform = plain(args.img_size, backend=args.aug_backend)
    root = Path(args.data_dir)
    labels = {} if args.no_attributes else {split: attribute_labels(root, x) for split, x in (("t", train), ("v", val))}
    encoder, report = backbone(args)
    freeze(encoder)
    encoder = place(encoder, device)
    print(f"sage/attributes: {report}; {len(train)} train / {len(val)} val images", flush=True)

    def embed(x: Tensor) -> list[Tensor]:
        return [encoder(as_input(x, norm))[-1], x]

    values = 3 * args.img_size**2 + encoder(torch.zeros(1, 3, args.img_size, args.img_size, device=device))[-1].numel()
    check_cache({"lower --per_class": (len(train) + len(val), values)})
    (maps, images), _ = collect(embed, train, device, args.batch_size, args.workers)
    (val_maps, val_images), _ = collect(embed, val, device, args.batch_size, args.workers)
    result: dict[str, Any] = {}
    if labels:
        bank, queries = maps.mean((2, 3)), val_maps.mean((2, 3))
        unit = [F.normalize(f, dim=1) for f in (bank, queries)]
        for name, (y, _) in labels["t"].items():
            truth = labels["v"][name][0]
            result[f"knn20_{name}"] = knn_accuracy(unit[0], y, unit[1], truth, 20)
            result[f"linear_{name}"] = linear_accuracy(bank, y, queries, truth, args.penalty)
        for kind in ("knn20", "linear"):
            result[f"{kind}_mean"] = sum(result[f"{kind}_{name}"] for name in labels["t"]) / len(labels["t"])
    if args.recon_updates:
        result |= reconstruction(args, [maps, images], [val_maps, val_images], device)
    facts = {"pretrained": args.pretrained, "backbone_sha256": args.backbone_sha256, "data_dir": str(args.data_dir),
             "normalise": norm}  # fmt: skip
    write_result(args, result | facts)
    return 0


if __name__ == "__main__":
    cli(main)
