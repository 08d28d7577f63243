"""Exact nearest neighbours: against brute force in float64."""

import argparse
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError, neighbours
from shared_utils.flags import add_run_flags
from shared_utils.neighbours import search
from shared_utils.run import Run

ROOT = Path(__file__).resolve().parent.parent


def features(kind: str, n: int = 700, dim: int = 48) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=g)
    if kind == "clusters":
        x = torch.randn(-(-n // 7), dim, generator=g).repeat_interleave(7, 0)[:n] + 0.3 * x
    if kind == "positive":  # as after a ReLU: a large common part
        x = x.relu() + 0.5
    if kind == "tight":  # as of a network that was never trained
        x = 1 + 1e-3 * x
    return F.normalize(x, dim=1)


def brute(q: Tensor, bank: Tensor, k: int, exclude_self: bool) -> tuple[np.ndarray, np.ndarray]:
    s = q.double().numpy() @ bank.double().numpy().T
    if exclude_self:
        np.fill_diagonal(s, -np.inf)
    order = np.argsort(-s, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(s, order, 1), order


@pytest.mark.parametrize("kind", ["random", "clusters", "positive", "tight"])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_brute_force_agrees(kind, exclude_self):
    x = features(kind)
    sim, index = search(x, x, 6, exclude_self)
    expected_sim, expected = brute(x, x, 6, exclude_self)
    assert sim.dtype == torch.float32 and index.dtype == torch.int64
    np.testing.assert_allclose(sim, expected_sim, rtol=0, atol=1e-6)
    # where indices differ, the two are equally near to the last digits of float32
    s = x.double() @ x.double().T
    there = s.gather(1, index).numpy()
    np.testing.assert_allclose(there, expected_sim, rtol=0, atol=3e-7)
    assert kind == "tight" or (index.numpy() == expected).all()


def test_planted_neighbours_are_found():
    x = features("clusters")
    index = search(x, x, 6, exclude_self=True)[1]
    members = torch.arange(700).view(-1, 7)
    rows = members.repeat_interleave(7, 0)
    assert torch.equal(index.sort(1).values, rows[rows != torch.arange(700)[:, None]].view(700, 6))


def test_other_queries_than_the_bank():
    bank, q = features("random"), features("positive", 90)
    _, index = search(q, bank, 20)
    assert (index.numpy() == brute(q, bank, 20, False)[1]).all()
    # rows 100 to 189 of the bank, told by `first`
    _, index = search(bank[100:190], bank, 5, exclude_self=True, first=100)
    assert (index.numpy() == brute(bank, bank, 5, True)[1][100:190]).all()


def test_duplicates_stay_and_the_lower_index_comes_first():
    x = features("random", 300)
    x[[7, 250, 299]] = x[7].clone()
    sim, index = search(x, x, 3, exclude_self=True)
    assert index[7, :2].tolist() == [250, 299]
    assert index[250, :2].tolist() == [7, 299]
    assert index[299, :2].tolist() == [7, 250]
    assert not (index == torch.arange(300)[:, None]).any()
    same = torch.ones(20, 8)
    assert search(same, same, 4, exclude_self=True)[1][:2].tolist() == [[1, 2, 3, 4], [0, 2, 3, 4]]


@pytest.mark.parametrize("kind", ["random", "clusters", "positive"])
def test_the_chunk_size_does_not_matter(kind):
    x = features(kind)
    sim, index = search(x, x, 5, exclude_self=True)
    for chunk in (17, 333):
        other_sim, other = search(x, x, 5, exclude_self=True, chunk=chunk)
        assert torch.equal(sim, other_sim) and torch.equal(index, other)


@pytest.mark.parametrize("kind", ["random", "clusters", "positive"])
@pytest.mark.parametrize("block", [1, 5, 333, 699])
def test_the_blocks_of_the_bank_do_not_matter(kind, block):
    x = features(kind, 70 if block < 10 else 700)
    x[66] = x[3]  # equal products in different blocks
    sim, index = search(x, x, 6, exclude_self=True)
    other_sim, other = search(x, x, 6, exclude_self=True, block=block, chunk=200)
    assert torch.equal(sim, other_sim) and torch.equal(index, other)
    assert torch.equal(neighbours.neighbours(x, 6, torch.device("cpu"), block), index)
    q = features("random", 40)
    for a, b in zip(search(q, x, 20), search(q, x, 20, block=block)):
        assert torch.equal(a, b)


def test_products_in_memory_are_bounded(monkeypatch):
    x = features("random")
    whole = search(x, x, 5)[1]
    monkeypatch.setattr(neighbours, "SCORES", 9000)
    monkeypatch.setattr(neighbours, "PAIRS", 5000)
    candidates, seen = neighbours._candidates, []

    def noted(q, part, *args):
        seen.append(len(q) * len(part))
        return candidates(q, part, *args)

    monkeypatch.setattr(neighbours, "_candidates", noted)
    assert torch.equal(search(x, x, 5)[1], whole) and max(seen) == 12 * 700
    seen.clear()
    assert torch.equal(search(x, x, 5, block=100)[1], whole) and max(seen) == 90 * 100


def test_half_of_a_gpus_free_memory_holds_a_block(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000 * 2, 0))
    bank, gpu = torch.zeros(700, 20), torch.device("cuda")
    assert neighbours._rows_that_fit(bank, gpu) == 8000 // (4 * 20)
    assert neighbours._rows_that_fit(bank, torch.device("cpu")) == 700


def test_gpus_take_float32_factors_during_a_search_alone(monkeypatch):
    matmul, x, seen = torch.backends.cuda.matmul, features("random", 40), []

    class Noted(Tensor):
        def __matmul__(self, other):
            seen.append(matmul.allow_tf32)
            return self.as_subclass(Tensor) @ other.as_subclass(Tensor)

    before = matmul.allow_tf32
    try:
        for flag in (True, False):
            matmul.allow_tf32 = flag
            search(x.as_subclass(Noted), x, 3)
            assert matmul.allow_tf32 == flag
    finally:
        matmul.allow_tf32 = before
    assert seen == [False] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: sums of its matrix products")
@pytest.mark.parametrize("kind", ["random", "clusters", "positive", "tight"])
@pytest.mark.parametrize("block", [None, 1500])
def test_brute_force_agrees_on_a_gpu(kind, block, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x = features(kind, 4000, 1024)
    sim, index = search(x, x, 6, exclude_self=True, block=block, device=torch.device("cuda"))
    assert sim.device.type == index.device.type == "cpu"
    expected = brute(x, x, 6, True)[0]
    np.testing.assert_allclose(sim, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose((x.double() @ x.double().T).gather(1, index), expected, rtol=0, atol=1e-6)
    assert torch.equal(neighbours.neighbours(x, 6, torch.device("cuda"), block), index)


def test_shots_are_those_that_a_mask_for_each_class_picks():
    labels = torch.randint(9, (400,), generator=torch.Generator().manual_seed(0)) * 2  # not every number is a class
    labels[labels == 4] = 0
    labels[:3] = 4  # fewer than the shots
    for draw in range(3):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(draw))
        masks = [order[labels[order] == y][:10] for y in labels.unique()]
        assert torch.equal(neighbours.draw_shots(labels, 10, draw), torch.cat(masks))


def _accuracies(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = features("clusters"), torch.arange(700) // 70
    found, searched = neighbours.search, []

    def noted(queries, *args, **kwargs):
        searched.append(len(queries))
        return found(queries, *args, **kwargs)

    neighbours.search = noted
    numbers = [neighbours.knn_accuracy(x, y, x[:33], y[:33], 20), neighbours.few_shot(x, y, x[:33], y[:33], draws=2)]
    Path(folder, str(rank)).write_text(json.dumps([numbers, searched]))
    torch.distributed.destroy_process_group()


def test_two_processes_classify_a_share_each(tmp_path, python):
    x, y = features("clusters"), torch.arange(700) // 70
    expected = [neighbours.knn_accuracy(x, y, x[:33], y[:33], 20), neighbours.few_shot(x, y, x[:33], y[:33], draws=2)]
    code = (
        "import sys; from tests.test_shared_neighbours import _accuracies; _accuracies(int(sys.argv[1]), sys.argv[2])"
    )
    ranks = [subprocess.Popen([python, "-c", code, str(rank), str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert found == json.loads(json.dumps([[expected, [17] * 3], [expected, [16] * 3]]))


def test_few_images():
    x = features("random", 4)
    assert search(x, x, 3, exclude_self=True)[1].sort(1).values.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    with pytest.raises(UserError, match="4 neighbours need at least 5 images, there are 4"):
        search(x, x, 4, exclude_self=True)
    with pytest.raises(UserError):
        search(x, x, 0)


def told_to_stop(tmp_path, step: int) -> Run:
    """A run `step` steps after its last checkpoint, that has got SIGTERM."""
    p = argparse.ArgumentParser()
    add_run_flags(p, "x")
    run = Run(p.parse_args(["--output-dir", str(tmp_path / "run"), "--device", "cpu", "--threads", "1"]), "x", "y")
    run.track(state_dict=torch.nn.Linear(2, 2))
    run.preflight({})
    run.save()
    run.step += step
    os.kill(os.getpid(), signal.SIGTERM)
    return run


def test_a_search_in_a_run_that_is_told_to_stop_ends_it(tmp_path):
    x, before = features("random"), signal.getsignal(signal.SIGTERM)
    told_to_stop(tmp_path, 0)
    with pytest.raises(SystemExit) as end:
        search(x, x, 5)
    assert end.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    search(x, x, 5)  # of no run


def test_a_search_goes_on_where_steps_would_be_lost(tmp_path):
    x = features("random")
    run = told_to_stop(tmp_path, 1)
    search(x, x, 5)
    run.close()


def test_votes_at_a_small_temperature_do_not_overflow():
    index, sim, labels = torch.tensor([[0, 1, 2]]), torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([1, 0, 0])
    assert neighbours.vote(index, sim, labels, 1e-3).tolist() == [1]  # e^900 is more than a float holds
    assert neighbours.vote(index, sim, labels, 10.0).tolist() == [0]
