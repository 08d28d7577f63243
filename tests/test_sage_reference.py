"""SaGe against its sources: numbers that the releases' code gave on fixed inputs, and wrong variants that miss them.

Decoder, losses and LARS of sunsmarterjie/SaGe, LARS of open-mmlab/OpenSelfSup. A tensor is told by its sum, norm,
projection on cos(0), cos(1), ..., first and last value.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sage import losses
from sage.arch import Backbone, Decoder, Neck
from sage.builder import Evaluator, SaGe
from sage.lars import LARS

FROZEN = json.loads((Path(__file__).parent / "reference" / "sage.json").read_text())
LIMIT = {"float32": 1e-6, "float64": 1e-12}


def fixed(shape: Sequence[int], salt: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in +-scale/2 that look random, equal everywhere."""
    x = (np.arange(int(np.prod(shape)), dtype=np.int64) * 7919 + 104729 * salt) % 10007
    return torch.from_numpy((x / 10007 - 0.5) * scale).reshape(tuple(shape)).to(dtype)


def fill(module: nn.Module) -> None:
    """Weights by their place in the order of names: of unit gain, scales about 1, shifts about 0."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(module.named_parameters())):
            if p.dim() > 1:
                p.copy_(fixed(p.shape, i + 1, (12 / p[0].numel()) ** 0.5, p.dtype))
            else:
                p.copy_(fixed(p.shape, i + 1, 0.4, p.dtype) + (1 if name.endswith("weight") else 0))


def told(x: Tensor) -> list[float]:
    x = x.detach().double().flatten()
    w = torch.cos(torch.arange(len(x), dtype=torch.float64))
    return [float(v) for v in (x.sum(), x.norm(), (x * w).sum(), x[0], x[-1])]


def off(found: Tensor, wanted: list[float]) -> float:
    """Largest difference of what is told, relative to the tensor's norm (which is the second number)."""
    return max(abs(a - b) for a, b in zip(told(found), wanted)) / wanted[1]


def test_decoder_is_the_release_s() -> None:
    """Its 62.7 million live weights, in training and in eval mode; images end in float32 here."""
    frozen = FROZEN["decoder"]
    decoder = Decoder().double().train()
    weights = dict(decoder.named_parameters())
    assert len(weights) == frozen["parameters"] and sum(p.numel() for p in weights.values()) == frozen["count"]
    fill(decoder)
    e = fixed((2, 2048, 7, 7), 99, 2.0).requires_grad_()
    image = decoder(e)
    assert off(image, frozen["image"]) < 1e-6
    (image.double() * fixed(image.shape, 77)).sum().backward()
    assert e.grad is not None and off(e.grad, frozen["input"]) < 1e-6
    for name, wanted in frozen["gradients"].items():
        gradient = weights[name].grad
        assert gradient is not None and off(gradient, wanted) < 1e-6, name
    buffers = dict(decoder.named_buffers())
    for name, wanted in frozen["statistics"].items():
        assert off(buffers[name], wanted) < 1e-12, name
    with torch.no_grad():
        assert off(decoder.eval()(e), frozen["eval"]) < 1e-6
        decoder.layer4.train()  # batch statistics make another image
        assert off(decoder(e), frozen["eval"]) > 1e-3


@pytest.fixture(scope="module")
def networks() -> tuple[SaGe, dict[str, Tensor], list[Tensor]]:
    """Small networks with the release's map sides 28, 14 and 7, their losses, and the recovered images."""
    net = SaGe(Backbone("resnet10", 4), 16, 8)
    evaluator = Evaluator(Backbone("resnet10", 4), Neck(32, 16, 8))
    fill(net)
    fill(evaluator)
    net.double().train()
    evaluator.double().eval()
    with torch.no_grad():
        for p in net.target_net.parameters():
            p.mul_(0.9)
    x = [fixed((3, 3, 224, 224), s, 2.0) for s in (1, 2)]
    recovered = [fixed((3, 3, 224, 224), s, 1.6).requires_grad_() for s in (3, 4)]
    terms, _ = net(*x)
    net.add_generation(nn.Identity(), evaluator, losses.WEIGHTS)  # type: ignore[arg-type]
    terms |= net.generation(x, recovered)
    torch.stack([v.double() for v in terms.values()]).sum().backward()
    return net, terms, recovered


def test_terms_of_the_loss_are_the_release_s(networks: tuple[SaGe, dict[str, Tensor], list[Tensor]]) -> None:
    """Names, weights, levels and gradients; losses are float32 here, the release's ran in float64."""
    net, terms, recovered = networks
    assert set(terms) == set(FROZEN["losses"]["terms"])
    for name, wanted in FROZEN["losses"]["terms"].items():
        assert terms[name].item() == pytest.approx(wanted, rel=1e-6), name
    for image, wanted in zip(recovered, FROZEN["losses"]["recovered"], strict=True):
        assert image.grad is not None and off(image.grad, wanted) < 1e-6
    weights = dict(net.named_parameters())
    for name, wanted in FROZEN["losses"]["gradients"].items():
        gradient = weights[name].grad
        assert gradient is not None and off(gradient, wanted) < 1e-6, name


def test_terms_in_another_order_would_not_be(networks: tuple[SaGe, dict[str, Tensor], list[Tensor]]) -> None:
    """The levels differ by far more than the limit, so a swap is seen."""
    values = sorted(float(v) for v in networks[1].values())
    assert all(b > 1.2 * a for a, b in zip(values, values[1:]))


def steps(kind: type[torch.optim.Optimizer], dtype: torch.dtype) -> list[list[Tensor]]:
    """Four tensors (two excluded) after each of four updates at changing rates."""
    params = [nn.Parameter(fixed(s, i + 1, 1.0, dtype)) for i, s in enumerate([(6, 5), (4, 3, 3, 3), (7,), (5,)])]
    groups: list[dict[str, Any]] = [
        {"params": params[:2], "weight_decay": 1e-2},
        {"params": params[2:], "weight_decay": 0.0, "lars_exclude": True},
    ]
    optimizer = kind(groups, lr=4.8, momentum=0.9, eta=0.001)  # type: ignore[call-arg]
    out = []
    for k, lr in enumerate((0.5, 4.8, 4.0, 0.3)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, p in enumerate(params):
            p.grad = fixed(p.shape, 50 + 10 * k + i, 0.2 * (k + 1), dtype)
        optimizer.step()
        out.append([p.detach().clone() for p in params])
    return out


def worst(kind: type[torch.optim.Optimizer], dtype: str) -> float:
    rows = zip(steps(kind, getattr(torch, dtype)), FROZEN["lars"][dtype], strict=True)
    return max(off(p, wanted) for row, told_row in rows for p, wanted in zip(row, told_row, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lars_is_that_of_both_releases(dtype: str) -> None:
    assert worst(LARS, dtype) < LIMIT[dtype]


class RateOutside(LARS):
    """As timm's: the momentum buffer holds gradients, and the rate of the day multiplies all of them."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        rates = [group["lr"] for group in self.param_groups]
        before = [[p.clone() for p in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 1.0
        super().step()
        for group, rate, old in zip(self.param_groups, rates, before):
            group["lr"] = rate
            for p, was in zip(group["params"], old):
                p.copy_(was + rate * (p - was))


class DecayBehind(LARS):
    """The local rate of the gradient alone, without the decay in the denominator."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad + group["weight_decay"] * p
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay


@pytest.mark.parametrize("kind", [RateOutside, DecayBehind])
def test_other_forms_of_lars_miss_the_numbers(kind: type[LARS]) -> None:
    assert worst(kind, "float64") > 1e-5
