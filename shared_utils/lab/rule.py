"""The acceptance rule: two arms compared, p and 95 % interval, Holm's correction, and the status that follows.

Claims are tested, controls have an expected direction, everything else is descriptive. A claim is tested only where
the assay can show it: at least five seeds on both sides, a floor that the baseline clears, and a positive control (a
known improvement) that comes out. Where one of these fails the status is "not testable at this size" and says why.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05  # two-sided
SEEDS = 5  # of a claim, on either side
EFFECT, NONE, CONTRADICTED = (
    "effect shown at this scale", "no effect at this scale", "contradicted at this scale"
)  # fmt: skip
UNTESTABLE = "not testable at this size"
EXPECTED, UNEXPECTED = "as expected", "not as expected"
REPRODUCED, MISSED = "reproduced", "not reproduced"  # a published number of a baseline, within its margin
DESCRIPTIVE = "descriptive"


@dataclass(frozen=True)
class Comparison:
    """Mean difference (ours - other), its two-sided p and 95 % interval, and the fewer seeds of the two sides."""

    difference: float
    p: float
    low: float
    high: float
    n: int

    @property
    def above(self) -> bool:
        return self.p < LEVEL and self.difference > 0

    @property
    def below(self) -> bool:
        return self.p < LEVEL and self.difference < 0


def _t(difference: float, error: float, freedom: int, n: int) -> Comparison:
    from scipy.stats import t

    if error == 0:  # all seeds agree to the last digit
        return Comparison(difference, float(difference == 0), difference, difference, n)
    half = float(t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return Comparison(difference, p, difference - half, difference + half, n)


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> Comparison | None:
    """t-test on the differences of the seeds that both sides have; None with fewer than two of them."""
    gaps = [ours[seed] - other[seed] for seed in ours if seed in other]
    if len(gaps) < 2:
        return None
    gaps = [0.0 if abs(gap) < 1e-12 else gap for gap in gaps]
    return _t(statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1, len(gaps))


def over(ours: Mapping[int, float], number: float) -> Comparison | None:
    """As `paired`, held against one number (chance, a majority class) in place of a second arm."""
    return paired(ours, dict.fromkeys(ours, number))


def pooled(ours: Sequence[float], other: Sequence[float], arms: Sequence[Sequence[float]]) -> Comparison | None:
    """t-test of independent seeds, with the variance pooled over `arms` (those of a set); None below two a side."""
    if min(len(ours), len(other)) < 2:
        return None
    groups = [group for group in arms if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    variance = sum((len(group) - 1) * statistics.variance(group) for group in groups) / freedom
    error = math.sqrt(variance * (1 / len(ours) + 1 / len(other)))
    return _t(statistics.mean(ours) - statistics.mean(other), error, freedom, min(len(ours), len(other)))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p of each name: the smallest times the number of tests, and so on, never falling, at most 1."""
    out, least = {}, 0.0
    for place, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - place) * p[name]))
        out[name] = least
    return out


def claim(one: Comparison, adjusted: float, doubts: Sequence[str]) -> str:
    """Status of a claim row from its comparison, Holm's p, and what keeps the assay from showing anything."""
    doubts = [*([f"{one.n} seeds, {SEEDS} needed"] if one.n < SEEDS else []), *doubts]
    if doubts:
        return f"{UNTESTABLE} ({'; '.join(doubts)})"
    if adjusted >= LEVEL:
        return NONE
    return EFFECT if one.difference > 0 else CONTRADICTED


def control(one: Comparison, expected: str) -> str:
    """Status of a control whose arm is expected `above` or `below` what it is held against."""
    return EXPECTED if (one.above if expected == "above" else one.below) else UNEXPECTED
