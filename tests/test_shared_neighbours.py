"""Exact nearest neighbours: against brute force in float64, through bfloat16 and without it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError, neighbours
from shared_utils.neighbours import search


@pytest.fixture(params=["float32", "bfloat16"])
def coarse(request, monkeypatch):
    """Both ways to the candidates, also on a machine and at sizes where one of them is not worth it."""
    monkeypatch.setattr(neighbours, "_bfloat16_is_fast", lambda device: request.param == "bfloat16")
    monkeypatch.setattr(neighbours, "WORTH", 0)
    return request.param


def features(kind: str, n: int = 700, dim: int = 48) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=g)
    if kind == "clusters":
        x = torch.randn(n // 7, dim, generator=g).repeat_interleave(7, 0) + 0.3 * x
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
def test_brute_force_agrees(kind, exclude_self, coarse):
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


def test_planted_neighbours_are_found(coarse):
    x = features("clusters")
    index = search(x, x, 6, exclude_self=True)[1]
    members = torch.arange(700).view(-1, 7)
    rows = members.repeat_interleave(7, 0)
    assert torch.equal(index.sort(1).values, rows[rows != torch.arange(700)[:, None]].view(700, 6))


def test_other_queries_than_the_bank(coarse):
    bank, q = features("random"), features("positive", 90)
    _, index = search(q, bank, 20)
    assert (index.numpy() == brute(q, bank, 20, False)[1]).all()
    # rows 100 to 189 of the bank, told by `first`
    _, index = search(bank[100:190], bank, 5, exclude_self=True, first=100)
    assert (index.numpy() == brute(bank, bank, 5, True)[1][100:190]).all()


def test_duplicates_stay_and_the_lower_index_comes_first(coarse):
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
def test_the_chunk_size_does_not_matter(kind, coarse):
    x = features(kind)
    sim, index = search(x, x, 5, exclude_self=True)
    for chunk in (17, 333):
        other_sim, other = search(x, x, 5, exclude_self=True, chunk=chunk)
        assert torch.equal(sim, other_sim) and torch.equal(index, other)


def test_few_images(coarse):
    x = features("random", 4)
    assert search(x, x, 3, exclude_self=True)[1].sort(1).values.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    with pytest.raises(UserError, match="4 neighbours need at least 5 images, there are 4"):
        search(x, x, 4, exclude_self=True)
    with pytest.raises(UserError):
        search(x, x, 0)


def proven_share(x: Tensor, dtype: torch.dtype) -> float:
    return float(neighbours._Products(x, dtype).best(x, 5, torch.arange(len(x)))[2].float().mean())


def test_bfloat16_is_proven_where_it_helps_and_given_up_where_not():
    assert proven_share(features("random", 3000, 256), torch.bfloat16) > 0.9
    assert proven_share(features("tight"), torch.bfloat16) < 0.1


def test_bfloat16_taken_for_granted_gives_wrong_neighbours():
    x = features("tight")
    found = neighbours._Products(x, torch.bfloat16).best(x, 5, torch.arange(len(x)))[1]
    assert (found.numpy() != brute(x, x, 5, True)[1]).any()


@pytest.mark.parametrize("kind", ["random", "clusters", "positive", "tight"])
def test_products_are_never_further_off_than_stated(kind):
    x = features(kind, 420, 512)
    product = neighbours._Products(x, torch.bfloat16)
    low = x.bfloat16()
    exact = x.double() @ (x - product.mean).double().T
    rounded = (low @ product.low.T).double()
    off = (low.float() - x).norm(dim=1) * product.centred + low.float().norm(dim=1) * product.rounding
    off = off[:, None] + 512 * 2**-22 * product.length + rounded.abs() / 256
    assert ((exact - rounded).abs() <= off).all()
