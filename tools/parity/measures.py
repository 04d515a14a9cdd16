"""The figures of a comparison and the limits they must keep."""

from dataclasses import dataclass

import torch

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest relative difference of a tensor, |a - b| / max |a|, by precision."""


@dataclass
class Measure:
    """One figure.

    Attributes:
        what: the tensor or property.
        value: what was measured.
        limit: what is allowed; `value` may be equal to it.
        at_least: whether `limit` is a lower one.
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
    """One measure for each `what`: the one furthest out."""
    found: dict[str, Measure] = {}
    for measure in measures:
        known = found.get(measure.what)
        sign = -1 if measure.at_least else 1
        if known is None or sign * measure.value > sign * known.value:
            found[measure.what] = measure
    return list(found.values())
