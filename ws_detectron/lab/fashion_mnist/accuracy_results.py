"""Finished runs, and groups of them that differ only in their seed."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ws_detectron.errors import UserError

from .training import HISTORY, RESULT, TEST_LOGITS, read_json
from .training_settings import (
    RECIPE,
    REPORT_GROUPS,
    REPORT_ORDER,
    VARIANTS,
    first_difference,
    with_current_names,
)

RECORDS = "runs.json"

SHARED = ("epochs", "schedule", "images", "amp")
"""Settings that all runs of one report have in common."""

REPORTED = {
    ("bn", 2): (255.0, 18.76),
    ("gn_ws", 2): (275.0, 91.86),
    ("bn", 32): (10.0, 92.49),
    ("gn_ws", 32): (20.0, 92.82),
    ("bn", 128): (7.0, 92.93),
    ("gn_ws", 128): (12.0, 92.90),
}
"""(variant, batch size) -> seconds per epoch on a GPU and test accuracy in %, as reported by Ehling
and Rouault, IIT, April 2019. Their WS had no effect, so their GN+WS is GN."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished training.

    Attributes:
        name: of its folder.
        folder: with its files; None if only its record exists.
        settings: as returned by `TrainingSettings.as_dict`.
        history: one entry per epoch.
        result: the content of result.json.
    """

    name: str
    folder: Optional[Path]
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    result: dict[str, Any]

    @classmethod
    def from_result(
        cls, name: str, folder: Optional[Path], result: dict[str, Any], history: Iterable[Any]
    ) -> "FinishedRun":
        settings = with_current_names(result["settings"])
        return cls(name, folder, settings, list(history), {**result, "settings": settings})

    def test_logits(self) -> Optional[np.ndarray]:
        """(images, 10) float32, of the chosen epoch; None if only the record exists."""
        return None if self.folder is None else np.load(self.folder / TEST_LOGITS)

    def as_record(self) -> dict[str, Any]:
        """Everything but weights and logits, as JSON values."""
        return {"name": self.name, **self.result, "history": self.history}


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seed, and the settings they share."""

    variant: str
    order: str
    groups: int
    batch_size: int
    runs: Sequence[FinishedRun]

    @property
    def title(self) -> str:
        """The variant, and what differs from the report's model."""
        changes = [f"{self.groups} groups"] if self.groups != REPORT_GROUPS else []
        changes += [f"{self.order} order"] if self.order != REPORT_ORDER else []
        return ", ".join([VARIANTS[self.variant].title, *changes])

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each run, in %."""
        return [100 * run.result["test_accuracy"] for run in self.runs]

    @property
    def accuracy(self) -> float:
        """Mean over seeds, in %."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> Optional[float]:
        """Standard deviation (n - 1) over seeds, in points; None for a single run."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def seconds(self) -> float:
        """Median time of a training epoch."""
        return statistics.median(entry["seconds"] for run in self.runs for entry in run.history)

    @property
    def reported(self) -> Optional[tuple[float, float]]:
        """The entry in `REPORTED`, if the report has this model."""
        same = (self.order, self.groups) == (REPORT_ORDER, REPORT_GROUPS)
        return REPORTED.get((self.variant, self.batch_size)) if same else None


def read_records(folder: Path) -> list[FinishedRun]:
    """The runs that an earlier report in `folder` recorded; empty without one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORDS
    content: Any = read_json(path, "restore it, or choose another --report")
    try:
        return [
            FinishedRun.from_result(
                record["name"],
                None,
                {k: v for k, v in record.items() if k not in ("name", "history")},
                record["history"],
            )
            for record in content or []
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the records of trainings") from error


def read_runs(folder: Path, records: Sequence[FinishedRun] = ()) -> list[FinishedRun]:
    """All finished runs with a folder in `folder`, and all recorded ones, sorted by name.

    Args:
        folder: holds a folder for each run.
        records: finished runs, whose folders may not exist; a folder replaces its record.

    Raises:
        UserError: there are none, a file is damaged, or a run has other settings than its record.
    """
    runs = {record.name: record for record in records}
    for path in sorted(folder.glob(f"*/{RESULT}")):
        result: Any = read_json(path)
        history: Any = read_json(path.with_name(HISTORY))
        name = path.parent.name
        try:
            run = FinishedRun.from_result(name, path.parent, result, history)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not of a finished training; delete its folder") from error
        _check_alike(runs.get(name, run), run, run.settings)
        runs[name] = run
    if not runs:
        raise UserError(f"{folder} holds no finished trainings (*/{RESULT})")
    return [runs[name] for name in sorted(runs)]


def group_runs(runs: Sequence[FinishedRun]) -> list[RunGroup]:
    """Groups of runs, sorted by batch size, variant, and the report's model first.

    Raises:
        UserError: runs of a group differ in more than the seed, any two runs in what is `SHARED`,
            or one had another recipe than `RECIPE`.
    """
    for run in runs:
        _check_alike(runs[0], run, SHARED)
        recipe = run.result.get("recipe", RECIPE)  # older results do not name it
        if recipe != RECIPE:
            raise UserError(
                f"{run.folder or f'the record of {run.name}'} was trained with the recipe {recipe},"
                f" not {RECIPE}; choose another --output or --report"
            )
    members: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in runs:
        s = run.settings
        variant = list(VARIANTS).index(s["variant"])
        key = s["batch_size"], variant, s["order"] != REPORT_ORDER, -s["groups"]
        members.setdefault(key, []).append(run)
    groups = []
    for key in sorted(members):
        first, *others = sorted(members[key], key=lambda run: run.settings["seed"])
        for other in others:
            _check_alike(first, other, [name for name in other.settings if name != "seed"])
        shared = {k: first.settings[k] for k in ("variant", "order", "groups", "batch_size")}
        groups.append(RunGroup(**shared, runs=[first, *others]))
    return groups


def _check_alike(first: FinishedRun, second: FinishedRun, names: Iterable[str]) -> None:
    difference = first_difference(first.settings, second.settings, names)
    if difference:
        name, one, other = difference
        sources = [str(run.folder or f"the record of {run.name}") for run in (first, second)]
        raise UserError(
            f"{' and '.join(sources)} cannot be in one report: their {name} is {one!r} and "
            f"{other!r}; choose another --output or --report, or delete one of them"
        )
