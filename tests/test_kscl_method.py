"""The method of kscl: subspaces, their ranks and derivatives, the match of a query, the loss, the queue.

Letters are those of the properties that the method must have: a, b, ... p.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kscl import arch, losses
from kscl.builder import KSCL, ReleaseKeys
from kscl.main_kscl import initial_loss
from kscl.subspace import RankRule, Subspaces, configure, match, own_match
from shared_utils import UserError, checkpoint, distributed

ALL = RankRule(9, energy=1.0)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors along the last axis."""
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    ).to(dtype)


def keys(n: int, d: int, k: int, seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """K unit keys of each image [N, D, K], around a direction of its own."""
    return F.normalize(unit(n, 1, d, seed=seed) + spread * unit(n, k, d, seed=seed + 50), dim=2).mT.to(dtype)


def equicorrelated(k: int, rho: float, d: int = 16, seed: int = 0) -> Tensor:
    """K unit keys [1, D, K] with cosine rho between any two."""
    basis = torch.linalg.qr(torch.randn(d, k + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
        0
    ]
    return (math.sqrt(rho) * basis[:, :1] + math.sqrt(1 - rho) * basis[:, 1:])[None]


def projector(own: Subspaces) -> Tensor:
    return own.U @ own.U.mT


def stored(m: int, d: int, k: int, rule: RankRule, seed: int = 7) -> Tensor:
    """A queue [P, D, M]."""
    return configure(keys(m, d, k, seed=seed), rule).U.permute(2, 1, 0).contiguous()


def slow_similarity(q: Tensor, U: Tensor, sim: str) -> Tensor:
    """Of q [D] with basis U [D, P]: one query, one subspace, by the projection itself."""
    projection = U @ (U.T @ q)
    if sim == "proj_len_sq":
        return projection @ q
    length = projection.norm()
    return -length if sim == "signed" and q @ U[:, 0] < 0 else length


def slow_loss(q: Tensor, U: Tensor, queue: Tensor, sim: str, tau: float) -> Tensor:
    """[N], by a loop over queries and stored subspaces, and cross entropy with target 0."""
    out = []
    for own, basis in zip(q, U):
        others = [slow_similarity(own, queue[:, :, m].T, sim) for m in range(queue.shape[2])]
        logits = torch.stack([slow_similarity(own, basis, sim), *others]) / tau
        out.append(F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long)))
    return torch.stack(out)


# --- subspaces -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), spread=st.sampled_from([0.05, 0.5, 3.0]), energy=st.sampled_from([0.5, 0.9, 1.0]),
       seed=st.integers(0, 99))  # fmt: skip
def test_bases_are_orthonormal_and_projectors_idempotent(k, spread, energy, seed):
    Z = keys(4, 12, k, seed, spread)
    own = configure(Z, RankRule(k, energy=energy))
    P = projector(own)
    torch.testing.assert_close(own.l.sum(1), torch.full((4,), float(k), dtype=torch.float64))
    for n, r in enumerate(own.rank.tolist()):
        torch.testing.assert_close(own.U[n, :, :r].T @ own.U[n, :, :r], torch.eye(r, dtype=torch.float64))
        assert not own.U[n, :, r:].any() and P[n].trace().item() == pytest.approx(r)
        left, s, _ = torch.linalg.svd(Z[n], full_matrices=False)
        torch.testing.assert_close(P[n], left[:, :r] @ left[:, :r].T, rtol=0, atol=1e-8)  # the SVD's projector
        torch.testing.assert_close(own.l[n], s.square(), rtol=0, atol=1e-12)
        assert r == 1 + int((s.square().cumsum(0) / k < energy - 1e-6).sum())
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P, P.mT)


