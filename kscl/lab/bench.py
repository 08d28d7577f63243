"""What K shots' subspaces add to their networks, for `python tests/bench.py kscl`.

256 images of 224, ResNet-50, D = 128, a queue of 65,536 subspaces. The floor is what K shots demand anyway: a forward
and backward pass of the query encoder and K forward passes of the key encoder (with --subspace_grad pos K more with
gradient). The method is everything else of a step: momentum update, dealing and restoring the K key batches, norms,
K x K eigen-decompositions, loss forward and backward, enqueue.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kscl.arch import build
from kscl.builder import KSCL
from kscl.losses import kscl_loss
from kscl.subspace import RankRule
from shared_utils import distributed
from shared_utils.layout import memory_format, place

N, S, D, M = 256, 224, 128, 65536


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor runs on 2 images and is scaled to 256."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    form = memory_format(build("resnet50"), device)
    few = N if cuda else 2
    images = torch.randn(N, 3, S, S, device=device).contiguous(memory_format=form)

    def floor(model: KSCL, shots: int, with_gradient: bool) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                out = [model.encoder_q(images[:few]) for _ in range(1 + shots * with_gradient)]
                with torch.no_grad():
                    for _ in range(shots):
                        model.encoder_k(images[:few])
            torch.stack([z.float().square().mean() for z in out]).sum().backward()

        return run

    def method(model: KSCL, shots: int, sim: str, with_gradient: bool) -> Callable[[], None]:
        raw = torch.randn(N, D, device=device)
        around = torch.randn(N, D, 1, device=device) + 0.5 * torch.randn(N, D, shots, device=device)
        full = torch.randn(M, D, shots, device=device)  # a queue as it is after training has begun
        model.queue.copy_(model.subspaces(F.normalize(full, dim=1))[0].U.permute(2, 1, 0))

        def run() -> None:
            model.update_key_encoder()
            keys = []
            for out in around.unbind(2):
                _, order = distributed.shuffle(images, torch.Generator().manual_seed(0))
                keys.append(distributed.unshuffle(F.normalize(out, dim=1), order))
            Z = torch.stack(keys, 2)
            stored, _ = model.subspaces(Z)
            q = F.normalize(raw.detach().requires_grad_(), dim=1)
            if with_gradient:
                own, spanning = model.subspaces(F.normalize(around.detach().requires_grad_(), dim=1))
                loss, _ = kscl_loss(q, own, model.queue, sim, 0.2, spanning)
            else:
                loss, _ = kscl_loss(q, stored, model.queue, sim, 0.2)
            loss.mean().backward()
            model.enqueue(stored)

        return run

    note = f"{N} images of {S}, queue {M} x {D}" + ("" if cuda else f"; floor: {few} x {N // few}")
    out = []
    for name, shots, sim, with_gradient in (
        ("K = 5, projection length", 5, "proj_len", False),
        ("K = 5, gradient through the subspace", 5, "proj_len", True),
        ("K = 1, cosine (MoCo v2)", 1, "signed", False),
    ):
        model = place(KSCL(build("resnet50"), RankRule(shots), D, M), device).train()
        out.append(
            {
                "name": name,
                "floor": floor(model, shots, with_gradient),
                "method": method(model, shots, sim, with_gradient),
                "floor_scale": N / few,
                "items": N,
                "note": note,
            }
        )
    return out
