"""What the regulariser adds to its networks at the paper's sizes, for `python tests/bench.py flat`.

16 images (CloserLookFewShot's batch). The floor is what the method demands anyway: forward and backward pass of the
encoder on the images and on their copies. The method is everything else: sampling, the 8 x 8 systems, the warp, the
copies' normalisation, the decoder and its loss, forward and backward. `x release`: sampling and warping image by image
with Pillow, as the AET and AVT loaders do, against ours for the whole batch; lower is faster.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from flat import aet, data
from flat.backbone import build
from shared_utils.layout import follow, place

B = 16


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor of the larger network runs on 2 images and is scaled to 16."""
    torch.manual_seed(0)
    out = []
    for model, s in (("Conv4", 84), ("ResNet18", 224), ("ResNet12", 84)):
        few = B if device.type == "cuda" or model == "Conv4" else 2
        fam = aet.Family("projective", s, aet.side_shift(s), 0.8, 1.2)
        encoder = place(build(model, s), device).train()
        decoder = aet.Decoder("linear", encoder.num_features, 8).to(device)
        pixels = torch.randint(256, (B, 3, s, s), device=device).to(torch.uint8)
        note = f"{B} images of {s} pixels" + ("" if few == B else f"; floor: {few} x {B // few}")
        common = {"floor": floor(encoder, pixels[:few]), "floor_scale": B / few, "items": B, "note": note}
        step = method(fam, decoder, pixels, encoder)
        out.append({"name": f"{model}, regulariser", "method": step, **common})
        if model == "Conv4":
            warp = {"method": sample_and_warp(fam, pixels), "release": pillow_loop(fam, pixels)}
            out.append({"name": f"{model}, sampling and warp alone", **warp, **common})
    return out


def floor(encoder: torch.nn.Module, pixels: torch.Tensor) -> Callable[[], None]:
    x = follow(data.normalise(pixels, "imagenet").repeat(2, 1, 1, 1), encoder)

    def run() -> None:
        encoder.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            features = encoder(x)
        features.float().square().mean().backward()

    return run


def sample_and_warp(fam: aet.Family, pixels: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        aet.warp(pixels, aet.sample(len(pixels), fam, torch.Generator().manual_seed(0)).theta)

    return run


def method(fam: aet.Family, decoder: aet.Decoder, pixels: torch.Tensor, encoder: Any) -> Callable[[], None]:
    mean, std = aet.normalisation(fam)
    raw = torch.randn(2, len(pixels), encoder.num_features, device=pixels.device)

    def run() -> None:
        draw = aet.sample(len(pixels), fam, torch.Generator().manual_seed(0))
        copies = data.normalise(aet.warp(pixels, draw.theta), "imagenet")
        follow(copies, encoder)
        target = ((draw.target - mean) / std).float().to(pixels.device)
        f, f_t = raw.clone().requires_grad_()
        decoder.zero_grad(set_to_none=True)
        aet.aet_loss(decoder(f, f_t)[0], target).backward()

    return run


def pillow_loop(fam: aet.Family, pixels: torch.Tensor) -> Callable[[], None]:
    """One image after the other: draw, solve, Pillow's transform."""
    images = [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in pixels]
    rng = np.random.Generator(np.random.PCG64(0))
    corners = aet.image_corners(fam.s).numpy()

    def run() -> None:
        for image in images:
            c = fam.s / 2 + 0.5
            p = np.roll((corners - c) * rng.uniform(0.8, 1.2) + c, rng.integers(4), 0)
            p = p + rng.integers(-fam.shift, fam.shift + 1, (4, 2))
            rows = []
            for (x, y), (u, v) in zip(p, corners):
                rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            theta = np.linalg.solve(np.array(rows), corners.ravel())
            image.transform(
                image.size, Image.Transform.PERSPECTIVE, theta.tolist(), Image.Resampling.BILINEAR, fillcolor=(128,) * 3
            )

    return run