def test_float32_keys_keep_right_angles_where_an_eigenvalue_is_small():
    Z = keys(64, 128, 5, spread=0.02, dtype=torch.float32)  # the last eigenvalue is 1e-4 of the first
    own = configure(Z, RankRule(5, energy=1.0))
    assert own.U.dtype == torch.float32 and (own.l[:, 4] / own.l[:, 0]).max() < 1e-3
    torch.testing.assert_close(own.U.mT @ own.U, torch.eye(5).expand(64, 5, 5), rtol=0, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(configure(Z, RankRule(5, energy=1.0)).U, own.U)


def test_a_match_is_1_within_the_span_and_0_across_it():
    Z = keys(5, 12, 3)
    own = configure(Z, ALL)
    inside = F.normalize((Z * torch.tensor([0.3, -2.0, 0.7])).sum(2), dim=1)
    across = F.normalize(unit(5, 12, seed=3) - torch.einsum("nde,ne->nd", projector(own), unit(5, 12, seed=3)), dim=1)
    anywhere = own_match(unit(5, 12, seed=4), own, "proj_len")
    torch.testing.assert_close(own_match(inside, own, "proj_len"), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(
        own_match(across, own, "proj_len"), torch.zeros(5, dtype=torch.float64), atol=2e-6, rtol=0
    )
    assert ((0 < anywhere) & (anywhere < 1)).all()


@pytest.mark.parametrize("sim", ["proj_len", "proj_len_sq", "signed"])
def test_order_rotation_and_signs_change_nothing(sim):
    Z, q, queue = keys(4, 12, 4), unit(4, 12, seed=2), stored(9, 12, 4, RankRule(4))
    rule = RankRule(4)
    base, _ = losses.kscl_loss(q, configure(Z, rule), queue, sim, 0.2)
    swapped, _ = losses.kscl_loss(q, configure(Z[:, :, [2, 0, 3, 1]], rule), queue, sim, 0.2)
    torch.testing.assert_close(swapped, base)
    own, signs = configure(Z, rule), torch.tensor([1.0, -1.0, -1.0, 1.0])
    flipped, _ = losses.kscl_loss(q, own._replace(U=own.U * signs), queue * signs[:, None, None], sim, 0.2)
    torch.testing.assert_close(flipped, base)
    R = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    turned = configure(Z @ R, rule)
    torch.testing.assert_close(projector(turned), projector(own))
    if sim != "signed":  # a rotation moves the mean key, which orients the first direction
        torch.testing.assert_close(losses.kscl_loss(q, turned, queue, sim, 0.2)[0], base)


def test_the_first_direction_points_to_the_keys():
    own = configure(keys(50, 12, 4), ALL)
    assert (torch.einsum("nd,nd->n", own.U[:, :, 0], keys(50, 12, 4).mean(2)) > 0).all()


def test_more_keys_than_one_decomposition_takes():
    Z = keys(32768 + 9, 3, 2)
    all_at_once, last = configure(Z, ALL), configure(Z[-20:], ALL)
    assert len(all_at_once.U) == len(Z) and torch.equal(all_at_once.rank[-20:], last.rank)
    assert torch.allclose(all_at_once.U[-20:] @ all_at_once.U[-20:].mT, last.U @ last.U.mT, atol=1e-6)


def test_shots_and_energy_never_lower_a_match():
    Z, q = keys(20, 16, 6, spread=1.0), unit(20, 16, seed=9)
    by_shots = torch.stack([own_match(q, configure(Z[:, :, :k], ALL), "proj_len") for k in range(1, 7)])
    assert (by_shots.diff(dim=0) > 0).all()
    owns = [configure(Z, RankRule(6, energy=e)) for e in (0.3, 0.5, 0.7, 0.9, 1.0)]
    ranks = torch.stack([own.rank for own in owns])
    matches = torch.stack([own_match(q, own, "proj_len") for own in owns])
    assert (ranks.diff(dim=0) >= 0).all() and (ranks[-1] > ranks[0]).all()
    assert (matches.diff(dim=0) > -1e-12).all()


@pytest.mark.parametrize("rule", [RankRule(5, energy=e) for e in (0.1, 0.9, 1.0)] + [RankRule(3, "fixed", rank=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_keys_span_one_direction(rule, dtype):
    z, q = unit(6, 12, dtype=dtype), unit(6, 12, seed=1, dtype=dtype).requires_grad_()
    own = configure(z[:, :, None].repeat(1, 1, 5), rule)
    assert own.rank.tolist() == [1] * 6 and own.U.isfinite().all()
    s = own_match(q, own, "proj_len")
    torch.testing.assert_close(s, (q * z).sum(1).abs(), rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(s.sum(), q)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("energy", "expected"), [(0.9, (5, 4, 3, 1, 1)), (0.8, (4, 3, 1, 1, 1)), (0.4, (1, 1, 1, 1, 1))]
)
def test_ranks_of_equicorrelated_keys(energy, expected):
    rhos = (0.3, 0.5, 0.8, 0.9, 0.95)
    for rho, rank in zip(rhos, expected):
        own = configure(equicorrelated(5, rho), RankRule(5, energy=energy))
        torch.testing.assert_close(own.l[0], torch.tensor([1 + 4 * rho] + [1 - rho] * 4, dtype=torch.float64))
        assert own.rank.item() == rank == 1 + math.ceil(max(0, (energy * 5 - 1 - 4 * rho) / (1 - rho)) - 1e-9)


def test_one_direction_of_equicorrelated_keys_is_their_mean():
    Z = equicorrelated(5, 0.4)
    mean = F.normalize(Z.mean(2), dim=1)
    own = configure(Z, RankRule(1, "fixed", rank=1))
    torch.testing.assert_close(own.U[:, :, 0], mean)
    assert own.U.shape == (1, 16, 1)


def test_rank_rules_and_room():
    l = torch.tensor([[3.0, 1.0, 0.6, 0.4], [4.0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)  # noqa: E741
    for rule, expected in (
        (RankRule(4), [3, 1, 0]), (RankRule(2), [2, 1, 0]), (RankRule(4, energy=0.8), [2, 1, 0]),
        (RankRule(4, "relative", rel_gamma=0.19), [3, 1, 0]), (RankRule(4, "relative", rel_gamma=0.5), [1, 1, 0]),
        (RankRule(4, "fixed", rank=2), [2, 1, 0]), (RankRule(1, "fixed", rank=2), [1, 1, 0]),
    ):  # fmt: skip
        assert rule.ranks(l).tolist() == expected, rule
    equal = torch.tensor([[2.0, 2.0, 2.0, 0.5]])  # as large as the largest is at least as large
    assert RankRule(4, "relative", rel_gamma=1.0).ranks(equal).tolist() == [3]


def test_centring_removes_the_mean_direction():
    model = KSCL(arch.build("resnet10", 4), RankRule(2, energy=1.0), 12, 8, center=True)
    Z = keys(5, 12, 3)
    own, centred = model.subspaces(Z)
    torch.testing.assert_close(centred.mean(2), torch.zeros(5, 12, dtype=torch.float64))
    assert own.rank.tolist() == [2] * 5
    mean = F.normalize(Z.mean(2), dim=1)
    assert (own_match(mean, own, "proj_len") < own_match(mean, configure(Z, ALL), "proj_len") - 0.3).all()
    equal, _ = model.subspaces(Z[:, :, :1].repeat(1, 1, 3))
    assert equal.rank.tolist() == [0] * 5 and not equal.U.any()  # nothing is left, and no NaN


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sim", ["proj_len", "proj_len_sq", "signed"])
def test_the_gradient_to_the_query_lies_along_the_projection(sim):
    own, q = configure(keys(4, 8, 3), RankRule(3)), unit(4, 8, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: own_match(q, own, sim), q)
    (grad,) = torch.autograd.grad(own_match(q, own, "proj_len").sum(), q)
    along = torch.einsum("nde,ne->nd", projector(own), q)
    torch.testing.assert_close(grad, F.normalize(along, dim=1))


@pytest.mark.parametrize("sim", ["proj_len", "proj_len_sq", "signed"])
@pytest.mark.parametrize("rule", [RankRule(4, "fixed", rank=r) for r in (1, 2, 3, 4)], ids=lambda r: f"rank{r.rank}")
def test_the_derivative_of_the_truncated_projector(rule, sim):
    Z, q = keys(3, 9, 4, spread=1.0).requires_grad_(), unit(3, 9, seed=3).requires_grad_()

    def with_gradient(q: Tensor, Z: Tensor) -> Tensor:
        return own_match(q, configure(Z, rule), sim, Z)

    assert torch.autograd.gradcheck(with_gradient, (q, Z), atol=1e-6)
    torch.testing.assert_close(with_gradient(q, Z), own_match(q, configure(Z.detach(), rule), sim))


@pytest.mark.parametrize("rank", [2, 3])
def test_equal_kept_eigenvalues_have_a_finite_right_derivative(rank):
    """Two (three) kept eigenvalues are equal; the derivative of eigh itself is not finite there."""
    basis = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    scale = torch.tensor([1.0, 1.0, 1.0 if rank == 3 else 0.5], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    Z, q = (basis * scale @ turn)[None].requires_grad_(), unit(1, 9, seed=3)
    rule = RankRule(3, "fixed", rank=rank)
    l = configure(Z, rule).l[0]  # noqa: E741
    assert l[:rank].max() - l[:rank].min() < 1e-12 and (rank == 3 or l[1] - l[2] > 0.5)
    assert torch.autograd.gradcheck(lambda Z: own_match(q, configure(Z, rule), "proj_len", Z), Z, atol=1e-6)


def test_a_tie_across_the_cut_is_finite():
    Z, q = equicorrelated(5, 0.8).float().requires_grad_(), unit(1, 16, dtype=torch.float32)
    own = configure(Z, RankRule(5))
    assert own.rank.item() == 3 and (own.l[0, 2] - own.l[0, 3]).abs() < 1e-6
    (grad,) = torch.autograd.grad(own_match(q, own, "proj_len", Z).sum(), Z)
    assert grad.isfinite().all() and grad.dtype == torch.float32
    same = unit(1, 16, 1, dtype=torch.float32).repeat(1, 1, 5).requires_grad_()
    (grad,) = torch.autograd.grad(own_match(q, configure(same, RankRule(5)), "proj_len", same).sum(), same)
    assert grad.isfinite().all()


# --- loss ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), p=st.integers(1, 4), m=st.integers(1, 15), chunk=st.integers(1, 20),
       sim=st.sampled_from(["proj_len", "proj_len_sq", "signed"]), seed=st.integers(0, 99))  # fmt: skip
def test_streamed_loss_equals_the_slow_one_with_its_gradient(n, p, m, chunk, sim, seed):
    rule = RankRule(p)
    q, own, queue = unit(n, 7, seed=seed).requires_grad_(), configure(keys(n, 7, p, seed), rule), stored(m, 7, p, rule)
    streamed = losses.negatives_lse(q, queue, sim, 0.2, chunk)
    torch.testing.assert_close(streamed, losses.negatives_lse(q, queue, sim, 0.2), rtol=1e-12, atol=1e-12)
    ours, theirs = losses.kscl_loss(q, own, queue, sim, 0.2)[0], slow_loss(q, own.U, queue, sim, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    weight = torch.arange(1.0, n + 1, dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad((y * weight).sum(), q) for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_shot_is_info_nce(dtype):
    q, k, queue = (unit(n, 16, seed=s, dtype=dtype) for s, n in enumerate((6, 6, 50)))
    own, one = configure(k[:, :, None], RankRule(1)), queue.T[None]
    assert torch.equal(own.U[:, :, 0], k)
    target = torch.zeros(6, dtype=torch.long)
    cosines = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
    for sim, logits in (("signed", cosines), ("proj_len", cosines.abs()), ("proj_len_sq", cosines.square())):
        ours, s = losses.kscl_loss(q, own, one, sim, 0.2)
        theirs = F.cross_entropy(logits / 0.2, target, reduction="none")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(s, logits[:, 0], rtol=0, atol=1e-6)
    assert (cosines < -0.1).any()


@pytest.mark.parametrize("sim", ["proj_len", "proj_len_sq", "signed"])
def test_room_beyond_the_rank_changes_nothing(sim):
    q, Z = unit(4, 12, seed=2), keys(4, 12, 3)
    small, large = RankRule(3), RankRule(6)
    a, _ = losses.kscl_loss(q, configure(Z, small), stored(9, 12, 3, small), sim, 0.2)
    b, _ = losses.kscl_loss(q, configure(Z, large), stored(9, 12, 3, large), sim, 0.2)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert stored(9, 12, 3, large).shape == (6, 12, 9)


def test_subspaces_that_fill_the_space_teach_nothing():
    R = torch.linalg.qr(torch.randn(11, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    rule, q = RankRule(8, energy=1.0), unit(4, 8).requires_grad_()
    queue = configure(R[4:], rule).U.permute(2, 1, 0)
    loss, s = losses.kscl_loss(q, configure(R[:4], rule), queue, "proj_len", 0.2)
    torch.testing.assert_close(s, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(loss, torch.full((4,), math.log(1 + 7), dtype=torch.float64))


def test_gradients_reach_the_queries_only_and_autocast_does_not_reach_the_loss():
    q, queue = unit(4, 12, dtype=torch.float32).requires_grad_(), stored(9, 12, 3, RankRule(3)).float().requires_grad_()
    own = configure(keys(4, 12, 3, dtype=torch.float32), RankRule(3))
    exact, _ = losses.kscl_loss(q, own, queue, "proj_len", 0.2)
    exact.sum().backward()
    assert queue.grad is None and q.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = losses.kscl_loss(q, own, queue, "proj_len", 0.2)
    assert inside.dtype == torch.float32 and torch.equal(inside, exact)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and not func.is_view:
                self.count = max(self.count, x.numel())
        return out


def test_neither_coordinates_nor_logits_of_the_whole_queue_exist(monkeypatch):
    monkeypatch.setattr(losses, "PRODUCTS", 3 * 8 * 100)  # a hundred columns at a time
    q, queue = unit(8, 16).requires_grad_(), stored(5000, 16, 3, RankRule(3))
    own = configure(keys(8, 16, 3), RankRule(3))
    with Largest() as largest:
        loss, s = losses.kscl_loss(q, own, queue, "proj_len", 0.2)
        loss.sum().backward(retain_graph=True)
        losses.against_queue(q.detach(), s.detach(), queue, "proj_len")
    assert 3 * 8 * 100 <= largest.count < 8 * 5000
    graph, kept = [loss.grad_fn], []
    while graph:  # nor does the graph keep them
        node = graph.pop()
        graph += [parent for parent, _ in node.next_functions if parent is not None]
        kept += [x.numel() for x in getattr(node, "saved_tensors", ()) if x is not None]
    assert kept and max(kept) <= 8 * 16 * 3


def test_no_covariance_is_decomposed(monkeypatch):
    shapes, eigh = [], torch.linalg.eigh

    def noted(x: Tensor) -> Any:
        shapes.append(tuple(x.shape))
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", noted)
    configure(keys(4, 32, 3), RankRule(3))
    assert shapes == [(4, 3, 3)]


def test_what_is_watched_of_the_queue():
    q, queue = unit(6, 8, seed=2), stored(40, 8, 3, RankRule(3))
    own = configure(keys(6, 8, 3), RankRule(3))
    s = own_match(q, own, "proj_len")
    closer, mean = losses.against_queue(q, s, queue, "proj_len")
    all_of_them = match(torch.einsum("nd,pdm->pnm", q, queue), "proj_len")
    assert closer.tolist() == [int((row > own).sum()) for row, own in zip(all_of_them, s)]
    torch.testing.assert_close(mean, all_of_them.mean(1))


@pytest.mark.parametrize(("sim", "low", "high"), [("proj_len", 0.068, 0.074), ("proj_len_sq", 0.007, 0.0085)])
def test_the_chance_level_grows_with_the_rank(sim, low, high):
    q = unit(3000, 128, seed=77)
    by_rank = [own_match(q, configure(keys(3000, 128, r, spread=9.0), RankRule(r, "fixed", rank=r)), sim).mean()
               for r in (1, 2, 5)]  # fmt: skip
    assert low < by_rank[0] < high and by_rank[0] < by_rank[1] < by_rank[2]
    if sim == "proj_len":
        assert [b.item() for b in by_rank] == pytest.approx([0.073, 0.111, 0.186], abs=0.004)


@pytest.mark.parametrize("sim", ["proj_len", "proj_len_sq", "signed"])
def test_the_expected_initial_loss_is_what_a_random_queue_gives(sim):
    from argparse import Namespace

    key = unit(1, 64).repeat(8, 1)
    own, queue = configure(key[:, :, None], RankRule(1)), unit(20000, 64, seed=4).T[None]
    loss, _ = losses.kscl_loss(key, own, queue, sim, 0.2)
    args = Namespace(sim=sim, moco_t=0.2, moco_dim=64, moco_k=20000)
    assert loss[0].item() == pytest.approx(initial_loss(args), abs=0.02)


# --- encoders and queue ----------------------------------------------------------------------------------------------


def small_model(shots: int = 3, room: int = 3, k: int = 24, seed: int = 0) -> KSCL:
    torch.manual_seed(seed)
    return KSCL(arch.build("resnet10", 4, "cifar_pool"), RankRule(room, energy=0.9), 8, k, 0.9)


def deals(shots: int, seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + j) for j in range(shots)]


def test_the_queue_is_a_ring_of_the_newest_subspaces():
    model = small_model(k=12)
    start = model.queue.clone()
    assert start.shape == (3, 8, 12) and not start[1:].any() and model.queue_rank.tolist() == [1] * 12
    torch.testing.assert_close(start[0].norm(dim=0), torch.ones(12))
    owns = [configure(keys(4, 8, 3, seed=s, dtype=torch.float32), model.rule) for s in range(4)]
    for own in owns[:2]:
        model.enqueue(own)
    assert torch.equal(model.queue[:, :, 8:], start[:, :, 8:]) and model.queue_ptr.tolist() == [8]
    for own in owns[2:]:
        model.enqueue(own)
    newest = [owns[3], owns[1], owns[2]]
    assert torch.equal(model.queue, torch.cat([own.U for own in newest]).permute(2, 1, 0))
    assert torch.equal(model.queue_rank, torch.cat([own.rank for own in newest]).int())
    assert model.queue_ptr.tolist() == [4]
    with pytest.raises(UserError, match="--moco_k 12 does not divide by the global batch of 5; take --moco_k 10"):
        model.check_batch(5)


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_momentum_moves_once_whatever_the_shots(shots):
    model = small_model(shots)
    for p in model.encoder_q.parameters():
        p.data.add_(torch.randn_like(p))
    before = [p.clone() for p in model.encoder_k.parameters()]
    q, Z_q = model(torch.randn(4, 3, 16, 16))
    model.update_key_encoder()
    Z = model.embed_keys(torch.randn(4, shots, 3, 16, 16), deals(shots))
    assert Z.shape == (4, 8, shots) and Z_q is None and not Z.requires_grad
    for old, new, p in zip(before, model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p, rtol=1e-5, atol=1e-6)
    assert int(model.state_dict()["encoder_k.bn1.num_batches_tracked"]) == shots
    assert int(model.state_dict()["encoder_q.bn1.num_batches_tracked"]) == 1
    losses.kscl_loss(q, model.subspaces(Z)[0], model.queue, "proj_len", 0.2)[0].mean().backward()
    assert all(p.grad is None for p in model.encoder_k.parameters()) and model.queue.grad is None
    assert max(float(p.grad.abs().max()) for p in model.encoder_q.parameters()) > 0


def test_each_shot_is_dealt_anew_over_the_shares_and_comes_back_in_order():
    model, x = small_model().train(), torch.randn(8, 2, 3, 16, 16)
    distributed.convert_norm(model, "split", 2)
    plain = small_model().train()
    Z = model.embed_keys(x, deals(2))
    for j, deal in enumerate(deals(2)):
        order, expected = torch.randperm(8, generator=deal), torch.empty(8, 8)
        with torch.no_grad():
            for part in order.view(2, 4):  # two processes of four images each
                expected[part] = F.normalize(plain.encoder_k(x[part, j]), dim=1)
        torch.testing.assert_close(Z[:, :, j], expected, rtol=0, atol=1e-5)
    again = model.embed_keys(x, deals(2, seed=11))
    assert (again - Z).abs().max() > 1e-4


def test_keys_of_the_query_encoder_carry_the_gradient():  # 2.4, --subspace_grad pos
    model, x = small_model().train(), torch.randn(4, 3, 3, 16, 16)
    q, Z = model(x[:, 0].flip(3), x, deals(3))
    own, spanning = model.subspaces(Z)
    with_keys = losses.kscl_loss(q, own, model.queue, "proj_len", 0.2, spanning)[0].mean()
    without = losses.kscl_loss(q, own, model.queue, "proj_len", 0.2)[0].mean()
    torch.testing.assert_close(with_keys, without)
    both, queries = (
        torch.autograd.grad(loss, list(model.encoder_q.parameters()), retain_graph=True)
        for loss in (with_keys, without)
    )
    assert max(float((a - b).abs().max()) for a, b in zip(both, queries)) > 1e-4
    assert Z.requires_grad and not own.U.requires_grad


def test_a_queue_of_moco_v2_becomes_one_of_rank_1():
    moco = small_model(1, 1, seed=5)
    state = {k: v for k, v in ReleaseKeys(moco).state_dict().items() if k != "module.queue_rank"}
    state["module.queue"] = state["module.queue"][0]  # [D, M] as MoCo v2 has it
    assert {"module.encoder_q.fc.2.weight", "module.encoder_k.conv1.weight", "module.queue_ptr"} <= set(state)
    q, k = unit(4, 8, dtype=torch.float32), unit(4, 8, seed=1, dtype=torch.float32)
    cosines = torch.cat([(q * k).sum(1, keepdim=True), q @ state["module.queue"]], 1).abs()
    expected = F.cross_entropy(cosines / 0.2, torch.zeros(4, dtype=torch.long), reduction="none")
    for room in (1, 3):
        model = small_model(3, room)
        ReleaseKeys(model).load_state_dict(state)
        assert model.queue.shape == (room, 8, 24) and model.queue_rank.tolist() == [1] * 24
        own = configure(k[:, :, None].repeat(1, 1, 3), model.rule)
        torch.testing.assert_close(losses.kscl_loss(q, own, model.queue, "proj_len", 0.2)[0], expected)
        assert torch.equal(model.encoder_k.conv1.weight, moco.encoder_k.conv1.weight)
    with pytest.raises(UserError, match="missing"):
        ReleaseKeys(model).load_state_dict({k: v for k, v in state.items() if "encoder_k" not in k})


def test_one_shot_is_a_plain_step_of_moco_v2_to_the_last_bit():
    """Encoders, momentum, shuffle, logits, queue: four steps beside MoCo v2 as anyone would write it."""
    model, moco = small_model(1, 1), small_model(1, 1)
    rows, queue, ptr = [], moco.queue[0].clone(), 0  # [D, M]
    ours, theirs = (torch.optim.SGD(m.encoder_q.parameters(), 0.05, 0.9, weight_decay=1e-4) for m in (model, moco))
    for step in range(4):
        im_q, im_k = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        q, _ = model(im_q)
        model.update_key_encoder()
        Z = model.embed_keys(im_k[:, None], deals(1, step))
        own, _ = model.subspaces(Z)
        loss = losses.kscl_loss(q, own, model.queue, "signed", 0.2)[0].mean()
        ours.zero_grad()
        loss.backward()

        z = F.normalize(moco.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for a, b in zip(moco.encoder_k.parameters(), moco.encoder_q.parameters()):
                a.mul_(0.9).add_(b, alpha=1 - 0.9)
            order = torch.randperm(8, generator=deals(1, step)[0])
            k = F.normalize(moco.encoder_k(im_k[order]), dim=1)[torch.argsort(order)]
        logits = torch.cat([(z * k).sum(1, keepdim=True), z @ queue], 1) / 0.2
        plain = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        theirs.zero_grad()
        plain.backward()
        # The two sum their exponentials in another order, so the losses agree to rounding ...
        assert loss.item() == pytest.approx(plain.item(), abs=5e-6)
        for a, b in zip(model.encoder_q.parameters(), moco.encoder_q.parameters()):
            assert (a.grad - b.grad).norm() < 1e-3 * b.grad.norm() + 1e-5
            b.grad = a.grad.clone()  # ... and from one gradient on, everything to the bit
        ours.step()
        theirs.step()
        model.enqueue(own)
        queue[:, ptr : ptr + 8], ptr = k.T, (ptr + 8) % 24
        rows.append(torch.equal(q, z) and torch.equal(Z[:, :, 0], k) and torch.equal(model.queue[0], queue))
    assert rows == [True] * 4 and int(model.queue_ptr) == ptr == 8
    for (name, a), b in zip(model.state_dict().items(), moco.state_dict().values()):
        assert torch.equal(a, b) or name.startswith("queue"), name


def test_checkpoints_have_the_names_of_moco(tmp_path):
    model = small_model()
    checkpoint.save(tmp_path / "a.pth", {"state_dict": ReleaseKeys(model).state_dict()})
    state = checkpoint.read_weights(tmp_path / "a.pth", "moco")
    assert {"conv1.weight", "layer4.0.conv1.weight", "fc.0.weight", "fc.2.bias"} <= set(state)
    assert len(set(itertools.chain(state))) == len(model.encoder_q.state_dict())
