"""Scores of runs as samples, and differences of their means with intervals.

Needs the packages of the extra `lab`, see `runner.check_packages`. Source of the interval: Welch,
"The generalization of Student's problem when several different population variances are involved"
(Biometrika 34, 1947).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

import numpy as np
import pandas as pd
from scipy import stats

from .records import RunResult, StudyResults

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean or difference, and the ends of its interval; None if there are too few values."""

    mean: float
    low: Optional[float] = None
    high: Optional[float] = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low * self.high > 0


def contrast(
    plus: Sequence[Sequence[float]], minus: Sequence[Sequence[float]] = ()
) -> Optional[Interval]:
    """Sum of the means of `plus` minus that of the means of `minus`, with Welch's 95 % interval.

        d ± t(0.95, v) * sqrt(sum of s²/n)
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
    if min(sizes) == 1:
        return Interval(mean)
    shares = [float(np.var(sample, ddof=1)) / n for sample, n in zip(samples, sizes)]
    total = sum(shares)
    if total == 0:
        return Interval(mean, mean, mean)
    freedom = total**2 / sum(share**2 / (n - 1) for share, n in zip(shares, sizes))
    half = float(stats.t.interval(LEVEL, freedom)[1]) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half)


def scores_of(results: Sequence[RunResult], scores: Iterable[str]) -> list[str]:
    """Those of the scores that any result has; the first if there is none yet."""
    found = {score for result in results for score in result.scores}
    return [score for score in scores if score in found] or [*scores][:1]


def score_table(results: Sequence[RunResult], score: str) -> pd.DataFrame:
    """The values of a score in %, in long form: variant, batch, seed, value."""
    rows = [
        (r.run.variant, r.run.batch, r.run.seed, r.scores[score])
        for r in results
        if score in r.scores
    ]
    return pd.DataFrame(rows, columns=["variant", "batch", "seed", "value"])


def samples(results: Sequence[RunResult], score: str) -> dict[tuple[str, int], list[float]]:
    """(variant, batch) -> the values of its finished runs; an empty list if there are none."""
    groups = score_table(results, score).groupby(["variant", "batch"]).value
    return defaultdict(list, {key: group.tolist() for key, group in groups})


def differences(
    results: StudyResults, pair: Sequence[str], score: str
) -> dict[str, Optional[Interval]]:
    """First minus second variant: at each batch, over all, and how it changes with the batch.

    Over all batches, the values are each seed's mean; seeds with a missing run are skipped, and so
    are batches that a variant leaves out.
    """
    planned = [results.study.variants[name].runs or results.study.batches for name in pair]
    batches = sorted(set.intersection(*map(set, planned)))
    values = samples(results.runs, score)
    a, b = ({batch: values[name, batch] for batch in batches} for name in pair)
    rows = {images(batch): contrast([a[batch]], [b[batch]]) for batch in batches}
    if len(batches) > 1:
        table = score_table(results.runs, score).pivot(
            index=["variant", "seed"], columns="batch", values="value"
        )
        means = table.reindex(columns=batches).dropna().mean(axis=1)
        over_all = [means[means.index.get_level_values("variant") == name] for name in pair]
        rows["all batches"] = contrast(over_all[:1], over_all[1:])
    for other in batches[1:]:
        first = batches[0]
        name = f"more at {images(first)} than at {images(other)}"
        rows[name] = contrast([a[first], b[other]], [b[first], a[other]])
    return rows


def images(batch: int) -> str:
    return "1 image" if batch == 1 else f"{batch} images"
