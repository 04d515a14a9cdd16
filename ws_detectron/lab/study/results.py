"""What the runs of a study reached."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ws_detectron.evaluation.coco_eval import TASKS
from ws_detectron.evaluation.runs import Run, ap_key, read_run

from .plan import StudyRun
from .run_state import FAILED, FINISHED, RunState, read_state
from .spec import Study

RECORD = "run_record.json"


@dataclass(frozen=True)
class RunResult:
    """A run and what is in its folder.

    Args:
        run: the run.
        state: None if it was never started.
        metrics: its config and metrics, as far as they go; the name is that of the run.
        ap: task -> AP in per cent at the end of training; empty unless it finished.
        record: of the training engine's `RunRecord`; empty where there is none.
        notes: what a reader has to know of these figures.
    """

    run: StudyRun
    state: Optional[RunState]
    metrics: Run
    ap: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """The state in a word; "running" includes runs that were interrupted."""
        return self.state.state if self.state else "not started"


@dataclass(frozen=True)
class StudyResults:
    """A study with all that was run of it.

    Args:
        study: the study.
        runs: of the study proper, all that were asked for, in order.
        search: of its search; empty without one.
    """

    study: Study
    runs: Sequence[RunResult]
    search: Sequence[RunResult]


def read_results(runs: Sequence[StudyRun]) -> list[RunResult]:
    """Results in the order of the runs."""
    return [read_result(run) for run in runs]


def read_result(run: StudyRun) -> RunResult:
    """What a run has reached, also where it was never started or has failed.

    Raises:
        ConfigError: its folder holds a run of other settings.
    """
    state = read_state(run)
    if state is None:
        return RunResult(run, None, Run(run.name, run.folder))
    metrics = read_run(run.folder, run.name)
    notes = [f"FAILED: {state.reason}"] if state.state == FAILED else []
    ap: dict[str, float] = {}
    if state.state == FINISHED:
        tasks = TASKS[: 2 if run.settings["MODEL.MASK_ON"] else 1]
        ap, more = final_ap(metrics, tasks)
        notes += more
    record = read_record(run.folder)
    if not record and (run.folder / RECORD).is_file():
        notes.append(f"{RECORD} is damaged: machine, time and memory are unknown")
    if record.get("starts", 1) > 1:
        notes.append(f"resumed: {record['starts']} starts")
    return RunResult(run, state, metrics, ap, record, tuple(notes))


def final_ap(run: Run, tasks: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """AP of the last evaluation, and notes on it.

    A detector that finds nothing at all has no AP in detectron2's metrics. By COCO's rules it is 0,
    and left out it would make the mean of its variant look better than it is, so it counts as 0.
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


def tasks_of(results: Sequence[RunResult]) -> list[str]:
    """Tasks of which there is any AP; box AP where there is none yet."""
    return [task for task in TASKS if any(task in result.ap for result in results)] or [TASKS[0]]
