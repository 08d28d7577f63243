"""What the losses add to the block at the paper's sizes, for `python tests/bench.py uvos_dino`.

One clip of 3 frames of 24 x 48 patches, the release's batch on a GPU. The floor is what the paper demands anyway: the
frozen encoder's forward pass and the block's forward and backward passes. The method is both losses with their
gradients to tokens and attention.

The clustering is timed against its own floor, the one product of all rows of a window with their logarithms.
"""

from typing import Any

import torch

from uvos_dino import clustering, losses
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.vision_transformer import build

B, T, H, W, C = 1, 3, 24, 48, 384
N = H * W


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py."""
    torch.manual_seed(0)
    model = AttEncoder(build("vit_small", 8)).to(device).train()
    frames = torch.randn(T, 3, 8 * H, 8 * W, device=device)
    tokens = torch.randn(B, T, 1 + N, C, device=device)
    logits = torch.randn(B, T * N, 16, device=device)
    A = (logits @ logits.transpose(1, 2)).softmax(-1).requires_grad_()
    z = torch.randn(B, T, N, C, device=device, requires_grad=True)
    P = torch.arange(0, N, N // 8, device=device)[:8]

    def floor() -> None:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.encoder.keys_and_cls(frames)
        out = model.attend(tokens)
        (out.z.square().mean() + out.A.square().mean()).backward()

    def method() -> None:
        A.grad = z.grad = None
        (losses.semantic(z, A, P) + losses.motion(A, P, T)).backward()

    # A window of the clustering: three frames against eight key frames, four regions.
    region = torch.arange(T * N, device=device) * 4 // (T * N)
    keys = torch.arange(8 * N, device=device) % 4
    rows = (2.0 * (region[:, None] == keys) + 0.1 * torch.randn(T * N, 8 * N, device=device)).softmax(-1)

    def product() -> None:
        rows @ rows.log().T

    def window() -> None:
        clustering.window_centroids(rows, 1.0)

    size = f"{T} frames of {H} x {W} patches"
    return [
        {"name": "losses", "floor": floor, "method": method, "items": B, "note": f"{B} clip, {size}, ViT-S/8"},
        {
            "name": "clustering of a window",
            "floor": product,
            "step": window,
            "items": 8,
            "note": f"{size}, 8 key frames",
        },
    ]
