"""What BINGO adds to its networks at the paper's sizes, for `python tests/bench.py bingo`.

32 anchors of 224 (the paper's share of a GPU), student ResNet-18, teacher ResNet-50 or SwAV's ResNet-50x2, a queue of
65,536 x 128. The floor is what the paper demands anyway: three student forward and backward passes, two teacher
forward passes. The method is everything else of a step: CutMix, dealing and restoring the teacher's images, norms,
loss forward and backward, enqueue.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bingo import cutmix, losses
from bingo.arch import build, mlp_head
from bingo.builder import BINGO
from shared_utils import distributed
from shared_utils.layout import memory_format, place

B, S, D, K = 32, 224, 128, 65536


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor runs on 2 anchors and is scaled to 32."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    form = memory_format(build("resnet18"), device)
    few = B if cuda else 2
    rng = np.random.Generator(np.random.PCG64(0))
    query, key, add_posq, add_posk = (
        torch.randn(B, 3, S, S, device=device).contiguous(memory_format=form) for _ in range(4)
    )
    raw = torch.randn(3, B, D, device=device)
    keys = torch.randn(2, B, D, device=device)

    def model(teacher: str) -> BINGO:
        student, fixed = build("resnet18"), build(teacher)
        student.fc = mlp_head(student.num_features, D)
        fixed.fc = mlp_head(fixed.num_features, D, 8192 if teacher == "resnet50w2" else 2048, teacher == "resnet50w2")
        both = BINGO(student, fixed, D, K, teacher_bn="train")
        return place(both, device).train()

    def floor(both: BINGO) -> Callable[[], None]:
        def run() -> None:
            both.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                out = torch.stack([both.encoder_q(x[:few]) for x in (query, add_posq, query)])
                with torch.no_grad():
                    both.encoder_k(key[:few])
                    both.encoder_k(add_posk[:few])
            out.float().square().mean().backward()

        return run

    def method(both: BINGO) -> Callable[[], None]:
        def run() -> None:
            box = cutmix.draw_box(S, S, 2.0, rng)
            cutmix.paste(query, add_posq, box)
            k = []
            for images, out in zip((key, add_posk), keys):
                _, order = distributed.shuffle(images, torch.Generator().manual_seed(0))
                k.append(distributed.unshuffle(F.normalize(out, dim=1), order))
            q, p, x = (F.normalize(z.detach().requires_grad_(), dim=1) for z in raw)
            losses.release_loss(q, p, x, k[0], k[1], both.queue, 0.2, (0.5, 0.5), box[-1]).backward()
            both.enqueue(k[0])

        return run

    note = f"{B} anchors of {S}, student resnet18, queue {K} x {D}" + ("" if cuda else f"; floor: {few} x {B // few}")
    common = {"floor_scale": B / few, "items": B, "note": note}
    both = {name: model(name) for name in ("resnet50", "resnet50w2")}
    return [{"name": f"teacher {name}", "floor": floor(m), "method": method(m), **common} for name, m in both.items()]
