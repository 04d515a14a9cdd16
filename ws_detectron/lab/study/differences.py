"""AP over the seeds of an arm, and how arms differ, with intervals."""

from collections.abc import Sequence
from typing import Optional

from ws_detectron.evaluation.statistics import (
    Difference,
    Summary,
    contrast,
    difference,
    summarize,
)

from .results import CellResult


def values_of(results: Sequence[CellResult], arm: str, batch: int, task: str) -> dict[int, float]:
    """Seed -> AP of the finished cells of an arm at a batch."""
    return {
        result.cell.seed: result.ap[task]
        for result in results
        if (result.cell.arm, result.cell.batch) == (arm, batch) and task in result.ap
    }


def summary(results: Sequence[CellResult], arm: str, batch: int, task: str) -> Optional[Summary]:
    return summarize([*values_of(results, arm, batch, task).values()])


def arm_difference(
    results: Sequence[CellResult], pair: tuple[str, str], batch: int, task: str
) -> Optional[Difference]:
    """First arm less second, at one batch."""
    first, second = (values_of(results, arm, batch, task) for arm in pair)
    return difference([*first.values()], [*second.values()])


def change_of_difference(
    results: Sequence[CellResult], pair: tuple[str, str], batches: tuple[int, int], task: str
) -> Optional[Difference]:
    """By how much first arm less second is more at the first batch than at the second."""
    samples = {
        (arm, batch): [*values_of(results, arm, batch, task).values()]
        for arm in pair
        for batch in batches
    }
    (first, second), (here, there) = pair, batches
    return contrast(
        [samples[first, here], samples[second, there]],
        [samples[second, here], samples[first, there]],
    )


def overall_difference(
    results: Sequence[CellResult], pair: tuple[str, str], batches: Sequence[int], task: str
) -> Optional[Difference]:
    """First arm less second, over all batches: of each seed's mean over the batches.

    Seeds for which a cell is missing are left out.
    """
    sides: list[list[float]] = []
    for arm in pair:
        by_batch = [values_of(results, arm, batch, task) for batch in batches]
        complete = set.intersection(*(set(values) for values in by_batch))
        sides.append(
            [sum(values[seed] for values in by_batch) / len(by_batch) for seed in sorted(complete)]
        )
    return difference(sides[0], sides[1])


def pairs_of_batches(batches: Sequence[int]) -> list[tuple[int, int]]:
    """The smallest batch and each other one, for `change_of_difference`."""
    smallest, *others = sorted(batches)
    return [(smallest, other) for other in others]
