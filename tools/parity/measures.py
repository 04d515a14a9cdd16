"""Measures of a comparison and their limits."""

from dataclasses import dataclass

import torch

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest allowed relative difference, max |a - b| / max |a|, by dtype."""


@dataclass
class Measure:
    """One measured value.

    Attributes:
        what: the tensor or property.
        value: what was measured.
        limit: the largest allowed value.
        at_least: whether `limit` is the smallest allowed value instead.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def relative_difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """max |theirs - ours| / max |theirs|; infinite where shapes differ or a value is not finite."""
    if theirs.shape != ours.shape:
        return float("inf")
    difference = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def worst(measures: list[Measure]) -> list[Measure]:
    """The worst measure for each `what`."""
    found: dict[str, Measure] = {}
    for measure in measures:
        known = found.get(measure.what)
        sign = -1 if measure.at_least else 1
        if known is None or sign * measure.value > sign * known.value:
            found[measure.what] = measure
    return list(found.values())
