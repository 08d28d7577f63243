"""One picture of what MRA does: python -m mra.visualize --mae_ckpt MAE.pth --data_path DIR --out mra.png

Rows: input, attention (bright: kept), mask, the decoder's image, the composite x_hat.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mra import data, transforms
from mra.mra import MRA, Parts, add_mra_flags, build, pixel_mask
from shared_utils import UserError, augment, distributed
from shared_utils.data import flat_folder
from shared_utils.flags import Parser, add_machine_flags, natural, positive
from shared_utils.pictures import make_grid, save_picture
from shared_utils.run import cli, set_threads

LARGEST = 2**28  # pixels of the picture


def get_parser() -> Parser:
    p = Parser(prog="mra.visualize", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    data.add_data_flags(p)
    add_mra_flags(p)
    a("--count", type=positive, default=8, help="images, evenly spaced")
    a("--zoom", type=positive, default=2, help="pixels of the picture for one of the image")
    a("--seed", type=natural, default=0, help="of random masks")
    a("--out", type=Path, default=Path("mra.png"), help="file of the picture")
    add_machine_flags(p, workers=None)
    return p


def rows(x: Tensor, parts: Parts, operator: MRA) -> list[Tensor]:
    """Pictures [B, 3, H, H] in 0..1: input, attention, what is kept, reconstruction, composite."""
    a = parts.scores
    low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
    heat = pixel_mask((a - low) / (high - low).clamp_min(1e-12), operator.mae.p).expand_as(x)
    shown = augment.denormalise(x)
    kept = shown * (1 - pixel_mask(parts.mask, operator.mae.p)) + 0.5 * pixel_mask(parts.mask, operator.mae.p)
    return [shown, heat, kept, augment.denormalise(parts.reconstruction), augment.denormalise(parts.out)]


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, 0, device)
    if args.mae_ckpt is None:
        raise UserError("--mae_ckpt is missing: give an autoencoder, for example one of bash mra/run_pretrain.sh")
    if args.dataset == "folder":
        images = flat_folder(args.data_path)
    else:
        images = data.open_unlabelled(argparse.Namespace(**vars(args), holdout=0.0))
    count = min(args.count, len(images))
    operator, about = build(args, args.input_size, device)
    assert operator is not None  # --mae_ckpt is given
    size = operator.mae.img_size
    if 5 * count * (size * args.zoom) ** 2 > LARGEST:
        raise UserError(f"--count {count} --zoom {args.zoom}: a picture that large; give smaller numbers")
    images.transform = transforms.test_transform(size)
    x = torch.stack([images[i * len(images) // count][0] for i in range(count)]).to(device)
    noise, _ = operator.draw(count, torch.Generator().manual_seed(args.seed))
    picture = make_grid(torch.cat(rows(x, operator.parts(x, noise), operator)).cpu(), nrow=count, padding=2)
    array = (255 * picture).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image = image.resize((image.width * args.zoom, image.height * args.zoom), Image.Resampling.NEAREST)
    save_picture(image, args.out)
    print(f"{about}\nrows: input, attention, kept patches, reconstruction, composite -> {args.out}")
    return 0


if __name__ == "__main__":
    cli(main)
