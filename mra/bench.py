"""What MRA adds to a ResNet-50 step at the paper's sizes, for `python tests/bench.py mra`.

Images of 224 pixels, 196 patches, the light autoencoder, r = 0.4. The floor is the classifier's forward and backward
pass. The method is the operator for the batch: probe, selection, reconstruction, paste, under no_grad.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mra import nets
from mra.models_mae import MAE, SIZES
from mra.mra import MRA


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py: 256 images on a GPU, 4 on a CPU."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    batch = 256 if cuda else 4
    x = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    network = nets.build("resnet50", 1000).to(device).to(memory_format=torch.channels_last).train()

    def floor() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = network(x)
        F.cross_entropy(logits.float(), y).backward()

    def method(operator: MRA) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                operator(x, *operator.draw(batch, torch.Generator().manual_seed(0)))

        return run

    out = []
    for name, flags in (
        ("mae_mini_patch16", {}),
        ("mae_mini_patch16", {"strategy": "random"}),
        ("mae_mini_patch16", {"compose": "erase"}),
        ("mae_base_patch16", {}),
    ):
        mae = MAE(224, SIZES[name]).to(device)
        label = ", ".join([name, *(str(v) for v in flags.values())])
        operator = MRA(mae, **flags)  # type: ignore[arg-type]
        common = {"floor": floor, "items": batch, "note": f"{batch} images of 224"}
        out.append({"name": label, "method": method(operator), **common})
    return out
