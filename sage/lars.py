"""LARS as the release has it; which parameters it leaves alone.

Not timm's: that one keeps the learning rate outside the momentum buffer, so that a new rate acts on old gradients too.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

EXCLUDE = re.compile(r"(bn|gn)(\d+)?.(weight|bias)|bias")  # the release's names: no decay and no scaling


class LARS(torch.optim.Optimizer):
    """Layer-wise scaled momentum. For each tensor w with gradient g:

    local = eta |w| / (|g| + wd |w|), 0 where the denominator is 0; 1 in a group with `lars_exclude`
    d = (g + wd w) local lr;  buffer = momentum buffer + d;  w = w - buffer
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        lars_exclude: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, {**defaults, "lars_exclude": lars_exclude})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            d = grads
            if group["weight_decay"]:
                d = list(torch._foreach_add(d, params, alpha=group["weight_decay"]))
            if group["lars_exclude"]:
                d = list(torch._foreach_mul(d, group["lr"]))
            else:
                w = torch.stack(torch._foreach_norm(params))  # [P]
                g = torch.stack(torch._foreach_norm(grads))
                below = g + group["weight_decay"] * w
                local = torch.where(below > 0, group["eta"] * w / below.clamp_min(torch.finfo(w.dtype).tiny), 0.0)
                d = list(torch._foreach_mul(d, list((local * group["lr"]).unbind())))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, d)
            torch._foreach_sub_(params, buffers)


def parameter_groups(model: nn.Module, weight_decay: float, release: bool = False) -> list[dict[str, Any]]:
    """Two groups of `model`'s trained parameters: scaled and decayed, and excluded.

    Args:
        release: exclude by the release's pattern of names, which misses the scales of `downsample.1`; else everything
            of one dimension.
    """
    scaled: list[Tensor] = []
    excluded: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            out = bool(EXCLUDE.search(name)) if release else p.dim() == 1
            (excluded if out else scaled).append(p)
    return [
        {"params": scaled, "weight_decay": weight_decay, "lars_exclude": False},
        {"params": excluded, "weight_decay": 0.0, "lars_exclude": True},
    ]
