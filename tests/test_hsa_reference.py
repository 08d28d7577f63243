"""CsMl against its release: numbers that the release's code gave on fixed inputs, and wrong variants that miss them.

`hsa.lab.compare_release` makes the comparison anew where there is a checkout of the release.
"""

import json
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hsa import cutmix, losses, main_lincls
from hsa.builder import CsMl
from hsa.lab.compare_release import FILES, PACKAGES, URL, Tiny, fixed_inputs, legacy, main
from hsa.main_moco import learning_rate
from shared_utils import UserError, distributed, neighbours
from shared_utils.lab import compare

ROOT = Path(__file__).resolve().parents[1]
FROZEN = json.loads((ROOT / "tests" / "reference" / "hsa.json").read_text())
LIMIT = {"float32": 1e-6, "float64": 1e-12}

# --- the loss --------------------------------------------------------------------------------------------------------

Loss = Callable[[list[Tensor], dict[str, Any]], Tensor]


def weights(case: dict[str, Any]) -> tuple[float, float]:
    return (case["lam"][0], case["lam"][1]) if case["epoch"] > 10 else (1.0, 0.0)


def ours(x: list[Tensor], case: dict[str, Any]) -> Tensor:
    q, p, mix, k_q, k_p, queue = x
    return losses.release_loss(q, p, mix, k_q, k_p, queue, case["tau"], weights(case), case["mu"])


def measured(case: dict[str, Any], loss: Loss = ours) -> dict[str, list[float]]:
    """Loss and gradients with respect to q, p and x: sum, norm, a projection, the first and the last element."""
    x = fixed_inputs(case["n"], case["dim"], case["k"], getattr(torch, case["dtype"]))
    for z in x[:3]:
        z.requires_grad_()
    value = loss(x, case)
    value.backward()
    w = torch.from_numpy(np.cos(np.arange(x[0].numel(), dtype=np.float64))).view_as(x[0])
    out = {"loss": [value.item()]}
    for name, z in zip("qpx", x):
        g = z.grad.double()
        out[name] = [v.item() for v in (g.sum(), g.norm(), (g * w).sum(), g[0, 0], g[-1, -1])]
    return out


def worst(case: dict[str, Any], loss: Loss = ours) -> float:
    """Largest difference from the release, relative to the loss and to the norm of each gradient."""
    found = measured(case, loss)
    off = [abs(found["loss"][0] / case["loss"] - 1)]
    for name, expected in case["grad"].items():
        # a sum of n elements can be sqrt(n) norms long, and so can its rounding
        scale = np.array([case["n"] * case["dim"], 1, case["n"] * case["dim"], 1, 1]) ** 0.5 * expected[1]
        off.append(float(np.max(np.abs(np.array(found[name]) - expected) / scale)))
    return max(off)


def name_of(case: dict[str, Any]) -> str:
    return f"{case['dtype']}-K{case['k']}-epoch{case['epoch']}-tau{case['tau']}-mu{case['mu']}"


@pytest.mark.parametrize("case", FROZEN["loss"], ids=name_of)
def test_loss_and_gradients_are_the_release_s(case):
    assert worst(case) < LIMIT[case["dtype"]]


@pytest.mark.parametrize("case", FROZEN["loss"], ids=name_of)
def test_each_positive_and_the_mixed_group_are_the_release_s(case):
    q, p, x, k_q, k_p, queue = fixed_inputs(case["n"], case["dim"], case["k"], getattr(torch, case["dtype"]))
    keys = torch.stack([k_q, k_p], 1)
    each = [losses.info_nce(z, keys, queue, case["tau"]).mean(0).tolist() for z in (q, p, x)]
    np.testing.assert_allclose(each, case["each"], rtol=LIMIT[case["dtype"]])
    shares = losses.group_weights((1.0, 0.0), case["mu"], case["n"])
    mixed = losses.multi_positive(torch.stack([q, p, x]), keys, shares, queue, case["tau"])[2]
    np.testing.assert_allclose(mixed.item(), case["mix"], rtol=LIMIT[case["dtype"]])


def one_target(x: list[Tensor], case: dict[str, Any]) -> Tensor:
    return ours([*x[:4], x[3], x[5]], case)


def swapped_mu(x: list[Tensor], case: dict[str, Any]) -> Tensor:
    return ours(x, {**case, "mu": 1 - case["mu"]})


def no_warm_up(x: list[Tensor], case: dict[str, Any]) -> Tensor:
    return ours(x, {**case, "epoch": case["epoch"] + 1})


def short_warm_up(x: list[Tensor], case: dict[str, Any]) -> Tensor:
    return ours(x, {**case, "epoch": case["epoch"] - 1})


