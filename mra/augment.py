"""Augmented files of your own images: python -m mra.augment FOLDER --mae_ckpt RUN --out DIR --count 4

Every image is cropped and flipped as for a classifier's training, then its background is painted anew. Sub-folders
(classes) and names stay; from two versions on a number follows the name. The autoencoder tells the size.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mra import data, transforms
from mra.mra import MRA, add_mra_flags, build
from shared_utils import UserError, distributed
from shared_utils import augment as pixels
from shared_utils.data import Keyed, flat_folder, mix_key
from shared_utils.flags import Parser, add_machine_flags, natural, positive
from shared_utils.run import cli, plain_errors, set_threads, worker_init

HOW: dict[str, dict[str, int]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": 1},
}  # the other kinds lose nothing


def get_parser() -> Parser:
    p = Parser(prog="mra.augment", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("folder", type=Path, help="images anywhere below it, of any sizes")
    a("--out", type=Path, default=Path("augmented"), help="folder of the files")
    a("--count", type=positive, default=1, help="versions of each image")
    data.add_holdout_flag(p)
    a("--input_size", "--img_size", type=positive, help="pixels of a side; default: the autoencoder's")
    a("--crop", choices=["resized", "padded", "none"], default="resized", help="before MRA: random resized crop and "
      "flip; flip and shift by up to an eighth; or the middle of the image as it is")  # fmt: skip
    a("--min_scale", type=float, default=0.5, help="least area of a resized crop")
    a("--policy", choices=list(transforms.POLICIES), default="none", help="colours and shapes, before MRA")
    a("--batch_size", type=positive, default=64, help="images at a time")
    a("--seed", type=natural, default=0, help="of crops, flips and random masks")
    add_mra_flags(p)
    add_machine_flags(p)
    return p


def target(out: Path, name: Path, version: int, count: int) -> Path:
    """Where a version of the image `name`, a path below the folder, is written."""
    return out / (name if count == 1 else name.with_name(f"{name.stem}_{version + 1}{name.suffix}"))


def draws(operator: MRA, seed: int, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """MRA's noise [B, L] and choice [B] for keys (version, index), whatever batch they are in."""
    each = [operator.draw(1, torch.Generator().manual_seed(mix_key(seed, *key) >> 1)) for key in keys]
    noise, use = zip(*each)
    return torch.cat(noise), torch.cat(use)


def save(image: Tensor, path: Path) -> None:
    """Write an image [3, H, H] in 0..1 as its name ends. UserError: it cannot be written."""
    array = (255 * image).round().byte().permute(1, 2, 0).numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.fromarray(array).save(path, kind, **HOW.get(kind, {}))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); give another --out") from None


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    if args.mae_ckpt is None:
        raise UserError("--mae_ckpt is missing: give an autoencoder, for example one of bash mra/run_pretrain.sh")
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min_scale {args.min_scale}: must lie above 0 and up to 1")
    if args.out.resolve().is_relative_to(args.folder.resolve()):
        raise UserError(f"--out {args.out}: lies in {args.folder}, so images would be read again; give another folder")
    same = args.crop == "none" and args.policy == "none" and args.mra_prob == 1 and args.mask_strategy != "random"
    if args.count > 1 and same:
        raise UserError(f"--count {args.count}: without crop and random mask all are equal; give --crop resized")
    if args.holdout:
        values = {"data_path": args.folder, "dataset": "folder", "holdout": args.holdout, "cache": False}
        images = data.open_unlabelled(argparse.Namespace(**values))
    else:
        images = flat_folder(args.folder)
    operator, about = build(args, args.input_size, device)
    assert operator is not None  # --mae_ckpt is given
    size = operator.mae.img_size
    images.transform = transforms.train_transform(size, args.crop, args.policy, min_scale=args.min_scale)
    keys = [(version, index) for index in range(len(images)) for version in range(args.count)]
    batches = [keys[first : first + args.batch_size] for first in range(0, len(keys), args.batch_size)]
    loader = DataLoader(Keyed(images, args.seed), batch_sampler=batches, num_workers=args.workers,
                        worker_init_fn=worker_init)  # fmt: skip
    bar = tqdm(batches, disable=not sys.stderr.isatty())
    for batch, (x, _, _) in zip(bar, plain_errors(loader), strict=True):
        x_hat = operator(x.to(device), *draws(operator, args.seed, batch))  # [B, 3, H, H]
        for (version, index), image in zip(batch, pixels.denormalise(x_hat).cpu()):
            save(image, target(args.out, images.path(index).relative_to(args.folder), version, args.count))
    print(f"{about}\n{len(keys)} images of {size} pixels -> {args.out}")
    return 0


if __name__ == "__main__":
    cli(main)
