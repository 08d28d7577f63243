"""Similarity distribution, calibration, alignment and prototypes of sscl."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_utils import UserError
from sscl.calibration import (
    CALIBRATIONS,
    Alignment,
    calibrate,
    log_similarity,
    sharpen,
    threshold,
)
from sscl.prototypes import class_means, ema_step, nearest_to_classes, spread
from sscl.watch import entropy, equal_coverage

rows = st.integers(0, 2**31 - 1)


def dist(n: int, c: int, seed: int, zeros: bool = False) -> Tensor:
    p = torch.rand(n, c, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-6
    if zeros:
        p[:, 0] = 0
    return p / p.sum(1, keepdim=True)


def unit(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_similarity_and_product_against_a_loop() -> None:
    z, mu, p = unit(5, 8, 0), unit(4, 8, 1), dist(5, 4, 2)
    log_q = log_similarity(z, mu, 0.1)
    tilde = sharpen(calibrate(p, log_q, "product"), 0.5)
    for i in range(5):
        weights = [math.exp(sum(float(a) * float(b) for a, b in zip(z[i].double(), m.double())) / 0.1) for m in mu]
        q = [w / sum(weights) for w in weights]
        product = [float(p[i, c]) * q[c] for c in range(4)]
        product = [x / sum(product) for x in product]
        squares = [x**2 for x in product]
        for c in range(4):
            assert float(log_q[i, c].exp()) == pytest.approx(q[c], rel=1e-4, abs=1e-9)
            assert float(tilde[i, c]) == pytest.approx(squares[c] / sum(squares), rel=1e-4, abs=1e-9)
    a = 0.3
    mean = calibrate(p, log_q, "average", a=a)
    torch.testing.assert_close(mean, (1 - a) * p + a * log_q.exp())
    geo = p ** (1 - a) * log_q.exp() ** a
    torch.testing.assert_close(calibrate(p, log_q, "geomean", a=a), geo / geo.sum(1, keepdim=True))
    prior = dist(1, 4, 7)[0]
    torch.testing.assert_close(calibrate(p, log_q, "prior", prior), p * prior / (p * prior).sum(1, keepdim=True))
    assert calibrate(p, log_q, "none") is p


@settings(max_examples=25, deadline=None)
@given(rows, st.booleans(), st.sampled_from([0.02, 0.1, 1.0]))
def test_calibration_properties(seed: int, zeros: bool, tau_s: float) -> None:
    p, log_q = dist(6, 5, seed, zeros), log_similarity(unit(6, 8, seed), unit(5, 8, seed + 1), tau_s)
    prior = dist(1, 5, seed)[0]
    for how in CALIBRATIONS:
        out = sharpen(calibrate(p, log_q, how, prior), 0.5)
        assert bool((out >= 0).all()) and bool(out.isfinite().all())
        torch.testing.assert_close(out.sum(1), torch.ones(6))
    uniform = torch.full((6, 5), -math.log(5.0))
    torch.testing.assert_close(calibrate(p, uniform, "product"), p)
    torch.testing.assert_close(calibrate(uniform.exp(), log_q, "product"), log_q.exp())
    q = log_q.exp()
    torch.testing.assert_close(calibrate(p, log_q, "product"), calibrate(q, p.log(), "product"), atol=1e-6, rtol=1e-4)


def test_similarity_that_underflows_leaves_the_product_finite() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    log_q = log_similarity(torch.tensor([[-1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.01)
    assert float(log_q[0, 0].exp()) == 0  # e^-200
    assert calibrate(p, log_q, "product").tolist() == [[1.0, 0.0], [0.0, 1.0]]


@settings(max_examples=25, deadline=None)
@given(rows, st.sampled_from([0.9, 0.5, 0.2]))
def test_sharpening(seed: int, t: float) -> None:
    p = dist(6, 5, seed)
    assert sharpen(p, 1.0) is p
    sharp = sharpen(p, t)
    assert torch.equal(sharp.argmax(1), p.argmax(1)) and float(entropy(sharp)) <= float(entropy(p)) + 1e-6
    torch.testing.assert_close(sharp, p ** (1 / t) / (p ** (1 / t)).sum(1, keepdim=True), atol=1e-6, rtol=1e-4)
    p[torch.arange(6), p.argmax(1)] += 0.05  # T -> 0 asks for a largest class
    torch.testing.assert_close(sharpen(p, 1e-3), F.one_hot(p.argmax(1), 5).float(), atol=1e-3, rtol=0)


def test_sharpening_two_classes_by_hand() -> None:
    assert float(sharpen(torch.tensor([[0.6, 0.4]]), 0.5)[0, 0]) == pytest.approx(0.36 / 0.52, rel=1e-5)


@pytest.mark.parametrize("kind", ["ema", "window"])
def test_alignment(kind: str) -> None:
    align = Alignment(5, kind, m=0.9, window=4)
    p = dist(32, 5, 0)
    torch.testing.assert_close(align(p), p)  # uniform pbar
    skewed = p * torch.tensor([5.0, 1, 1, 1, 1])
    skewed = skewed / skewed.sum(1, keepdim=True)
    means = []
    for seed in range(6):
        batch = skewed.roll(seed, 0) * 0.5 + 0.5 * dist(32, 5, seed + 1)
        means.append(batch.mean(0))
        align.update(batch)
    expected = torch.full((5,), 0.2)
    for mean in means:
        expected = 0.9 * expected + 0.1 * mean
    if kind == "window":
        expected = torch.stack(means[-4:]).mean(0)
    torch.testing.assert_close(align.pbar, expected)
    before, after = skewed.mean(0), align(skewed).mean(0)
    assert float((after - 0.2).abs().sum()) < float((before - 0.2).abs().sum())
    torch.testing.assert_close(align(skewed).sum(1), torch.ones(32))


def test_alignment_off_and_running_mean_of_q() -> None:
    align = Alignment(3, "off", m=0.5)
    p, log_q = dist(4, 3, 0), dist(4, 3, 1).log()
    align.update(p, log_q)
    assert align(p) is p
    torch.testing.assert_close(align.qbar, 0.5 / 3 + 0.5 * log_q.exp().mean(0))
    with pytest.raises(UserError, match="--da nothing: choose from ema, window, off"):
        Alignment(3, "nothing")
    with pytest.raises(UserError, match="--calib circle: choose from"):
        calibrate(p, log_q, "circle")


def test_threshold_and_equal_coverage() -> None:
    assert threshold(0.9, False, 0.3) == 0.9
    assert [round(threshold(0.9, True, t), 6) for t in (0.0, 0.5, 1.0)] == [0.5, 0.7, 0.9]
    assert threshold(0.4, True, 0.7) == pytest.approx(0.4)
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]])
    truth = torch.tensor([0, 1, 1, 0])
    assert float(equal_coverage(p, truth, 0.5)) == 1 and float(equal_coverage(p, truth, 1.0)) == 0.5
    assert float(equal_coverage(p, truth, 0.75)) == pytest.approx(2 / 3)


def test_prototypes_are_normalised_means() -> None:
    z, labels, old = unit(20, 6, 0), torch.arange(20) % 4, unit(5, 6, 1)
    mu = class_means(z, labels, old)
    for c in range(4):
        total = [sum(float(z[i, d]) for i in range(20) if labels[i] == c) for d in range(6)]
        length = math.sqrt(sum(x * x for x in total))
        torch.testing.assert_close(mu[c], torch.tensor([x / length for x in total]))
    assert torch.equal(mu[4], old[4])  # no sample
    order = torch.randperm(20)
    torch.testing.assert_close(class_means(z[order], labels[order], old), mu, atol=1e-7, rtol=0)
    torch.testing.assert_close(mu.norm(dim=1), torch.ones(5))


def test_ema_prototypes() -> None:
    mu, z = unit(4, 6, 0), unit(8, 6, 1)
    labels, mask = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3]), torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()
    moved = ema_step(mu, z, labels, mask, 0.9)
    torch.testing.assert_close(moved[0], F.normalize(0.9 * mu[0] + 0.1 * (z[0] + z[1]) / 2, dim=0))
    torch.testing.assert_close(moved[1], F.normalize(0.9 * mu[1] + 0.1 * z[2], dim=0))
    assert torch.equal(moved[2:], mu[2:])
    assert torch.equal(ema_step(mu, z, labels, mask, 1.0)[2:], mu[2:])
    torch.testing.assert_close(ema_step(mu, z, labels, mask, 1.0), mu)


@pytest.mark.parametrize("chunk", [100, 5])
def test_nearest_unlabelled_images_of_each_class(chunk: int) -> None:
    z, mu, labelled = unit(12, 8, 0), unit(3, 8, 1), torch.tensor([3, 5])
    z[0] = mu[1]  # the first image is the nearest one of a class
    log_q = log_similarity(z, mu, 0.1)
    chosen = nearest_to_classes(z, mu, 0.1, labelled, 4, chunk)
    for c in range(3):
        by_hand = sorted((i for i in range(12) if i not in (3, 5)), key=lambda i: -float(log_q[i, c]))[:4]
        assert chosen[c].tolist() == by_hand
    assert chosen[1, 0] == 0
    every = nearest_to_classes(z, mu, 0.1, labelled, 50, chunk)
    assert every.shape == (3, 10) and not set(every.flatten().tolist()) & {3, 5}


def test_perfect_embeddings_correct_a_wrong_prediction() -> None:
    truth = torch.tensor([0, 1, 2, 0])
    z = F.one_hot(truth, 3).float()
    mu = class_means(z, truth, torch.zeros(3, 3))
    log_q = log_similarity(z, mu, 0.1)
    assert torch.equal(log_q.argmax(1), truth)
    p = torch.full((4, 3), 0.1)
    p[torch.arange(4), (truth + 1) % 3] = 0.6  # wrong, the true class is second
    p[torch.arange(4), truth] = 0.3
    assert not bool((p.argmax(1) == truth).any())
    assert torch.equal(calibrate(p, log_q, "product").argmax(1), truth)
    assert spread(mu) == pytest.approx(0)
    assert spread(mu[:1].expand(3, 3)) == pytest.approx(1)  # all in one place
