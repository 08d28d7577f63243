"""The acceptance rule: its p and intervals against SciPy's own tests, Holm's correction, what it says of pure noise."""

import numpy as np
import pytest
from scipy import stats

from shared_utils.lab import rule


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_p_and_interval_are_those_of_scipy() -> None:
    ours, base = [30.1, 33.0, 29.5, 31.2, 35.0], [28.0, 32.1, 29.9, 30.0, 31.7]
    one, theirs = rule.paired(by_seed(ours), by_seed(base)), stats.ttest_rel(ours, base)
    low, high = theirs.confidence_interval(0.95)
    assert one is not None and one.n == 5
    assert (one.p, one.low, one.high) == pytest.approx((theirs.pvalue, low, high))
    two, theirs = rule.pooled(ours, base, [ours, base]), stats.ttest_ind(ours, base)
    low, high = theirs.confidence_interval(0.95)
    assert two is not None and (two.p, two.low, two.high) == pytest.approx((theirs.pvalue, low, high))
    more = rule.pooled(ours, base, [ours, base, [1.0, 1.1, 0.9], [4.0]])  # a third arm adds degrees of freedom
    spread = [np.var(ours, ddof=1) * 4, np.var(base, ddof=1) * 4, np.var([1.0, 1.1, 0.9], ddof=1) * 2]
    error = (sum(spread) / 10 * (1 / 5 + 1 / 5)) ** 0.5
    assert more is not None and more.p == pytest.approx(2 * stats.t.sf(abs(more.difference) / error, 10))


def test_only_common_seeds_are_paired_and_one_says_nothing() -> None:
    one = rule.paired({0: 1.0, 1: 2.0, 2: 4.0}, {1: 1.0, 2: 2.0, 7: 50.0})
    assert one is not None and (one.difference, one.n) == (1.5, 2)
    assert rule.paired({0: 1.0, 1: 2.0}, {1: 1.0}) is None and rule.pooled([1.0], [1.0, 2.0], [[1.0, 2.0]]) is None
    equal, shifted = (
        rule.paired(by_seed([1.0, 2.0]), by_seed([1.0, 2.0])),
        rule.paired(by_seed([2.0, 3.0]), by_seed([1.0, 2.0])),
    )
    assert equal is not None and (equal.p, equal.low, equal.high) == (1.0, 0.0, 0.0)
    assert shifted is not None and (shifted.p, shifted.low, shifted.above) == (0.0, 1.0, True)


def test_holm() -> None:
    """By hand: 3 x .01, then 2 x .02, then .5; never falling, never above 1."""
    assert rule.holm({"a": 0.5, "b": 0.01, "c": 0.02}) == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.5})
    assert rule.holm({"a": 0.03, "b": 0.031}) == pytest.approx({"a": 0.06, "b": 0.06})
    assert rule.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0} and rule.holm({}) == {}


def test_a_claim_needs_seeds_and_an_assay_that_can_show_it() -> None:
    strong = rule.Comparison(2.0, 0.001, 1.0, 3.0, 5)
    assert rule.claim(strong, 0.002, []) == "effect shown at this scale"
    assert rule.claim(strong, 0.06, []) == "no effect at this scale"  # after Holm's correction
    assert rule.claim(rule.Comparison(-2.0, 0.001, -3.0, -1.0, 5), 0.002, []) == "contradicted at this scale"
    few = rule.Comparison(2.0, 0.001, 1.0, 3.0, 4)
    assert rule.claim(few, 0.002, []) == "not testable at this size (4 seeds, 5 needed)"
    said = rule.claim(few, 0.002, ["no floor measured"])
    assert said == "not testable at this size (4 seeds, 5 needed; no floor measured)"


def test_a_control_comes_out_or_not() -> None:
    up, flat = rule.Comparison(2.0, 0.01, 1.0, 3.0, 3), rule.Comparison(2.0, 0.2, -1.0, 5.0, 3)
    assert rule.control(up, "above") == "as expected" and rule.control(up, "below") == "not as expected"
    assert rule.control(flat, "above") == rule.control(flat, "below") == "not as expected"


@pytest.mark.parametrize("paired", [True, False])
def test_noise_gives_a_verdict_in_at_most_five_per_cent_of_the_folders(paired: bool) -> None:
    """1,500 folders without any effect, four claims of five seeds each that share a baseline: how many say anything.

    The bound is 5 % and twice its standard error (0.56 %).
    """
    rng, said, folders = np.random.default_rng(0), 0, 1500
    for _ in range(folders):
        arms = (30 + rng.normal(0, 3, (1, 5)) + rng.normal(0, 1, (5, 5))).tolist()  # a seed's own level, and noise
        if paired:
            found = [rule.paired(by_seed(arm), by_seed(arms[0])) for arm in arms[1:]]
        else:
            arms = rng.normal(30, 1, (5, 5)).tolist()
            found = [rule.pooled(arm, arms[0], arms) for arm in arms[1:]]
        p = rule.holm({str(i): one.p for i, one in enumerate(found) if one})
        said += any(rule.claim(one, p[str(i)], []) != rule.NONE for i, one in enumerate(found) if one)
    assert said / folders <= 0.05 + 2 * 0.0056, said
    assert said > 0  # the rule can say something at all
