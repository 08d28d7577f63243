"""What sage reads of its arms, what they cost, and what its bench times."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sage import arch
from sage.builder import Evaluator, SaGe
from sage.lab import arms
from sage.losses import WEIGHTS
from shared_utils import UserError

ROOT = Path(__file__).resolve().parents[1]
FACTORS = {f"{kind}_{name}": 40.0 for kind in ("linear", "knn20") for name in ("mean", "class", "hue", "texture")}
FACTORS |= {"linear_background": 20.0, "knn20_background": 25.0, "recon": 0.1, "recon_mean_image": 0.4}


def write(folder: Path, job: str, result: dict[str, float]) -> None:
    out = folder.with_name(f"{folder.name}-{job}")
    out.mkdir(parents=True)
    (out / "result.json").write_text(json.dumps(result))


def test_a_run_counts_when_its_evaluations_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "sage" / "seed0"
    folder.mkdir(parents=True)
    write(folder, "knn", {"knn1": 20.0, "knn20": 30.0, "knn200": 25.0})
    assert arms.read(folder) is None
    write(folder, "linear", {"linear": 35.0, "linear_best": 36.0})
    assert arms.read(folder) == {"knn1": 20.0, "knn20": 30.0, "knn200": 25.0, "linear": 35.0}
    table = arms.arms_of(tmp_path / "cifar10").table(arms.CIFAR.measured(tmp_path / "cifar10"))
    assert "| SaGe | 1 | 35.00 | 30.00 | 20.00 | 25.00 |" in table
    with pytest.raises(UserError, match="no finished arm"):
        arms.main([str(tmp_path / "none")])


def test_attributes_and_what_the_pixels_explain(tmp_path: Path, capsys) -> None:
    for arm, recon in (("byol", 0.2), ("sage", 0.1)):
        folder = tmp_path / "mini_attributes" / arm / "seed0"
        folder.mkdir(parents=True)
        assert arms.read(folder) is None
        write(folder, "attributes", {**FACTORS, "recon": recon})
        found = arms.read(folder) or {}
        assert set(found) == set(arms.ATTRIBUTES.metrics)
        assert found["explained"] == pytest.approx(100 * (1 - recon / 0.4))
    assert arms.main([str(tmp_path / "mini_attributes")]) == 0
    assert "| SaGe | 1 | 40.00 | 40.00 | 40.00 | 40.00 | 20.00 |" in capsys.readouterr().out


def test_every_arm_is_in_the_script() -> None:
    script = (ROOT / "sage/run_arms.sh").read_text()
    assert all(f"\n    {arm}) " in script for arm in arms.CIFAR.arms)
    assert {arm for pair in arms.CIFAR.pairs for arm in pair} == set(arms.CIFAR.arms)


def flops(mode: str, name: str, width: int, stem: str, size: int, hid: int, out: int, decoder_width: int) -> int:
    """Floating-point operations of the networks in a step of two images."""
    with torch.device("meta"):
        model = SaGe(arch.build(name, width, stem), hid, out)
        if mode == "sage":
            evaluator = arch.build(name, width, stem)
            decoder = arch.decoder_for(name, width, stem, size, decoder_width)
            model.add_generation(decoder, Evaluator(evaluator, arch.Neck(evaluator.num_features, hid, out)), WEIGHTS)
        x = torch.randn(2, 2, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(model.train()(x[0], x[1])[0].values())).sum().backward()
    return counter.get_total_flops()


def test_the_summed_budget_is_what_the_scripts_say() -> None:
    """A step of SaGe over one of BYOL, and one for the evaluator's own training."""
    small, paper = ("resnet10", 16, "cifar_pool", 32, 256, 64, 64), ("resnet50", 64, "imagenet", 224, 4096, 256, 0)
    ratio = {net[0]: flops("sage", *net) / flops("byol", *net) for net in (small, paper)}
    assert ratio["resnet10"] == pytest.approx(2.07, abs=0.005) and ratio["resnet50"] == pytest.approx(2.09, abs=0.005)
    text = (ROOT / "sage/run_arms.sh").read_text()
    for epochs, summed, net in ((5, 16, "resnet10"), (15, 47, "resnet10"), (300, 927, "resnet50")):
        assert f"summed={summed}" in text and 0 <= summed - epochs * (1 + ratio[net]) < 1
