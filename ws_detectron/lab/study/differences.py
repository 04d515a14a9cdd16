"""Mean AP over the seeds of a variant, and differences of variants with intervals."""

from collections.abc import Sequence
from typing import Optional

from ws_detectron.evaluation.statistics import (
    Difference,
    Summary,
    contrast,
    difference,
    summarize,
)

from .records import RunResult


def values_of(
    results: Sequence[RunResult], variant: str, batch: int, task: str
) -> dict[int, float]:
    """Seed -> AP, for the finished runs of a variant at a batch."""
    return {
        result.run.seed: result.ap[task]
        for result in results
        if (result.run.variant, result.run.batch) == (variant, batch) and task in result.ap
    }


def summary(results: Sequence[RunResult], variant: str, batch: int, task: str) -> Optional[Summary]:
    return summarize([*values_of(results, variant, batch, task).values()])


def variant_difference(
    results: Sequence[RunResult], pair: tuple[str, str], batch: int, task: str
) -> Optional[Difference]:
    """AP of the first variant minus that of the second, at one batch."""
    first, second = (values_of(results, variant, batch, task) for variant in pair)
    return difference([*first.values()], [*second.values()])


def change_of_difference(
    results: Sequence[RunResult], pair: tuple[str, str], batches: tuple[int, int], task: str
) -> Optional[Difference]:
    """`variant_difference` at the first batch minus that at the second."""
    samples = {
        (variant, batch): [*values_of(results, variant, batch, task).values()]
        for variant in pair
        for batch in batches
    }
    (first, second), (here, there) = pair, batches
    return contrast(
        [samples[first, here], samples[second, there]],
        [samples[second, here], samples[first, there]],
    )


def overall_difference(
    results: Sequence[RunResult], pair: tuple[str, str], batches: Sequence[int], task: str
) -> Optional[Difference]:
    """AP of the first variant minus that of the second, of each seed's mean over the batches.

    Seeds with a missing run are skipped.
    """
    sides: list[list[float]] = []
    for variant in pair:
        by_batch = [values_of(results, variant, batch, task) for batch in batches]
        complete = set.intersection(*(set(values) for values in by_batch))
        sides.append(
            [sum(values[seed] for values in by_batch) / len(by_batch) for seed in sorted(complete)]
        )
    return difference(sides[0], sides[1])


def pairs_of_batches(batches: Sequence[int]) -> list[tuple[int, int]]:
    """The smallest batch paired with each other one, for `change_of_difference`."""
    smallest, *others = sorted(batches)
    return [(smallest, other) for other in others]
