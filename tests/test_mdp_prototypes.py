"""The two-step average, the ring bank against brute force, and the mixing geometry."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mdp.builder import downsample_labels
from mdp.mixing import Plan, apply_plan, draw_partners, draw_plan, region_box
from mdp.prototypes import PrototypeBank, region_means
from shared_utils import UserError


def unit(*shape: int, seed: int = 0, dim: int = 1) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=dim)


def test_region_means_equal_a_loop():
    k, y = unit(3, 5, 4, 6), torch.randint(-1, 4, (3, 4, 6), generator=torch.Generator().manual_seed(1))
    r, label = region_means(k, y, num_classes=4, max_regions=6)
    assert r.shape == (3, 6, 5) and label.shape == (3, 6)
    for n in range(3):
        present = sorted(set(y[n].flatten().tolist()) - {-1})
        assert sorted(c for c in label[n].tolist() if c >= 0) == present
        for slot, c in enumerate(label[n].tolist()):
            if c < 0:
                assert not r[n, slot].any()
            else:
                torch.testing.assert_close(r[n, slot], F.normalize(k[n][:, y[n] == c].mean(1), dim=0))


def test_only_the_largest_regions_are_kept():
    y = torch.tensor([0] * 10 + [1] * 3 + [2] * 5 + [-1] * 6).view(1, 4, 6)
    _, label = region_means(unit(1, 5, 4, 6), y, num_classes=3, max_regions=2)
    assert set(label[0].tolist()) == {0, 2}


def test_one_pixel_and_a_thousand_weigh_the_same():
    a, b = F.normalize(torch.tensor([1.0, 0.2, 0]), dim=0), F.normalize(torch.tensor([0, 0.3, 1.0]), dim=0)
    k = torch.stack([a[:, None].expand(3, 1000), b[:, None].expand(3, 1000)]).view(2, 3, 10, 100).clone()
    y = torch.zeros(2, 10, 100, dtype=torch.long)
    y[1] = -1
    y[1, 0, 0] = 0  # image 1: one pixel of class 0; image 0: a thousand
    bank = PrototypeBank(1, 3, size=2, max_regions=2)
    bank.enqueue(*region_means(k, y, 1, 2))
    torch.testing.assert_close(bank.proto[0], F.normalize(a + b, dim=0))
    pooled = F.normalize(1000 * a + b, dim=0)
    assert (bank.proto[0] - pooled).abs().max() > 0.1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.sampled_from([1, 2, 4]), rounds=st.integers(1, 20))
def test_ring_equals_brute_force(seed, batch, rounds):
    g = torch.Generator().manual_seed(seed)
    bank, c, m = PrototypeBank(6, 4, size=8, max_regions=3, recompute_every=0), 6, 8
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    last = torch.zeros(c, 4)
    for _ in range(rounds):
        k = F.normalize(torch.randn(batch, 4, 2, 3, generator=g), dim=1)
        y = torch.randint(-1, c, (batch, 2, 3), generator=g)
        r, label = region_means(k, y, c, 3)
        bank.enqueue(r, label)
        history += list(zip(r, label, strict=True))
        kept = history[-m:]
        for cls in range(c):
            members = [r[i] for r, label in kept for i in range(3) if int(label[i]) == cls]
            assert int(bank.class_count[cls]) == len(members)
            if members:
                total = torch.stack(members).sum(0)
                torch.testing.assert_close(bank.class_sum[cls], total, rtol=0, atol=1e-5)
                last[cls] = F.normalize(total, dim=0)
            torch.testing.assert_close(bank.proto[cls], last[cls], rtol=0, atol=1e-4)
    assert int(bank.ptr) == batch * rounds % m


def test_evicted_classes_keep_their_last_prototype():
    bank = PrototypeBank(3, 4, size=4, max_regions=1)
    r = unit(2, 1, 4, dim=2)
    bank.enqueue(r, torch.tensor([[0], [1]]))
    assert bank.bank_label[:, 0].tolist() == [0, 1, -1, -1]  # from the first slot on
    before = bank.proto.clone()
    for seed in range(4):  # the ring fills with class 2 alone
        bank.enqueue(unit(2, 1, 4, seed=seed + 1, dim=2), torch.full((2, 1), 2))
    assert torch.equal(bank.proto[:2], before[:2]) and bank.proto_valid.all()
    assert bank.class_count.tolist() == [0, 0, 4]


def test_recomputation_removes_drift():
    bank = PrototypeBank(2, 4, size=4, max_regions=1, recompute_every=3)
    bank.enqueue(unit(4, 1, 4, dim=2), torch.tensor([[0], [1], [0], [1]]))
    bank.class_sum.add_(0.5)  # drift, exaggerated
    for seed in (1, 2):
        bank.enqueue(unit(4, 1, 4, seed=seed, dim=2), torch.tensor([[0], [1], [0], [1]]))
    exact = torch.stack([bank.bank_feat[bank.bank_label == c].sum(0) for c in (0, 1)])
    torch.testing.assert_close(bank.class_sum, exact)


def test_ema_update():
    bank = PrototypeBank(2, 4, size=4, max_regions=1, update="ema", ema_m=0.9)
    first, second = unit(1, 1, 4, dim=2), unit(1, 1, 4, seed=1, dim=2)
    bank.enqueue(first, torch.tensor([[0]]))
    torch.testing.assert_close(bank.proto[0], first[0, 0])  # nothing to average with yet
    bank.enqueue(second, torch.tensor([[0]]))
    torch.testing.assert_close(bank.proto[0], F.normalize(0.9 * first[0, 0] + 0.1 * second[0, 0], dim=0))
    assert bank.proto_valid.tolist() == [True, False]


def test_a_batch_that_does_not_divide_the_ring_is_refused_with_a_cure():
    with pytest.raises(
        UserError, match=r"--bank-size 100 does not divide by the global batch of 64; take --bank-size 128"
    ):
        PrototypeBank(2, 2, size=100).check_batch(64)
    PrototypeBank(2, 2, size=10560).check_batch(64)


def test_mean_offdiag_cos():
    bank = PrototypeBank(4, 8, size=4)
    p = unit(4, 8)
    bank.proto.copy_(p)
    bank.proto_valid[:3] = True
    s = p[:3] @ p[:3].T
    torch.testing.assert_close(bank.mean_offdiag_cos(), (s.sum() - s.trace()) / 6, atol=1e-6, rtol=1e-5)


# -- mixing ----------------------------------------------------------------------------------------------------------
def plan(kind: int, lam: float, corner=(0.25, 0.5), n: int = 2) -> Plan:
    return Plan(
        torch.arange(n - 1, -1, -1), torch.full((n,), kind), torch.full((n,), lam), torch.tensor([corner]).expand(n, 2)
    )


@settings(max_examples=50, deadline=None)
@given(lam=st.floats(0, 1), x=st.floats(0, 0.999), y=st.floats(0, 0.999))
def test_region_mixing_takes_b_inside_the_box_and_a_outside(lam, x, y):
    h, w = 12, 16
    images = torch.stack([torch.zeros(3, h, w), torch.ones(3, h, w)])
    labels = torch.stack([torch.full((h, w), 4), torch.full((h, w), 300)])
    mixed = apply_plan(images, labels, plan(1, lam, (x, y)))
    x0, x1, y0, y1 = (int(e[0]) for e in region_box(torch.tensor([lam]), torch.tensor([[x, y]]), h, w))
    assert 0 <= x0 <= x1 <= w and 0 <= y0 <= y1 <= h
    assert x0 == int(torch.tensor(x) * w) and y0 == int(torch.tensor(y) * h)  # the corner, not the centre
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    assert torch.equal(mixed.y_a[0] == 300, inside) and torch.equal(mixed.x[0, 0] == 1, inside)
    assert torch.equal(mixed.y_a[1] == 4, inside)
    assert (mixed.y_b == -1).all() and (mixed.lam == 1).all()
    if lam == 1:
        assert torch.equal(mixed.x, images) and torch.equal(mixed.y_a, labels)


def test_unclipped_area_is_one_minus_lambda():
    lam = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    x0, x1, y0, y1 = region_box(lam, torch.zeros(1000, 2), 1000, 1000)  # from the top left corner nothing is clipped
    torch.testing.assert_close((x1 - x0) * (y1 - y0) / 1e6, 1 - lam, rtol=0, atol=2e-3)


def test_pixel_mixing_blends_the_whole_crop_and_keeps_both_labels():
    images, labels = torch.rand(2, 3, 4, 4), torch.arange(32).view(2, 4, 4)
    mixed = apply_plan(images, labels, plan(2, 0.3))
    torch.testing.assert_close(mixed.x[0], 0.3 * images[0] + 0.7 * images[1])
    assert torch.equal(mixed.y_a, labels) and torch.equal(mixed.y_b, labels.flip(0)) and (mixed.lam == 0.3).all()
    same = apply_plan(images, labels, plan(0, 0.3))
    assert torch.equal(same.x, images) and (same.y_b == -1).all() and (same.lam == 1).all()


@settings(max_examples=30, deadline=None)
@given(dataset=st.lists(st.integers(0, 2), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_partners_come_from_another_dataset(dataset, seed):
    d = torch.tensor(dataset)
    partner = draw_partners(d, torch.Generator().manual_seed(seed))
    assert (partner != torch.arange(len(d))).all()
    for i in range(len(d)):
        if (d != d[i]).any():
            assert d[partner[i]] != d[i]


def test_plan_frequencies():
    d = torch.arange(4000) % 2
    drawn = draw_plan(d, "both", 0.5, 1.0, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn.kind, minlength=3) / len(d)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.25]), rtol=0, atol=0.03)
    assert abs(float(drawn.lam.mean()) - 0.5) < 0.02 and abs(float(drawn.lam.var()) - 1 / 12) < 0.01
    assert (draw_plan(d, "none", 1.0, 1.0).kind == 0).all() and (draw_plan(d, "region", 1.0, 1.0).kind == 1).all()


def test_labels_are_downsampled_by_pixel_centre():
    y = torch.arange(64).view(1, 8, 8) + 250
    assert downsample_labels(y, (2, 2)).tolist() == [[[250 + 18, 250 + 22], [250 + 50, 250 + 54]]]
    assert set(downsample_labels(torch.tensor([[[-1, 300], [300, -1]]]), (4, 4)).unique().tolist()) == {-1, 300}
