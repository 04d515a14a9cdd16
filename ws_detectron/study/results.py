"""What the cells of a study reached, and what a search found."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ws_detectron.evaluation.coco_eval import TASKS
from ws_detectron.evaluation.runs import Run, ap_key, read_run
from ws_detectron.evaluation.statistics import (
    Difference,
    Summary,
    contrast,
    difference,
    summarize,
)

from .cell_state import FAILED, FINISHED, CellState, has_lost, read_state
from .cells import Cell, Values
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
    if record.get("starts", 1) > 1:
        notes.append(f"resumed: {record['starts']} starts")
    return CellResult(cell, state, run, ap, record, tuple(notes))


def final_ap(run: Run, tasks: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """AP of the last evaluation, and notes on it.

    A detector that finds nothing at all has no AP in detectron2's metrics. By COCO's rules it is 0,
    and left out it would make the mean of its arm look better than it is, so it counts as 0.
    """
    box = ap_key(run.rows, TASKS[0])
    evaluations = [row for row in run.rows if box in row]
    if not evaluations:
        return {}, ["it was never evaluated: DATASETS.TEST is empty"]
    values = {task: evaluations[-1].get(ap_key(run.rows, task), math.nan) for task in tasks}
    missing = [task for task, value in values.items() if not math.isfinite(value)]
    notes = ["it detects nothing: AP counts as 0"] if missing else []
    return {task: value if task not in missing else 0.0 for task, value in values.items()}, notes


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


def tasks_of(results: Sequence[CellResult]) -> list[str]:
    """Tasks of which there is any AP; box AP where there is none yet."""
    return [task for task in TASKS if any(task in result.ap for result in results)] or [TASKS[0]]


def score(result: CellResult) -> Optional[float]:
    """By what a search chooses: the mean of box and mask AP."""
    return sum(result.ap.values()) / len(result.ap) if result.ap else None


def choose(study: Study, results: Sequence[CellResult]) -> dict[tuple[str, int], Optional[Values]]:
    """(arm, searched batch) -> the combination with the highest mean of box and mask AP.

    A run whose training failed (a high LR may diverge) loses; None where all did, and as long as
    not all have ended. The earlier in the grid wins a tie.
    """
    choices: dict[tuple[str, int], Optional[Values]] = {}
    if study.search is None:
        return choices
    for arm in study.arms:
        for batch in study.search.batches:
            tried = [r for r in results if (r.cell.arm, r.cell.batch) == (arm.name, batch)]
            best = max(tried, key=_rank)
            found = score(best) is not None and all(has_ended(result) for result in tried)
            choices[arm.name, batch] = best.cell.choice if found else None
    return choices


def has_ended(result: CellResult) -> bool:
    """Whether it is finished or has lost; another failure is tried again."""
    return result.word == FINISHED or has_lost(result.state)


def _rank(result: CellResult) -> float:
    reached = score(result)
    return -math.inf if reached is None else reached


def at_the_edge(study: Study, choice: Values) -> list[str]:
    """Keys whose chosen value is the least or greatest of three or more numbers, in any order.

    The best may lie beyond.
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


def read_record(folder: Path) -> dict[str, Any]:
    """A run's `RunRecord`; empty where there is none."""
    try:
        content = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
