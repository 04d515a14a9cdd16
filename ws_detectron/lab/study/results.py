"""What the cells of a study reached."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ws_detectron.evaluation.coco_eval import TASKS
from ws_detectron.evaluation.runs import Run, ap_key, read_run

from .cell_state import FAILED, FINISHED, CellState, read_state
from .cells import Cell
from .spec import Study

RECORD = "run_record.json"


@dataclass(frozen=True)
class CellResult:
    """A cell and what is in its folder.

    Args:
        cell: the cell.
        state: None if it was never started.
        run: its config and metrics, as far as they go; the name is the cell's.
        ap: task -> AP in per cent at the end of training; empty unless it finished.
        record: of the training engine's `RunRecord`; empty where there is none.
        notes: what a reader has to know of these figures.
    """

    cell: Cell
    state: Optional[CellState]
    run: Run
    ap: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """The state in a word; "running" includes cells that were interrupted."""
        return self.state.state if self.state else "not started"


@dataclass(frozen=True)
class StudyResults:
    """A study with all that was run of it.

    Args:
        study: the study.
        cells: of the study proper, all that were asked for, in order.
        search: of its search; empty without one.
    """

    study: Study
    cells: Sequence[CellResult]
    search: Sequence[CellResult]


def read_results(cells: Sequence[Cell]) -> list[CellResult]:
    """Results in the order of the cells."""
    return [read_result(cell) for cell in cells]


def read_result(cell: Cell) -> CellResult:
    """What a cell has reached, also where it was never started or has failed.

    Raises:
        ConfigError: its folder holds a run of other settings.
    """
    state = read_state(cell)
    if state is None:
        return CellResult(cell, None, Run(cell.name, cell.folder))
    run = read_run(cell.folder, cell.name)
    notes = [f"FAILED: {state.reason}"] if state.state == FAILED else []
    ap: dict[str, float] = {}
    if state.state == FINISHED:
        ap, more = final_ap(run, ["bbox", "segm"] if cell.settings["MODEL.MASK_ON"] else ["bbox"])
        notes += more
    record = read_record(cell.folder)
    if not record and (cell.folder / RECORD).is_file():
        notes.append(f"{RECORD} is damaged: machine, time and memory are unknown")
    if record.get("starts", 1) > 1:
        notes.append(f"resumed: {record['starts']} starts")
    return CellResult(cell, state, run, ap, record, tuple(notes))


def final_ap(run: Run, tasks: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """AP of the last evaluation, and notes on it.

    A detector that finds nothing at all has no AP in detectron2's metrics. By COCO's rules it is 0,
    and left out it would make the mean of its arm look better than it is, so it counts as 0.
    """
    box = ap_key(run, TASKS[0])
    evaluations = [row for row in run.rows if box in row]
    if not evaluations:
        return {}, ["it was never evaluated: DATASETS.TEST is empty"]
    values = {task: evaluations[-1].get(ap_key(run, task), math.nan) for task in tasks}
    missing = [task for task, value in values.items() if not math.isfinite(value)]
    notes = ["it detects nothing: AP counts as 0"] if missing else []
    return {task: value if task not in missing else 0.0 for task, value in values.items()}, notes


def read_record(folder: Path) -> dict[str, Any]:
    """A run's `RunRecord`; empty where there is none."""
    try:
        content = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def tasks_of(results: Sequence[CellResult]) -> list[str]:
    """Tasks of which there is any AP; box AP where there is none yet."""
    return [task for task in TASKS if any(task in result.ap for result in results)] or [TASKS[0]]