def one_denominator(x: list[Tensor], case: dict[str, Any]) -> Tensor:
    keys, lam = torch.stack(x[3:5], 1), weights(case)
    groups = []
    for z, pair in zip(x[:3], (lam, lam[::-1], (case["mu"], 1 - case["mu"]))):
        logits = torch.cat([torch.einsum("md,mpd->mp", z, keys), z @ x[5]], 1) / case["tau"]
        groups.append(-(logits.log_softmax(1)[:, :2] * torch.tensor(pair).to(z)).sum(1).mean())
    return torch.stack(groups).mean()


@pytest.mark.parametrize(
    ("wrong", "epoch"),
    [(one_target, 11), (swapped_mu, 11), (one_denominator, 11), (no_warm_up, 10), (short_warm_up, 11)],
)
def test_wrong_losses_miss_the_frozen_values(wrong, epoch):
    cases = [c for c in FROZEN["loss"] if c["epoch"] == epoch and c["dtype"] == "float64"]
    assert cases and all(worst(case, wrong) > 1e-5 for case in cases)


# --- CutMix, bags, schedule ------------------------------------------------------------------------------------------


def test_boxes_are_the_release_s():
    for case in FROZEN["cutmix"]:
        x1, y1, x2, y2, mu = cutmix.draw_box(case["height"], case["width"], 2.0, legacy(case["seed"]))
        assert ([y1, y2], [x1, x2]) == (case["rows"], case["columns"]) and mu == case["mu"]
    # what the release calls width is the number of rows: the other reading gives other boxes
    case = FROZEN["cutmix"][-1]
    assert case["height"] != case["width"]
    x1, y1, x2, y2, _ = cutmix.draw_box(case["width"], case["height"], 2.0, legacy(case["seed"]))
    assert ([x1, x2], [y1, y2]) != (case["rows"], case["columns"])


def test_mean_share_of_kept_pixels_is_the_release_s():
    rng = legacy(0)
    mus = [cutmix.draw_box(224, 224, 2.0, rng)[4] for _ in range(100_000)]
    assert np.mean(mus) == pytest.approx(FROZEN["mu_mean"], rel=1e-12)


