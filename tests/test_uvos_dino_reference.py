"""uvos_dino against its release: numbers that the release's code gave on fixed inputs, and variants that miss them.

`uvos_dino.lab.compare_release` makes the comparison anew where there is a checkout of the release.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_utils import UserError
from shared_utils.lab import compare
from uvos_dino import losses, metrics
from uvos_dino.attention import Block
from uvos_dino.lab.compare_release import FILES, PACKAGES, URL, fixed_clip, fixed_masks, our_labels, queries_and_keys
from uvos_dino.vision_transformer import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]
FROZEN = json.loads((ROOT / "tests" / "reference" / "uvos_dino.json").read_text())


def waves(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that are the same on every machine: small waves, a frequency a tensor."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(module.named_parameters())):
            wave = torch.sin((0.37 + 0.11 * i) * torch.arange(p.numel(), dtype=torch.float64) + i)
            p.copy_(0.1 * wave.view_as(p) + (p.dim() == 1) * 0.5)
    return module.double().eval()


def points(x: torch.Tensor | None) -> list[float]:
    """Norm, a projection, the first and the last element."""
    assert x is not None  # for the type checker
    x = x.detach().double().flatten()
    w = torch.cos(torch.arange(x.numel(), dtype=torch.float64))
    return [float(v) for v in (x.norm(), (x * w).sum(), x[0], x[-1])]


def test_losses_and_gradients() -> None:
    z, A, P = fixed_clip(torch.float64)
    z.requires_grad_(), A.requires_grad_()
    sem, mot = losses.semantic(z, A, P), losses.motion(A, P, 3)
    (sem + mot).backward()
    assert [sem.item(), mot.item()] == pytest.approx(FROZEN["losses"], rel=1e-12)
    assert points(z.grad) == pytest.approx(FROZEN["grad_z"], rel=1e-9)
    assert points(A.grad) == pytest.approx(FROZEN["grad_A"], rel=1e-9, abs=1e-9)
    assert abs(losses.motion(A, P, 3, weights="uniform").item() - FROZEN["losses"][1]) > 1e-6


def test_block_and_encoder() -> None:
    x = torch.sin(torch.arange(2 * 15 * 64, dtype=torch.float64)).view(2, 15, 64)
    tokens, a = waves(Block(64, 8))(x)
    assert points(tokens) == pytest.approx(FROZEN["block"], rel=1e-9)
    assert points(a) == pytest.approx(FROZEN["block_attention"], rel=1e-9)
    images = torch.sin(0.01 * torch.arange(2 * 3 * 24 * 40, dtype=torch.float64)).view(2, 3, 24, 40)
    out = waves(VisionTransformer(8, 128, 3, 32))(images)
    for name, value in zip(("x", "cls", "attn", "k"), out):
        assert points(value) == pytest.approx(FROZEN[f"encoder_{name}"], rel=1e-9), name


@pytest.mark.parametrize("case", FROZEN["clusters"], ids=lambda case: f"{case['noise']}-{case['tau']}")
def test_labels(case: dict) -> None:
    q, k = queries_and_keys(11, 6, 10, case["noise"], case["seed"])
    labels = our_labels(q, k, case["tau"])
    assert torch.bincount(labels)[:12].tolist() == case["sizes"] and int(labels.max()) + 1 == case["number"]
    checksum = int((labels * (torch.arange(len(labels)) % 1009 + 1)).sum())
    assert checksum == case["checksum"]


@pytest.mark.parametrize("case", FROZEN["scores"], ids=lambda case: "-".join(map(str, case["size"])))
def test_scores(case: dict) -> None:
    labels, truth = fixed_masks(*case["size"])
    scores = metrics.matched(metrics.video_scores(labels, truth, *case["size"][3:]), "frame")
    for name, value in zip("JF", scores):
        assert np.sort(value, 0).ravel().tolist() == pytest.approx(case[name], abs=1e-9)


def test_scores_of_other_masks_are_others() -> None:
    case = FROZEN["scores"][0]
    labels, truth = fixed_masks(*case["size"])
    other = metrics.matched(metrics.video_scores(labels[:, ::-1], truth, *case["size"][3:]), "frame")
    assert np.sort(other.J, 0).ravel().tolist() != pytest.approx(case["J"], abs=1e-3)


def test_the_table_notices_a_difference() -> None:
    assert compare.row("x", torch.ones(3), torch.ones(3), 0.0).off == 0
    assert compare.row("x", torch.ones(3), torch.tensor([1.0, 1.0, 1.1]), 0.0).off == pytest.approx(0.1 / 1.1)
    assert compare.row("x", torch.ones(3), torch.ones(4), 0.0).off == float("inf")


def test_what_is_no_checkout_is_named(tmp_path: Path, python: str) -> None:
    with pytest.raises(UserError, match="no checkout of the release, src/eval_oneshot.py is missing; git clone"):
        compare.check(tmp_path, URL, FILES, PACKAGES)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = [python, "-m", "uvos_dino.lab.compare_release", "--release", str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no checkout" in done.stderr
