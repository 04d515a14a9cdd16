"""Finished runs, gathered by what they have in common but the seed."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ws_detectron.errors import UserError

from .model import REPORT_GROUPS
from .recipe import RECIPE
from .run_files import HISTORY, RESULT, TEST_LOGITS, read_json
from .training_settings import first_difference
from .variants import ARMS, REPORT_ORDER

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
"""(arm, batch size) -> seconds per epoch on a GPU, test accuracy in per cent: Ehling and Rouault,
IIT, April 2019. Its "WS" never acted, so its GN+WS rows are GN."""


@dataclass(frozen=True)
class FinishedRun:
    """One training that has ended.

    Attributes:
        name: of its folder.
        folder: where it lies; None where only its record is left.
        settings: of `TrainingSettings.as_dict`.
        history: an entry for each epoch.
        result: the content of result.json.
    """

    name: str
    folder: Optional[Path]
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    result: dict[str, Any]

    def test_logits(self) -> Optional[np.ndarray]:
        """(images, 10) float32, of the chosen epoch; None where only the record is left."""
        return None if self.folder is None else np.load(self.folder / TEST_LOGITS)

    def as_record(self) -> dict[str, Any]:
        """All but weights and logits, as JSON values."""
        return {"name": self.name, **self.result, "history": self.history}


@dataclass(frozen=True)
class Cell:
    """Runs that differ in nothing but the seed.

    Attributes:
        arm, order, groups, batch_size: their settings.
        runs: by seed.
    """

    arm: str
    order: str
    groups: int
    batch_size: int
    runs: Sequence[FinishedRun]

    @property
    def title(self) -> str:
        """The arm, and what differs from the report's model."""
        changes = [f"{self.groups} groups"] if self.groups != REPORT_GROUPS else []
        changes += [f"{self.order} order"] if self.order != REPORT_ORDER else []
        return ", ".join([ARMS[self.arm].title, *changes])

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each run, in per cent."""
        return [100 * run.result["test_accuracy"] for run in self.runs]

    @property
    def accuracy(self) -> float:
        """Mean over seeds, in per cent."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> Optional[float]:
        """Standard deviation (n - 1) over seeds, in points; None of a single run."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def seconds(self) -> float:
        """Median time of a training epoch."""
        return statistics.median(entry["seconds"] for run in self.runs for entry in run.history)

    @property
    def reported(self) -> Optional[tuple[float, float]]:
        """The report's row, where it has one for this model."""
        same = (self.order, self.groups) == (REPORT_ORDER, REPORT_GROUPS)
        return REPORTED.get((self.arm, self.batch_size)) if same else None


def read_records(folder: Path) -> list[FinishedRun]:
    """What an earlier report in `folder` recorded; empty without one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORDS
    content: Any = read_json(path, "take it from where it came from, or choose another --report")
    try:
        return [
            FinishedRun(
                record["name"],
                None,
                record["settings"],
                record["history"],
                {k: v for k, v in record.items() if k not in ("name", "history")},
            )
            for record in content or []
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the records of trainings") from error


def read_runs(folder: Path, records: Sequence[FinishedRun] = ()) -> list[FinishedRun]:
    """All finished runs in the folders below `folder`, and the recorded ones, by name.

    Args:
        folder: holds a folder for each run.
        records: of runs whose folders may be gone; a folder goes before its record.

    Raises:
        UserError: there are none, a file of one is damaged, or a folder is of another run than the
            record of that name.
    """
    runs = {record.name: record for record in records}
    for path in sorted(folder.glob(f"*/{RESULT}")):
        result: Any = read_json(path)
        history: Any = read_json(path.with_name(HISTORY))
        try:
            name = path.parent.name
            run = FinishedRun(name, path.parent, result["settings"], list(history), result)
            _check_alike(runs.get(name, run), run, run.settings)
            runs[name] = run
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not of a finished training; delete its folder") from error
    if not runs:
        raise UserError(f"{folder} holds no finished trainings (*/{RESULT})")
    return [runs[name] for name in sorted(runs)]


def gather(runs: Sequence[FinishedRun]) -> list[Cell]:
    """By batch size, then in the order of `ARMS`, the report's model before its variants.

    Raises:
        UserError: runs of a cell differ in more than the seed, or any in what is `SHARED`, or one
            had another recipe than `RECIPE`.
    """
    for run in runs:
        _check_alike(runs[0], run, SHARED)
        recipe = run.result.get("recipe", RECIPE)  # older results do not name it
        if recipe != RECIPE:
            raise UserError(
                f"{run.folder or f'the record of {run.name}'} was made by the recipe {recipe}, not "
                f"{RECIPE}; choose another --output-dir or --report"
            )
    groups: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in runs:
        s = run.settings
        key = s["batch_size"], list(ARMS).index(s["arm"]), s["order"] != REPORT_ORDER, -s["groups"]
        groups.setdefault(key, []).append(run)
    cells = []
    for key in sorted(groups):
        members = sorted(groups[key], key=lambda run: run.settings["seed"])
        first = members[0].settings
        for other in members[1:]:
            _check_alike(members[0], other, [name for name in other.settings if name != "seed"])
        cells.append(
            Cell(first["arm"], first["order"], first["groups"], first["batch_size"], members)
        )
    return cells


def _check_alike(first: FinishedRun, second: FinishedRun, names: Iterable[str]) -> None:
    difference = first_difference(first.settings, second.settings, names)
    if difference:
        name, one, other = difference
        places = [str(run.folder or f"the record of {run.name}") for run in (first, second)]
        raise UserError(
            f"{' and '.join(places)} cannot be in one report: their {name} is {one!r} and "
            f"{other!r}; choose another --output-dir or --report, or delete one of them"
        )
