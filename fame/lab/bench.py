"""What FAME adds to its network, for `python tests/bench.py fame`.

The floor is what the paper demands anyway: two forward and backward passes of I3D as query, two forward passes as key.
The method is mask and merge of one view, and for the whole step everything beside the networks: colours of both views,
momentum update, dealing and restoring the keys, logits and loss forward and backward, enqueue.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fame import augment
from fame.backbone import build
from fame.fame import Fame
from fame.moco.builder import MoCo, info_nce, passes
from shared_utils import distributed

D, K, T = 128, 65536, 16


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor runs on few clips and is scaled."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    model = MoCo(build("I3D", D), D, K).to(device).train()

    def case(name: str, b: int, size: int, whole: bool) -> dict[str, Any]:
        few = b if cuda else 2
        x = torch.rand(b, 3, T, size, size, device=device)
        u = torch.rand(b, augment.DRAWS)
        raw = torch.randn(4, b, D, device=device)
        merge, colours = Fame("full"), augment.Colours(size, 1.0)

        def floor() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                q = [model.encoder_q(x[:few]) for _ in range(2)]
                with torch.no_grad():
                    for _ in range(2):
                        model.encoder_k(x[:few])
            torch.stack([z.float().square().mean() for z in q]).sum().backward()

        def rest() -> None:
            merged, _ = merge(x, 0)
            views = [colours(view.clone(), u, [0, 1, 2, 3]) for view in (merged, x)]
            model.update_key_encoder()
            keys = []
            for view, k in zip(views, raw[2:]):
                _, order = distributed.shuffle(view, torch.Generator().manual_seed(0))
                keys.append(distributed.unshuffle(F.normalize(k, dim=1), order))
            q0, q1 = (F.normalize(z.detach().requires_grad_(), dim=1) for z in raw[:2])
            logits = passes(model, q0, q1, keys[0], keys[1])
            (info_nce(*logits[0]) + info_nce(*logits[1])).backward()
            model.enqueue(keys)

        method: Callable[[], Any] = rest if whole else lambda: merge(x, 0)
        note = f"{b} clips of {T} x {size} x {size}" + (f", queue {K} x {D}" if whole else "")
        note += "" if cuda else f"; floor: {few} x {b // few}"
        return {"name": name, "floor": floor, "method": method, "floor_scale": b / few, "items": b, "note": note}

    return [
        case("mask and merge, 112 px", 64, 112, False),
        case("mask and merge, a GPU's share of the release", 8, 224, False),
        case("everything beside the networks", 8, 224, True),
    ]
