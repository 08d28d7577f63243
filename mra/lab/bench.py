"""What MRA adds to a ResNet-50 step at the paper's sizes, for `python tests/bench.py mra`.

Images of 224 pixels, 196 patches, the light autoencoder, r = 0.4. The floor is the classifier's forward and backward
pass. The method is the operator for the batch: probe, selection, reconstruction, paste, under no_grad; timed alone, a
GPU waits for the launch of each of its small kernels. `inside the step` is the operator and both passes in one go, as
training has them.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mra import nets
from mra.models_mae import MAE, SIZES
from mra.mra import MRA
from shared_utils.layout import follow, place


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py: 256 images on a GPU, 4 on a CPU."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    batch = 256 if cuda else 4
    y = torch.zeros(batch, dtype=torch.long, device=device)
    network = place(nets.build("resnet50", 1000), device).train()
    x = follow(torch.randn(batch, 3, 224, 224, device=device), network)

    def augmented(operator: MRA) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            return operator(x, *operator.draw(batch, torch.Generator().manual_seed(0)))

    def passes(images: Tensor) -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = network(follow(images, network))
        F.cross_entropy(logits.float(), y).backward()

    def whole(operator: MRA) -> None:
        passes(augmented(operator))

    out = []
    for name, kind, flags in (
        ("mae_mini_patch16", "method", {}),
        ("mae_mini_patch16", "step", {}),
        ("mae_mini_patch16", "method", {"strategy": "random"}),
        ("mae_mini_patch16", "method", {"compose": "erase"}),
        ("mae_base_patch16", "method", {}),
    ):
        operator = MRA(MAE(224, SIZES[name]).to(device), **flags)  # type: ignore[arg-type]
        label = ", ".join([name, *map(str, flags.values()), *["inside the step"] * (kind == "step")])
        timed = {"method": partial(augmented, operator), "step": partial(whole, operator)}[kind]
        common = {"floor": partial(passes, x), "items": batch, "note": f"{batch} images of 224"}
        out.append({"name": label, kind: timed, **common})
    return out
