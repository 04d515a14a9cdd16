"""Chooses the values that a variant's runs train with from the results of a search."""

import math
from collections.abc import Sequence
from typing import Optional

from .plan import Values
from .records import DIVERGED, FINISHED, RunResult
from .spec import Study


def score(result: RunResult) -> Optional[float]:
    """The criterion of a search: the mean of box and mask AP."""
    return sum(result.ap.values()) / len(result.ap) if result.ap else None


def choose(study: Study, results: Sequence[RunResult]) -> dict[tuple[str, int], Optional[Values]]:
    """(variant, searched batch) -> the combination with the highest mean of box and mask AP.

    A run that diverged is never chosen. None if all runs diverged, or until all have ended. Of
    equal combinations the first in the grid is chosen.
    """
    choices: dict[tuple[str, int], Optional[Values]] = {}
    if study.search is None:
        return choices
    for variant in study.variants:
        for batch in study.search.batches:
            tried = [r for r in results if (r.run.variant, r.run.batch) == (variant.name, batch)]
            best = max(tried, key=_rank)
            found = score(best) is not None and all(has_ended(result) for result in tried)
            choices[variant.name, batch] = best.run.choice if found else None
    return choices


def has_ended(result: RunResult) -> bool:
    """Whether a run finished or diverged; after other failures it is tried again."""
    return result.status in (FINISHED, DIVERGED)


def _rank(result: RunResult) -> float:
    reached = score(result)
    return -math.inf if reached is None else reached


def at_the_edge(study: Study, choice: Values) -> list[str]:
    """Keys whose chosen value is the smallest or largest of three or more numbers.

    The best value may be outside the grid.
    """
    if study.search is None:
        return []
    return [
        key
        for key, values in study.search.grid.items()
        if len(values) > 2
        and all(isinstance(value, (int, float)) for value in values)
        and choice[key] in (min(values), max(values))
    ]
