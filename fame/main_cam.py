"""Class-agnostic activation maps, the paper's visualisation: python -m fame.main_cam DATA --pretrained FILE

For the first clip of a few test videos a picture: frame, FAME's mask, and the activation over it. The map is the last
feature map's mean over channels, stretched to 0..1 and enlarged to the clip.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fame import augment
from fame.data import TestClips, add_data_flags, check_data_flags, open_videos
from fame.fame import make_mask, stretch
from fame.network import add_network_flags, resolve, trunk
from shared_utils import UserError, distributed
from shared_utils.flags import Parser, positive, runs_root
from shared_utils.pictures import make_grid, save_picture
from shared_utils.run import cli, seed_everything, set_threads


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="fame.main_cam", description=__doc__.splitlines()[0])
    add_data_flags(p)
    add_network_flags(p)
    p.add_argument("--count", type=positive, default=8, help="test videos, evenly taken from the list")
    p.add_argument("--beta", type=float, default=0.5, help="beta of the mask that is shown")
    p.add_argument("--out", type=Path, default=runs_root() / "fame/cam", help="folder of the pictures")
    p.add_argument("--device", default="auto")
    return p


@torch.no_grad()
def activation(model: torch.nn.Module, clip: Tensor) -> Tensor:
    """Activation maps [B, T, S, S] in 0..1 of normalised clips [B, 3, T, S, S]."""
    maps = model.maps(clip).float().mean(1, keepdim=True)  # type: ignore[operator]  # [B, 1, T', S', S']
    large = F.interpolate(maps, clip.shape[2:], mode="trilinear", align_corners=False)[:, 0]
    return stretch(large.flatten(2)).view_as(large)  # over all frames of a clip at once


def inside(heat: Tensor, mask: Tensor) -> Tensor:
    """Share [B] of the activation [B, T, S, S] that lies inside the masks [B, S, S]."""
    mean = heat.mean(1)
    return (mean * mask).sum((1, 2)) / mean.sum((1, 2)).clamp(min=1e-12)


def overlay(frames: Tensor, heat: Tensor) -> Tensor:
    """Frames [..., 3, S, S] in 0..1 with heat [..., S, S] in 0..1 over them, blue to red."""
    colour = torch.stack([(2 * heat - 0.5).clamp(0, 1), 1 - (2 * heat - 1).abs(), (1.5 - 2 * heat).clamp(0, 1)], -3)
    return 0.5 * frames + 0.5 * colour


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if not 0 <= args.beta <= 1:
        raise UserError(f"--beta {args.beta}: must lie in 0..1")
    device = distributed.init(args.device)
    seed_everything(0)
    set_threads(0, 0, device)
    resolve(args)
    check_data_flags(args)
    model, report = trunk(args, device)
    videos = open_videos(args, train=False)
    clips = TestClips(videos, args.crop_size, int(args.val_resize), 1)
    count = min(args.count, len(videos))
    chosen = [i * len(videos) // count for i in range(count)]
    x = torch.cat([clips[i]["clips"] for i in chosen]).to(device)  # [N, 3, T, S, S]
    mask = make_mask(x, beta=args.beta)  # [N, S, S]
    heat = activation(model, augment.normalise(x))  # [N, T, S, S]
    share = float(inside(heat, mask).mean())
    args.out.mkdir(parents=True, exist_ok=True)
    for n, i in enumerate(chosen):
        at = torch.linspace(0, x.shape[2] - 1, 4).round().long().to(device)
        frames = x[n][:, at].transpose(0, 1)  # [4, 3, S, S]
        rows = [frames, mask[n].float().expand_as(frames), overlay(frames, heat[n][at])]
        picture = (make_grid(torch.cat(rows).cpu(), nrow=4, padding=2) * 255).byte().permute(1, 2, 0).numpy()
        name = videos.classes[videos.labels[i]] if videos.classes else videos.videos[i].path.stem
        save_picture(Image.fromarray(picture), args.out / f"{n:02d}_{name}.png")
    print(f"fame/cam: {report}")
    print(f"  {100 * share:.1f} % of the activation lies inside masks of {100 * args.beta:.0f} % -> {args.out}/*.png")
    return 0


if __name__ == "__main__":
    cli(main)
