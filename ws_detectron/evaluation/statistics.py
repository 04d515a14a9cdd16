"""Means over seeds, and differences of them with a confidence interval.

Source of the interval: Welch, "The generalization of Student's problem when several different
population variances are involved" (Biometrika 34, 1947).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (with n - 1; None for one value) of some values."""

    count: int
    mean: float
    deviation: Optional[float]


@dataclass(frozen=True)
class Difference:
    """Difference of two means, with the ends of its interval; None if there are too few values."""

    mean: float
    low: Optional[float] = None
    high: Optional[float] = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low * self.high > 0


def summarize(values: Sequence[float]) -> Optional[Summary]:
    """None without values."""
    if not values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), deviation)


def difference(
    values: Sequence[float], baseline: Sequence[float], level: float = LEVEL
) -> Optional[Difference]:
    """Mean of `values` minus mean of `baseline`, see `contrast`."""
    return contrast([values], [baseline], level)


def contrast(
    plus: Sequence[Sequence[float]], minus: Sequence[Sequence[float]], level: float = LEVEL
) -> Optional[Difference]:
    """Sum of the means of `plus` minus that of the means of `minus`, with Welch's interval.

        d ± t(level, v) * sqrt(sum of s²/n)
        v = (sum of s²/n)² / sum of (s²/n)²/(n - 1)

    over all samples. Values are assumed independent and normally distributed; variances may
    differ. That runs of one seed share the order of the images is not used.

    Returns:
        None if a sample is empty; without an interval if one has a single value.
    """
    samples = [*plus, *minus]
    if not all(samples):
        return None
    mean = float(sum(map(np.mean, plus)) - sum(map(np.mean, minus)))
    if min(map(len, samples)) < 2:
        return Difference(mean)
    shares = [float(np.var(sample, ddof=1)) / len(sample) for sample in samples]
    total = sum(shares)
    if total == 0:
        return Difference(mean, mean, mean)
    freedom = total**2 / sum(share**2 / (len(sample) - 1) for share, sample in zip(shares, samples))
    half = student_t(level, freedom) * math.sqrt(total)
    return Difference(mean, mean - half, mean + half)


def mean_with_interval(values: Sequence[float], level: float = LEVEL) -> Optional[Difference]:
    """Mean of values, such as paired differences, with Student's interval.

        d ± t(level, n - 1) * s/sqrt(n)

    Returns:
        None without values; without an interval for a single value.
    """
    summary = summarize(values)
    if summary is None:
        return None
    if summary.deviation is None:
        return Difference(summary.mean)
    half = student_t(level, summary.count - 1) * summary.deviation / math.sqrt(summary.count)
    return Difference(summary.mean, summary.mean - half, summary.mean + half)


def student_t(level: float, freedom: float) -> float:
    """The t for which |T| <= t with probability `level`, where T has Student's distribution.

    With t = sqrt(v) tan(a) the probability is the integral of cos(x)^(v-1) from 0 to a, divided by
    that from 0 to pi/2; solved for `a` by bisection.

    Args:
        level: between 0 and 1.
        freedom: degrees of freedom v, at least 1, may be fractional.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def integral(end: float) -> float:
        angles = end / 2 * (nodes + 1)
        return float(end / 2 * np.sum(weights * np.cos(angles) ** (freedom - 1)))

    wanted = level * integral(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < wanted else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
