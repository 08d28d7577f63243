"""Robustness to occlusion: python -m mra.eval_occlusion --checkpoint RUN/checkpoint.pth [--mae_ckpt MAE.pth]

A share q of the grid's cells is set to the mean colour: cells at random; with an autoencoder also the most and the
least attended ones first. Accuracy for each q, and the area below the curve. With an autoencoder and masks of the
objects beside the images: how much of the object the probe keeps, and how well erased patches are reconstructed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra import data, nets, transforms
from mra.models_mae import MAE, run_file
from mra.mra import MRA, add_mae_flags, attention_scores, load_mae, pixel_mask, score_entropy
from shared_utils import UserError, distributed
from shared_utils.data import ImageList
from shared_utils.evaluation import subset, write_result
from shared_utils.flags import Parser, add_machine_flags, add_output_flag, natural, positive
from shared_utils.layout import follow
from shared_utils.run import cli, set_threads

SHARES = [q / 10 for q in range(10)]
INHERITED = ("val_dir", "data_path", "dataset", "input_size", "tests", "mean_std")


def get_parser() -> Parser:
    p = Parser(prog="mra.eval_occlusion", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a(
        "--checkpoint",
        "--pretrained",
        type=Path,
        required=True,
        help="a run of main_supervised or main_fixmatch (there the EMA is tested), its folder or file",
    )
    a("--data_path", "--data_dir", type=Path, help="default: what the run was trained on; so are the next three")
    a("--dataset", choices=data.SETS)
    a("--input_size", "--img_size", type=positive)
    a("--tests", help="test folders; the first one is occluded")
    a("--val_dir", type=Path, help="folder of test images; default: the run's")
    a("--images", type=natural, default=0, help="so many test images, evenly spaced; 0: all")
    a("--cell", type=positive, default=16, help="side of a cell in pixels; a multiple of the autoencoder's patch")
    a("--mask_ratio", type=float, default=0.4, help="r of the diagnostics")
    add_mae_flags(p)
    a("--batch_size", type=positive, default=256)
    a("--seed", type=natural, default=0, help="of the random cells; keep it for everything that is compared")
    add_output_flag(p, "mra/occlusion", "checkpoint", names=["--output-dir"])
    add_machine_flags(p, workers=None)
    return p


def occlude(x: Tensor, order: Tensor, share: float, cell: int) -> Tensor:
    """Images [B, 3, H, H] whose first round(share * n) cells of `order` [B, n] (indices) are the mean colour, 0."""
    chosen = order[:, : round(share * order.shape[1])]
    hidden = torch.zeros(order.shape, device=x.device).scatter_(1, chosen, 1.0)
    return x.masked_fill(pixel_mask(hidden, cell) > 0, 0)


def area(curve: list[float]) -> float:
    """Mean height of the curve over q, by trapezoids: per cent as the accuracies are."""
    return (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)


@torch.no_grad()
def curves(
    network: nn.Module, images: ImageList, mae: MAE | None, args: argparse.Namespace, device: torch.device,
    stats: Any,
) -> dict[str, list[float]]:  # fmt: skip
    """{order: accuracy in per cent at each of SHARES}."""
    n = (args.input_size // args.cell) ** 2
    noise = torch.rand(len(images), n, generator=torch.Generator().manual_seed(args.seed))
    names = ["random"] + (["salient", "nonsalient"] if mae is not None else [])
    hits = torch.zeros(len(names), len(SHARES), dtype=torch.float64)
    operator = MRA(mae, stats=stats, compose="erase") if mae is not None else None  # for the change of statistics
    for start in range(0, len(images), args.batch_size):
        rows = range(start, min(start + args.batch_size, len(images)))
        x = torch.stack([images[i][0] for i in rows]).to(device)
        y = images.labels[rows.start : rows.stop].to(device)
        scores = [noise[rows.start : rows.stop].to(device)]
        if operator is not None:
            mae_input = x * operator.scale + operator.shift
            a = attention_scores(operator.mae, operator.mae.embed(mae_input), args.attn_source)
            g = operator.mae.grid
            a = F.avg_pool2d(a.view(len(x), 1, g, g), args.cell // operator.mae.p).flatten(1)  # [B, n]
            scores += [a, -a]
        clean = (network(follow(x, network)).argmax(1) == y).sum().cpu()
        for v, score in enumerate(scores):
            order = torch.argsort(score, dim=1, descending=True, stable=True)
            hits[v, 0] += clean
            for i, share in enumerate(SHARES[1:], 1):
                hidden = follow(occlude(x, order, share, args.cell), network)
                hits[v, i] += (network(hidden).argmax(1) == y).sum().cpu()
    return {name: (100 * row / len(images)).tolist() for name, row in zip(names, hits)}


@torch.no_grad()
def diagnose(
    mae: MAE, images: ImageList, args: argparse.Namespace, device: torch.device, stats: Any
) -> dict[str, float]:
    """What MRA does to these images, per cent but for errors and entropy.

    kept_foreground: share of the object's pixels inside kept patches (of random masks: 1 - r), kept_inverse and
    kept_random likewise; mse, mse_mean: squared error on erased patches of the reconstruction and of the image's mean
    colour; entropy of the attention over log L.
    """
    masks = data.foreground(images, args.input_size)
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}

    def add(name: str, value: Tensor, count: Tensor) -> None:
        totals[name] = totals.get(name, 0.0) + float(value.double().sum())
        counts[name] = counts.get(name, 0.0) + float(count.double().sum())

    generator = torch.Generator().manual_seed(args.seed)
    for start in range(0, len(images), args.batch_size):
        rows = range(start, min(start + args.batch_size, len(images)))
        x = torch.stack([images[i][0] for i in rows]).to(device)
        for strategy, name in (("attn", "foreground"), ("attn_inverse", "inverse"), ("random", "random")):
            operator = MRA(mae, args.mask_ratio, strategy, args.attn_source, stats=stats,
                           true_stats=args.denorm_with_true_stats)  # fmt: skip
            noise = operator.draw(len(x), generator)[0]
            parts = operator.parts(x, noise)
            erased = pixel_mask(parts.mask, mae.p)  # [B, 1, H, H]
            if masks is not None:
                objects = masks[rows.start : rows.stop, None].to(device)
                add(f"kept_{name}", objects * (1 - erased), objects)
            if strategy == "attn":
                mean = x.mean((2, 3), keepdim=True)
                area_erased = erased.expand_as(x)
                add("mse", (parts.reconstruction - x).square() * erased, area_erased)
                add("mse_mean", (mean - x).square() * erased, area_erased)
                entropy = score_entropy(parts.scores, args.attn_source, mae.size.enc[0])
                add("entropy", entropy, torch.ones_like(entropy))
    out = {name: total / max(1.0, counts[name]) for name, total in totals.items()}
    return {name: 100 * value if name.startswith("kept") else value for name, value in out.items()}


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, 0, device)
    if not 0 < args.mask_ratio < 1:
        raise UserError(f"--mask_ratio {args.mask_ratio}: must lie between 0 and 1")
    args.checkpoint = run_file(args.checkpoint)
    network, flags = nets.load_run(args.checkpoint, device)
    if "dataset" not in flags:
        raise UserError(f"{args.checkpoint}: of main_fewshot, whose novel classes it has no scores for; give a run of "
                        "main_supervised or main_fixmatch")  # fmt: skip
    moved = args.data_path is not None
    for name in INHERITED[moved:]:  # what was read, where it lay then, of which a new --data_path is in the place
        if getattr(args, name, None) is None:
            setattr(args, name, flags.get(name, "imagenet" if name == "mean_std" else ""))
    args.val_dir = Path(args.val_dir) if args.val_dir else None
    values: dict[str, Any] = {name: flags.get(name) for name in ("train_list", "val_list", "holdout")}
    values |= {
        "per_class": 0,
        "imbalance": 0,
        "labelled": Path(flags["labelled"]) if flags.get("labelled") and not moved else None,
    }
    sets = data.open_sets(argparse.Namespace(**{**vars(args), **values, "label_seed": 0, "cache": False}))
    if not sets.tests:
        raise UserError(f"{args.checkpoint}: its run had no test images; give --val_dir, a folder of them")
    name, images = next(iter(sets.tests.items()))
    if images.classes != flags["classes"]:
        raise UserError(f"{args.data_path}: its classes are not those that {args.checkpoint} was trained on")
    if args.input_size % args.cell:
        raise UserError(f"--cell {args.cell}: must divide the {args.input_size} pixels of an image")
    if args.images:
        count = min(args.images, len(images))
        images = subset(images, [i * len(images) // count for i in range(count)])
    images.transform = transforms.test_transform(args.input_size, args.mean_std)
    stats = transforms.STATS[args.mean_std]
    mae, about = load_mae(args, args.input_size, device) if args.mae_ckpt else (None, "none: random cells alone")
    if mae is not None and args.cell % mae.p:
        raise UserError(f"--cell {args.cell}: must be a multiple of the autoencoder's patch of {mae.p}")
    if mae is not None and mae.norm_pix_loss is not False and not args.denorm_with_true_stats:
        MRA(mae)  # says what is wrong, before the curves take their time
    print(
        f"{args.checkpoint}: {len(images)} images of {name}, cells of {args.cell} pixels; autoencoder {about}",
        flush=True,
    )

    result: dict[str, Any] = {}
    found = curves(network, images, mae, args, device, stats)
    for order, curve in found.items():
        result[f"occlusion_{order}"] = area(curve)
    if mae is not None:
        result |= diagnose(mae, images, args, device, stats)
    rounded = {order: [round(v, 3) for v in curve] for order, curve in found.items()}
    result |= {"shares": SHARES, "curves": rounded, "images": len(images), "mae_md5": args.mae_md5}
    write_result(args, result | {"minutes": flags["minutes"]})  # of the training
    return 0


if __name__ == "__main__":
    cli(main)
