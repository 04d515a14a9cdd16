"""Scores of runs as one table, and differences of means with intervals.

Source of the interval: Welch, "The generalization of Student's problem when several different
population variances are involved" (Biometrika 34, 1947).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

import numpy as np
import pandas as pd
from scipy import stats

from .records import RunResult, StudyResults

LEVEL = 0.95
COLUMNS = ["run", "variant", "batch", "seed", "score", "value"]


class Interval(NamedTuple):
    """A mean or difference, and the ends of its interval; None if there are too few values."""

    mean: float
    low: Optional[float] = None
    high: Optional[float] = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low * self.high > 0


def contrast(
    plus: Sequence[Sequence[float]], minus: Sequence[Sequence[float]] = (), level: float = LEVEL
) -> Optional[Interval]:
    """Sum of the means of `plus` minus that of the means of `minus`, with Welch's interval.

        d ± t(level, v) * sqrt(sum of s²/n)
        v = (sum of s²/n)² / sum of (s²/n)²/(n - 1)

    over all samples; for a single sample, v = n - 1, this is Student's interval of its mean.
    Values are assumed independent and normally distributed; variances may differ. That runs of one
    seed share the order of the images is not used.

    Returns:
        None if a sample is empty; without an interval if one has a single value.
    """
    samples = [*plus, *minus]
    sizes = [len(sample) for sample in samples]
    if min(sizes) == 0:
        return None
    mean = float(sum(map(np.mean, plus)) - sum(map(np.mean, minus)))
    if min(sizes) < 2:
        return Interval(mean)
    shares = [float(np.var(sample, ddof=1)) / n for sample, n in zip(samples, sizes)]
    total = sum(shares)
    if total == 0:
        return Interval(mean, mean, mean)
    freedom = total**2 / sum(share**2 / (n - 1) for share, n in zip(shares, sizes))
    half = float(stats.t.interval(level, freedom)[1]) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half)


def score_table(results: Sequence[RunResult]) -> pd.DataFrame:
    """The scores of all finished runs in % in long form, with the columns `COLUMNS`."""
    rows = [
        (r.run.name, r.run.variant, r.run.batch, r.run.seed, score, value)
        for r in results
        for score, value in r.scores.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def scores_of(results: Sequence[RunResult], titles: Iterable[str]) -> list[str]:
    """Scores that any result has, in the order of `titles`; the first if there is none yet."""
    found = {score for result in results for score in result.scores}
    return [score for score in titles if score in found] or [*titles][:1]


def values_of(table: pd.DataFrame, variant: str, batch: int, score: str) -> list[float]:
    """The values of a variant at a batch, in the order of the runs."""
    wanted = (table.variant == variant) & (table.batch == batch) & (table.score == score)
    return table[wanted].value.tolist()


def means_over(
    table: pd.DataFrame, variant: str, batches: Sequence[int], score: str
) -> list[float]:
    """Each seed's mean over the batches; seeds with a missing run are skipped."""
    wanted = table[(table.variant == variant) & (table.score == score)]
    by_seed = wanted.pivot(index="seed", columns="batch", values="value")
    return by_seed.reindex(columns=[*batches]).dropna().mean(axis=1).tolist()


def differences(
    results: StudyResults, table: pd.DataFrame, pair: Sequence[str], score: str
) -> dict[str, Optional[Interval]]:
    """First minus second variant: at each batch, over all, and how it changes with the batch.

    Batches that a variant leaves out are skipped.
    """
    variants = results.study.variants
    batches = [
        batch
        for batch in sorted(results.study.batches)
        if all(not variants[name].runs or batch in variants[name].runs for name in pair)
    ]
    a, b = ({n: values_of(table, name, n, score) for n in batches} for name in pair)
    rows = {images(n): contrast([a[n]], [b[n]]) for n in batches}
    if len(batches) > 1:
        first, second = (means_over(table, name, batches, score) for name in pair)
        rows["all batches"] = contrast([first], [second])
    for other in batches[1:]:
        name = f"more at {images(batches[0])} than at {images(other)}"
        rows[name] = contrast([a[batches[0]], b[other]], [b[batches[0]], a[other]])
    return rows


def images(batch: int) -> str:
    return "1 image" if batch == 1 else f"{batch} images"
