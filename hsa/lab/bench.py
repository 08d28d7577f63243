"""What CsMl adds to its networks at the paper's sizes, for `python tests/bench.py hsa`.

32 anchors of 224 (the paper's share of a GPU), ResNet-50, queues of 65,536 x 128. The floor is what the paper demands
anyway: three forward and backward passes of the query encoder, two forward passes of the key encoder. The method is
everything else of a step: momentum update, CutMix, dealing and restoring the key images, norms, loss forward and
backward, enqueue. The refresh of the neighbours every five epochs is not part of a step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hsa import losses
from hsa.arch import build
from hsa.builder import CsMl
from hsa.cutmix import draw_box, paste
from shared_utils import distributed
from shared_utils.layout import memory_format, place

B, S, D, K = 32, 224, 128, 65536


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor runs on 2 anchors and is scaled to 32."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    form = memory_format(build("resnet50"), device)
    few = B if cuda else 2
    rng = np.random.Generator(np.random.PCG64(0))
    query, key, add_posq, add_posk = (
        torch.randn(B, 3, S, S, device=device).contiguous(memory_format=form) for _ in range(4)
    )
    raw = torch.randn(2, 3, B, D, device=device)  # levels, groups
    keys = torch.randn(2, 2, B, D, device=device)  # k_q and k_p, levels

    def floor(model: CsMl) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                out = [model.encoder_q.levels(x[:few]) for x in (query, add_posq, query)]
                with torch.no_grad():
                    model.encoder_k.levels(key[:few])
                    model.encoder_k.levels(add_posk[:few])
            torch.stack([z.float().square().mean() for levels in out for z in levels]).sum().backward()

        return run

    def method(model: CsMl) -> Callable[[], None]:
        def run() -> None:
            levels = len(model.queues)
            box = draw_box(S, S, 2.0, rng)
            paste(query, add_posq, box)
            model.update_key_encoder()
            k = []
            for images, out in zip((key, add_posk), keys):
                _, order = distributed.shuffle(images, torch.Generator().manual_seed(0))
                k.append([distributed.unshuffle(F.normalize(z, dim=1), order) for z in out[:levels]])
            total = []
            for z, k_q, k_p, queue in zip(raw, *k, model.queues):
                q, p, x = F.normalize(z.detach().requires_grad_(), dim=2)
                total.append(losses.release_loss(q, p, x, k_q, k_p, queue, 0.2, (0.5, 0.5), box[-1]))
            torch.stack(total).sum().backward()
            model.enqueue(k[0])

        return run

    note = f"{B} anchors of {S}, queue {K} x {D}" + ("" if cuda else f"; floor: {few} x {B // few}")
    out = []
    for name, head in (("release, one level", None), ("with level 3, mlp head", "mlp")):
        model = place(CsMl(build("resnet50"), D, K, inter_head=head), device).train()
        case = {"name": name, "floor": floor(model), "method": method(model), "floor_scale": B / few, "note": note}
        out.append(case | {"items": B})
    return out
