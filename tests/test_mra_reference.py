"""MAE against its release: numbers that facebookresearch/mae gave on fixed inputs; wrong variants miss them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mra import models_mae
from mra.models_mae import MAE, Size, patchify, unpatchify

FROZEN = json.loads((Path(__file__).parent / "reference" / "mra.json").read_text())
LIMIT = {"float32": 1e-6, "float64": 1e-12}
GRADIENTS = {"float32": 4e-6, "float64": 1e-12}  # float32: a backward pass rounds longer sums


def filled(mae: MAE) -> MAE:
    """Weights from a formula, so that they are the same everywhere; the positions stay."""
    for i, (name, p) in enumerate(sorted(mae.named_parameters())):
        if not p.requires_grad:
            continue
        wave = torch.from_numpy(np.sin(np.arange(p.numel()) * (i + 1.7) + i)).view(p.shape)
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.1 * wave
        else:
            p.data = wave / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1 * wave
    return mae


def told(t: Tensor) -> list[float]:
    """Sum, norm, a projection, the first and the last element."""
    g = t.detach().double().flatten()
    w = torch.from_numpy(np.cos(np.arange(g.numel(), dtype=np.float64)))
    return [float(v) for v in (g.sum(), g.norm(), g @ w, g[0], g[-1])]


def apart(found: list[float], expected: list[float], count: int, norm: float) -> float:
    """Largest difference, relative to `norm`; a sum of `count` elements can be sqrt(count) norms long."""
    scale = np.array([count, 1, count, 1, 1] if len(expected) == 5 else [1, count]) ** 0.5 * norm
    return float(np.max(np.abs(np.array(found) - expected) / scale))


def worst(case: dict[str, Any], change: Callable[[MAE], None] | None = None) -> dict[str, float]:
    """Differences from the release by name, relative to the norm of each tensor."""
    enc, dec = ((w[0], w[1], w[2]) for w in (case["enc"], case["dec"]))
    dtype = getattr(torch, case["dtype"])
    mae = filled(MAE(case["img"], Size(case["patch"], enc, dec), case["norm_pix_loss"])).to(dtype)
    if change:
        change(mae)
    rng = np.random.RandomState(case["img"])
    x = torch.from_numpy(rng.standard_normal((case["batch"], 3, case["img"], case["img"]))).to(dtype).requires_grad_()
    noise = torch.from_numpy(rng.random_sample((case["batch"], mae.patches)))
    loss, pred, mask = mae(x, noise, case["ratio"])
    loss.backward()
    assert [torch.nonzero(m).flatten().tolist() for m in mask] == case["erased"]
    off = {"loss": abs(float(loss.detach()) / case["loss"] - 1)}
    parts = {"pred": pred, "picture": unpatchify(pred, mae.p), "patches": patchify(x, mae.p)}
    for name, t in parts.items():
        off[name] = apart(told(t), case[name], t.numel(), case[name][1])
    for table, expected in zip((mae.pos_embed, mae.decoder_pos_embed), case["positions"]):
        off["positions"] = max(off.get("positions", 0), apart(told(table), expected, table.numel(), expected[1]))
    grads = {name: p.grad for name, p in mae.named_parameters() if p.requires_grad}
    assert set(grads) == set(case["grad"])
    # A bias of the keys has no gradient in exact arithmetic, and cls_token's is small: the whole is the scale.
    whole = max(norm for norm, _ in case["grad"].values())
    for name, expected in (*case["grad"].items(), ("images", case["images"])):
        g = x.grad if name == "images" else grads[name]
        assert g is not None
        off[name] = apart(told(g)[1:3], expected, g.numel(), expected[0] if name == "images" else whole)
    return off


def name_of(case: dict[str, Any]) -> str:
    return f"{case['dtype']}-{case['img']}px-{'normalised' if case['norm_pix_loss'] else 'raw'}"


@pytest.mark.parametrize("case", FROZEN["cases"], ids=name_of)
def test_forward_and_gradients_are_the_release_s(case) -> None:
    for name, off in worst(case).items():
        forward = name in ("loss", "pred", "picture", "patches", "positions")
        assert off < (LIMIT if forward else GRADIENTS)[case["dtype"]], name


def other_eps(mae: MAE) -> None:
    for module in mae.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def rows_first(mae: MAE) -> None:
    for table in (mae.pos_embed, mae.decoder_pos_embed):
        half = table.shape[2] // 2
        table.data = table.data.roll(half, 2)


def other_target(mae: MAE) -> None:
    mae.norm_pix_loss = not mae.norm_pix_loss


def one_head_less(mae: MAE) -> None:
    for module in mae.modules():
        if isinstance(module, models_mae.Attention) and module.heads > 1:
            module.heads -= 1 if module.heads == 2 else 2


@pytest.mark.parametrize("change", [other_eps, rows_first, other_target, one_head_less])
def test_wrong_networks_miss_the_frozen_values(change) -> None:
    for case in FROZEN["cases"]:
        if case["dtype"] == "float64":
            assert max(worst(case, change).values()) > 1e-5


def test_wrong_masks_miss_the_frozen_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release keeps the patches with the smallest noise."""
    right = models_mae.mask_from_scores
    monkeypatch.setattr(models_mae, "mask_from_scores", lambda x, scores, ratio: right(x, -scores, ratio))
    with pytest.raises(AssertionError):
        worst(FROZEN["cases"][0])
