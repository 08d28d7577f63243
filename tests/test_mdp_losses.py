"""The losses against independent slow loops in float64, and the identities that the equations imply."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mdp import losses
from mdp.losses import PixelLoss, pixel_to_pixel, pixel_to_prototype, pixel_to_region
from mdp.prototypes import PrototypeBank

TAU = 0.07


def make_bank(c: int = 7, d: int = 6, seed: int = 0, invalid: tuple[int, ...] = ()) -> PrototypeBank:
    g = torch.Generator().manual_seed(seed)
    bank = PrototypeBank(c, d, size=8, max_regions=3).double()
    bank.proto.copy_(F.normalize(torch.randn(c, d, generator=g, dtype=torch.float64), dim=1))
    bank.proto_valid.fill_(True)
    for i in invalid:
        bank.proto_valid[i] = False
        bank.proto[i] = 0
    return bank


def pixels(n: int = 40, c: int = 7, d: int = 6, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    v = F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)
    y_a, y_b = (torch.randint(-1, c, (n,), generator=g) for _ in range(2))
    return v, y_a, y_b, torch.rand(n, generator=g, dtype=torch.float64)


def unmixed(v, y, bank, **kwargs) -> PixelLoss:
    return pixel_to_prototype(v, y, torch.full_like(y, -1), torch.ones(len(y), dtype=v.dtype), bank, TAU, **kwargs)


def mean(loss: PixelLoss) -> torch.Tensor:
    return losses.average(loss, 0.0, loss.counted.sum(), 1, loss.p2c)


def slow(v, y_a, y_b, lam, bank, csc="none", k=3, groups=None, mix_ignore="keep"):
    """Eq. (1) and (2) pixel by pixel, class by class."""
    proto, valid = bank.proto, bank.proto_valid
    p2c, pulled = [], []
    for i in range(len(v)):
        s = {c: float(v[i] @ proto[c]) / TAU for c in range(len(proto)) if valid[c]}
        labels = [int(y_a[i]), int(y_b[i])]
        weights = [float(lam[i]), 1 - float(lam[i])]
        use = [(y, w) for y, w in zip(labels, weights, strict=True) if y in s]
        if mix_ignore == "renorm" and sum(w for _, w in use) > 0:
            total = sum(w for _, w in use)
            use = [(y, w / total) for y, w in use]
        others = [c for c in s if c not in labels]
        if groups is not None:
            own = {int(groups[y]) for y in labels if y >= 0}
            others = [c for c in others if int(groups[c]) not in own]
        near = sorted(others, key=lambda c: -s[c])[:k]
        rest = [c for c in s if not (csc == "nopush" and c in near)]
        lse = math.log(sum(math.exp(s[c]) for c in rest))
        p2c.append(sum(w * (lse - s[y]) for y, w in use))
        z = sum(math.exp(s[c]) for c in near)
        pull = sum(math.exp(s[c]) / z * (lse - s[c]) for c in near) if csc == "pull" else 0.0
        pulled.append(sum(w for _, w in use) * pull)
    return torch.tensor(p2c, dtype=torch.float64), torch.tensor(pulled, dtype=torch.float64)


@pytest.mark.parametrize("csc", ["none", "pull", "nopush"])
@pytest.mark.parametrize("scope", ["all", "cross"])
@pytest.mark.parametrize("mix_ignore", ["keep", "renorm"])
def test_equals_the_slow_loop(csc, scope, mix_ignore):
    bank = make_bank(invalid=(2,))
    v, y_a, y_b, lam = pixels()
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1]) if scope == "cross" else None
    got = pixel_to_prototype(v, y_a, y_b, lam, bank, TAU, csc, 3, groups, mix_ignore)
    p2c, pulled = slow(v, y_a, y_b, lam, bank, csc, 3, groups, mix_ignore)
    torch.testing.assert_close(got.p2c, p2c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.csc, pulled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_gradient_equals_autograd_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    bank = make_bank(invalid=(5,))
    v, y_a, y_b, lam = pixels()
    v.requires_grad_()
    loss = pixel_to_prototype(v, y_a, y_b, lam, bank, TAU, "pull", 2)
    (loss.p2c + 0.3 * loss.csc).sum().backward()
    ours, v.grad = v.grad.clone(), None

    s = (v @ bank.proto.T / TAU).masked_fill(~bank.proto_valid, -torch.inf)
    logp = s.log_softmax(1)
    w = [torch.where((y >= 0) & bank.proto_valid[y.clamp(min=0)], f, 0.0) for y, f in ((y_a, lam), (y_b, 1 - lam))]
    plain = -sum(
        x * logp.gather(1, y.clamp(min=0)[:, None])[:, 0].nan_to_num(neginf=0)
        for x, y in zip(w, (y_a, y_b), strict=True)
    )
    blocked = s.detach().clone()
    for y in (y_a, y_b):
        blocked[torch.arange(len(v)), y.clamp(min=0)] = torch.where(
            y >= 0, -torch.inf, blocked[torch.arange(len(v)), y.clamp(min=0)]
        )
    top, index = blocked.topk(2, dim=1)
    pull = -(w[0] + w[1]) * (top.softmax(1) * logp.gather(1, index)).sum(1)
    (plain + 0.3 * pull).sum().backward()
    torch.testing.assert_close(ours, v.grad, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(c=st.integers(2, 12), seed=st.integers(0, 999))
def test_equal_prototypes_give_log_v(c, seed):
    bank = make_bank(c)
    bank.proto.copy_(bank.proto[:1].expand(c, -1).clone())
    v, *_ = pixels(seed=seed)
    y = torch.arange(len(v)) % c
    torch.testing.assert_close(unmixed(v, y, bank).p2c, torch.full((len(v),), math.log(c), dtype=v.dtype))


def test_two_opposite_prototypes_are_a_softplus():
    bank = make_bank(2)
    bank.proto[1] = -bank.proto[0]
    v, *_ = pixels(c=2)
    y = torch.arange(len(v)) % 2
    torch.testing.assert_close(unmixed(v, y, bank).p2c, F.softplus(-2 * (v * bank.proto[y]).sum(1) / TAU))


def test_orthonormal_prototypes():
    bank = make_bank(6, 6)
    bank.proto.copy_(torch.eye(6))
    y = torch.arange(6)
    expected = math.log(1 + 5 * math.exp(-1 / TAU))
    torch.testing.assert_close(
        unmixed(bank.proto.clone(), y, bank).p2c, torch.full((6,), expected, dtype=torch.float64)
    )


def test_never_seen_classes_change_neither_loss_nor_gradient():
    v, y, *_ = pixels(c=5)
    results = []
    for extra in (0, 4):
        bank = make_bank(5 + extra, invalid=tuple(range(5, 5 + extra)))
        bank.proto[:5] = make_bank(5).proto
        x = v.clone().requires_grad_()
        loss = unmixed(x, y, bank, csc="pull", csc_k=2)
        (loss.p2c + loss.csc).sum().backward()
        results.append((loss.p2c.detach(), loss.csc.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert not make_bank(9, invalid=(8,)).proto_valid[8]
    assert unmixed(v, torch.full((len(v),), 8), make_bank(9, invalid=(8,))).counted.sum() == 0


def test_region_bank_with_one_region_a_class_equals_prototypes():
    c, d = 4, 6
    bank = PrototypeBank(c, d, size=4, max_regions=1).double()
    r = F.normalize(torch.randn(c, 1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=2)
    bank.enqueue(r, torch.arange(c)[:, None])
    v, y, *_ = pixels(c=c)
    grads = []
    for form in (lambda x: unmixed(x, y, bank), lambda x: pixel_to_region(x, y, bank, TAU)):
        x = v.clone().requires_grad_()
        mean(form(x)).backward()
        grads.append((mean(form(x)).detach(), x.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_region_bank_equals_its_definition():
    bank = PrototypeBank(4, 6, size=6, max_regions=2).double()
    g = torch.Generator().manual_seed(5)
    r = F.normalize(torch.randn(6, 2, 6, generator=g, dtype=torch.float64), dim=2)
    label = torch.tensor([[0, 1], [1, 3], [0, -1], [3, 0], [1, -1], [3, 1]])
    bank.enqueue(r * (label >= 0)[..., None], label)
    v, y, *_ = pixels(c=4)
    got = pixel_to_region(v, y, bank, TAU)
    flat, ids = r[label >= 0], label[label >= 0]
    for i in range(len(v)):
        s = flat @ v[i] / TAU
        positive = ids == y[i]
        assert bool(got.counted[i]) == bool(positive.any())
        if positive.any():
            torch.testing.assert_close(got.p2c[i], (s.logsumexp(0) - s[positive]).mean())


def test_pixel_mixing_identities():
    bank = make_bank(invalid=(2,))
    v, y_a, y_b, lam = pixels()
    one = torch.ones_like(lam)
    a = pixel_to_prototype(v, y_a, y_b, one, bank, TAU)
    b = unmixed(v, y_a, bank)
    assert torch.equal(a.p2c, b.p2c) and torch.equal(a.counted, b.counted)
    forth = pixel_to_prototype(v, y_a, y_b, lam, bank, TAU, "pull").p2c
    back = pixel_to_prototype(v, y_b, y_a, 1 - lam, bank, TAU, "pull").p2c
    torch.testing.assert_close(forth, back, rtol=1e-12, atol=1e-12)
    for part in (0.1 * one, 0.8 * one):
        torch.testing.assert_close(pixel_to_prototype(v, y_a, y_a, part, bank, TAU).p2c, b.p2c, rtol=1e-10, atol=1e-12)
    lone = torch.full_like(y_a, -1)
    kept = pixel_to_prototype(v, lone, y_b, lam, bank, TAU).p2c
    torch.testing.assert_close(kept, (1 - lam) * unmixed(v, y_b, bank).p2c, rtol=1e-10, atol=1e-12)


def test_sparse_coding_is_a_soft_target():
    bank, beta = make_bank(), 0.25
    v, y, *_ = pixels()
    y = y.clamp(min=0)
    none = torch.full_like(y, -1)
    for k in (2, 6, 50):  # K >= |V| - 1 is allowed
        index, code, _, total = losses.sparse_code(v, bank.proto, y, none, bank.proto_valid, TAU, k)
        torch.testing.assert_close(total, torch.ones(len(v), dtype=v.dtype))
        a = torch.zeros(len(v), 7, dtype=v.dtype).scatter_(1, index, code)
        assert (a.gather(1, y[:, None]) == 0).all() and int((a > 0).sum(1).max()) == min(k, 6)
        loss = unmixed(v, y, bank, csc="pull", csc_k=k)
        soft = (F.one_hot(y, 7) + beta * a) / (1 + beta)
        expected = (1 + beta) * F.cross_entropy(v @ bank.proto.T / TAU, soft, reduction="none")
        torch.testing.assert_close(loss.p2c + beta * loss.csc, expected, rtol=1e-12, atol=1e-12)
    without = losses.average(unmixed(v, y, bank, csc="pull"), 0.0, torch.tensor(40), 1, v)
    assert torch.equal(without, losses.average(unmixed(v, y, bank), 0.1, torch.tensor(40), 1, v))
    assert torch.equal(2 * without, losses.average(unmixed(v, y, bank), 0.1, torch.tensor(40), 2, v))  # DDP halves it


def test_gradient_reaches_the_query_only_and_ignores_its_norm():
    bank = make_bank()
    raw = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = torch.arange(30) % 7
    mean(unmixed(F.normalize(raw, dim=1), y, bank)).backward()
    assert raw.grad.abs().sum() > 0 and bank.proto.grad is None and not bank.bank_feat.requires_grad
    a, b = (mean(unmixed(F.normalize(x, dim=1), y, bank)) for x in (raw, raw * 37))
    torch.testing.assert_close(a, b)


def test_no_usable_pixel_gives_zero_with_a_gradient():
    v = pixels()[0].requires_grad_()
    loss = mean_with(v, unmixed(v, torch.full((len(v),), -1), make_bank()))
    loss.backward()
    assert loss.item() == 0 and torch.equal(v.grad, torch.zeros_like(v))


def mean_with(v, loss):
    return losses.average(loss, 0.1, loss.counted.sum(), 1, v)


def test_pixel_to_pixel_equals_its_definition_and_stays_inside_an_image():
    g = torch.Generator().manual_seed(4)
    b, p, d = 3, 9, 6
    v, k = (F.normalize(torch.randn(b, p, d, generator=g, dtype=torch.float64), dim=2) for _ in range(2))
    y, y_k = (torch.randint(-1, 3, (b, p), generator=g) for _ in range(2))
    y_k[2] = -1  # an image whose key view is all ignored
    got = pixel_to_pixel(v, y, k.transpose(1, 2).reshape(b, d, 3, 3), y_k.view(b, 3, 3), 3, TAU)
    for n in range(b):
        for i in range(p):
            positive = y_k[n] == y[n, i]
            counted = bool(y[n, i] >= 0) and bool(positive.any())
            assert bool(got.counted[n * p + i]) == counted
            s = (k[n] @ v[n, i]) / TAU
            expected = (s[y_k[n] >= 0].logsumexp(0) - s[positive]).mean() if counted else torch.zeros((), dtype=v.dtype)
            torch.testing.assert_close(got.p2c[n * p + i], expected)
    assert got.p2c.isfinite().all()


def test_classifier_controls():
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 5, 2, 2, generator=g, dtype=torch.float64)
    groups, dataset = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1])
    y = torch.tensor([[[0, 1], [-1, 0]], [[2, 4], [3, -1]]])
    union = losses.classifier_ce(logits, y, groups, dataset, False)
    heads = losses.classifier_ce(logits, y, groups, dataset, True)
    torch.testing.assert_close(mean(union), F.cross_entropy(logits, y, ignore_index=-1))
    own = [
        F.cross_entropy(logits[:1, :2], y[:1], ignore_index=-1),
        F.cross_entropy(logits[1:, 2:], y[1:] - 2, ignore_index=-3),
    ]
    torch.testing.assert_close(mean(heads), (own[0] * 3 + own[1] * 3) / 6)


def test_half_precision_logits_are_not_used():
    """At tau = 0.07 logits reach 14; the loss of float32 embeddings stays within 1e-5 of float64."""
    bank = make_bank()
    v, y, *_ = pixels(n=500)
    exact = mean(unmixed(v, y, bank))
    single = mean(unmixed(v.float(), y, bank.float()))
    assert abs(float(exact) - float(single)) < 1e-5 * float(exact)