def test_neighbours_are_the_release_s():
    features = np.random.RandomState(3).standard_normal((200, 16)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = neighbours.search(torch.from_numpy(features), torch.from_numpy(features), 5, exclude_self=True)[1].numpy()
    assert found[:4].tolist() == FROZEN["knn"]["first"] and found[-1].tolist() == FROZEN["knn"]["last"]
    assert int((found * np.arange(1, 1001).reshape(200, 5)).sum()) == FROZEN["knn"]["checksum"]


def test_learning_rates_are_the_release_s():
    base = dict(init_lr=0.03, end_epoch=200, schedule=[120, 160], lr_decay=0.1)
    for method, key in (("cos", "lr_cos"), ("step", "lr_step")):
        for epoch, expected in FROZEN["learning_rate"][key].items():
            args = Namespace(**base, decay_method=method)
            assert learning_rate(args, int(epoch)) == pytest.approx(expected, rel=1e-12)


def test_learning_rates_of_the_linear_evaluation_are_the_release_s():
    scripts = {"lin_step": dict(init_lr=30.0, end_epoch=100, schedule=[60, 80], lr_decay=0.1, decay_method="step")}
    for key, flags in scripts.items():
        for epoch, expected in FROZEN["learning_rate"][key].items():
            assert main_lincls.learning_rate(Namespace(**flags), int(epoch)) == pytest.approx(expected, rel=1e-12)


# --- four training steps ---------------------------------------------------------------------------------------------

ORDERS = [[3, 6, 0, 5, 7, 2, 4, 1], [1, 4, 7, 2, 0, 6, 5, 3]]  # of the two keys in every step


def filled(module: nn.Module, phase: float) -> nn.Module:
    """Weights from a formula, so that they are the same everywhere."""
    for i, (name, p) in enumerate(sorted(module.named_parameters())):
        wave = torch.from_numpy(np.sin(np.arange(p.numel()) * (i + 1.7) + phase)).view(p.shape)
        p.data = 1 + 0.1 * wave if name == "bn.weight" else wave / max(1, p[0].numel()) ** 0.5
    return module.double()


def checksum(x: Tensor) -> float:
    return float((x.flatten().double() * torch.arange(x.numel(), dtype=torch.float64).cos()).sum())


def four_steps(splits: int = 1, enqueue: str = "k_q", momentum: str = "before") -> tuple[list[float], CsMl]:
    """What main_moco does with a batch of 8, at the sizes of the frozen run; `splits` stand for its processes."""
    model = CsMl(Tiny(), 128, 24, 0.9)  # type: ignore[arg-type]
    for network, phase in ((model.encoder_q, 0.0), (model.encoder_k, 5.0)):
        distributed.convert_norm(filled(network, phase), "split", splits)
    model = model.double().train()
    queue = np.random.RandomState(9).standard_normal((128, 24))
    model.queue.copy_(torch.from_numpy(queue / np.linalg.norm(queue, axis=0)))
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    values = []
    for step in range(4):
        rng = np.random.RandomState(100 + step)
        query, key, add_posq, add_posk = (torch.from_numpy(rng.standard_normal((8, 3, 8, 8))) for _ in range(4))
        box = cutmix.draw_box(8, 8, 2.0, legacy(50 + step))
        q, p, x = model([query, add_posq, cutmix.paste(query, add_posq, box)])[0]
        if momentum == "before":
            model.update_key_encoder()
        k_q, k_p = (model.embed_keys(view, torch.Generator())[0] for view in (key, add_posk))
        if momentum == "after the keys":
            model.update_key_encoder()
        lam = (0.5, 0.5) if step else (1.0, 0.0)
        loss = losses.release_loss(q, p, x, k_q, k_p, model.queue, 0.2, lam, box[4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue([k_q if enqueue == "k_q" else k_p])
        values.append(loss.item())
    return values, model


def off(processes: int, **wrong: Any) -> float:
    """Largest difference of four steps from the release with so many processes: losses, queue, weights."""
    runs = [FROZEN["steps"][f"{processes}.{r}"] for r in range(processes)]
    values, model = four_steps(processes, **wrong)
    assert int(model.queue_ptr) == runs[0]["queue"][3] == 8
    expected = np.mean([run["loss"] for run in runs], axis=0)
    gaps = [np.max(np.abs(values / expected - 1))]
    gaps += [abs(checksum(model.queue) - runs[0]["queue"][0]), abs(float(model.queue[5, 7]) - runs[0]["queue"][2])]
    for name in ("encoder_q", "encoder_k"):
        state = getattr(model, name).state_dict()
        gaps.append(abs(int(state["bn.num_batches_tracked"]) - runs[0][name]["batches"]))
        for key, value in state.items():
            # running statistics: the release keeps those of the first process, we the mean of all
            if key in runs[0][name] and (processes == 1 or "running" not in key):
                gaps.append(abs(checksum(value) - runs[0][name][key]))
    return float(max(gaps))


@pytest.fixture
def dealt(monkeypatch):
    """Permutations as in the frozen runs."""
    calls = iter(ORDERS * 100)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(next(calls)))


@pytest.mark.parametrize("processes", [1, 2])
def test_training_steps_are_the_release_s(processes, dealt):
    assert off(processes) < 2e-6  # embeddings are float32


def test_wrong_steps_miss_the_frozen_values(dealt):
    assert off(1, enqueue="k_p") > 1e-4
    assert off(1, momentum="after the keys") > 1e-4
    assert off(1, momentum="never") > 1e-4


def test_another_deal_changes_the_keys_of_two_processes(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    assert off(2) > 1e-3


TWO = """
import json, sys, torch
from pathlib import Path
from shared_utils import distributed as d
torch.set_num_threads(1)
d.init("cpu")
torch.randperm = lambda n, generator: torch.tensor(json.loads(sys.argv[1]))
x = torch.arange(8.0)[4 * d.rank() : 4 * d.rank() + 4]
dealt, order = d.shuffle(x, torch.Generator())
found = [dealt.tolist(), order.argsort().tolist(), d.unshuffle(dealt, order).tolist()]
Path(sys.argv[2], str(d.rank())).write_text(json.dumps(found))
"""


def test_two_processes_deal_as_the_release_does(tmp_path, python):
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, python, "-c", TWO, json.dumps(ORDERS[0]), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert json.loads((tmp_path / str(rank)).read_text()) == FROZEN["steps"][f"2.{rank}"]["shuffle"]


# --- the comparison itself, without the release ----------------------------------------------------------------------


def test_comparison_names_what_is_wrong_with_a_path(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="main_moco.py is missing; git clone https://github.com/haohang96/CSML"):
        main(["--release", str(tmp_path)])
    (tmp_path / "moco").mkdir()
    for name in FILES[:-1]:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=FILES[-1]):
        compare.check(tmp_path, URL, FILES, PACKAGES)
    (tmp_path / FILES[-1]).write_text("")
    there = {"absl": None, "easydict": SimpleNamespace(), "faiss": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there[name])
    with pytest.raises(UserError, match="pip install absl-py faiss-cpu$"):
        compare.check(tmp_path, URL, FILES, PACKAGES)


def test_comparison_is_one_line_on_stderr_and_exit_code_2(tmp_path, python):
    command = [python, "-m", "hsa.lab.compare_release", "--release", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_a_row_of_the_comparison_sees_a_difference():
    assert compare.row("", 2.0, 2.0, 0).off == 0 and compare.row("", [1.0, 3.0], [1.0, 2.0], 0).off == 0.5
    assert compare.row("", torch.zeros(3), torch.zeros(2), 1).off == np.inf
