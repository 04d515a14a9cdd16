"""States and results of a study's runs, in their own folders and in the study's records.

A study may be run in several sessions, on machines whose disks do not last, so a folder of records
stores what the report and a search need of runs that have ended:

- `runs.jsonl`: the first line has the title and the settings that all runs share; then one line
  per run with its state, its other settings, and its `run_record.json`;
- `metrics.csv`: a row per line of the runs' `metrics.json`, a column per metric, each value in
  JSON, so that it is read back exactly.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import ConfigError
from ws_detectron.evaluation.coco_eval import TASKS
from ws_detectron.evaluation.runs import Run, ap_key, merge_rows, read_run
from ws_detectron.utils.io import csv_text, write_json, write_text
from ws_detectron.utils.locking import locked

from .plan import StudyRun
from .spec import Study

STATE, OUTPUT, RUN_RECORD = "run.json", "run.log", "run_record.json"  # in a run's folder
RUNS, METRICS, LOCK = "runs.jsonl", "metrics.csv", ".lock"  # in the folder of records
FORMAT = 1

RUNNING, FINISHED, DIVERGED, FAILED = "running", "finished", "diverged", "failed"

# Keys that may change between starts of a run, as they do not change the result
MAY_CHANGE = ("OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "DATASETS.REGISTER")
# Keys that may change once a run has ended: all of a run should be trained on one device
MAY_CHANGE_AFTER_END = ("MODEL.DEVICE",)


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Args:
        state: "running" (also if its process was stopped: it then resumes from its checkpoint),
            "finished", "diverged" (its loss became infinite or NaN) or "failed" (any other error).
        settings: the config of the run, by full key.
        reason: why it diverged or failed.
        seconds: wall time of its last process, including start-up and evaluations.
    """

    state: str
    settings: dict[str, Any]
    reason: str = ""
    seconds: Optional[float] = None


@dataclass(frozen=True)
class Record:
    """The record of a run.

    Args:
        state: its state.
        rows: lines of its metrics.json.
        run_record: its run_record.json, see `engine.hooks.RunRecord`; empty if there is none.
    """

    state: RunState
    rows: list[dict[str, Any]] = field(default_factory=list)
    run_record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """A run and its results.

    Args:
        run: the run.
        state: None if it was never started.
        metrics: its config and metrics.
        ap: task -> AP in % at the end of training; empty unless it finished.
        run_record: its run_record.json, see `engine.hooks.RunRecord`; empty if there is none.
        notes: remarks on these metrics for the report.
    """

    run: StudyRun
    state: Optional[RunState]
    metrics: Run
    ap: dict[str, float] = field(default_factory=dict)
    run_record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """The state's name; "running" includes runs that were interrupted."""
        return self.state.state if self.state else "not started"


@dataclass(frozen=True)
class StudyResults:
    """A study and the results of its runs.

    Args:
        study: the study.
        runs: results without those of the search, in order.
        search: results of the search; empty without one.
    """

    study: Study
    runs: Sequence[RunResult]
    search: Sequence[RunResult]


def read_state(run: StudyRun) -> Optional[RunState]:
    """The state that `write_state` wrote; None for a run that was never started.

    Raises:
        ConfigError: the folder holds a run with other settings; names the keys.
    """
    path = run.folder / STATE
    try:
        state = RunState(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is broken: {error}; delete the folder to start again") from error
    _check_settings(run, state, str(run.folder), "the folder")
    return state


def is_finished(run: StudyRun) -> bool:
    """Whether the run's folder says so; raises as `read_state` does."""
    state = read_state(run)
    return state is not None and state.state == FINISHED


def write_state(
    run: StudyRun, state: str, *, reason: str = "", seconds: Optional[float] = None
) -> RunState:
    """Writes and returns a run's state."""
    written = RunState(state, run.settings, reason, seconds)
    write_json(run.folder / STATE, asdict(written))
    return written


def failure_reason(path: Path) -> str:
    """Why a process failed: the last `error:` line of its log, else the last non-empty line."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote nothing"
    filled = [line.strip() for line in lines if line.strip()]
    errors = [line[len("error: ") :] for line in filled if line.startswith("error: ")]
    return (errors or filled or ["it wrote nothing"])[-1]


def read_records(folder: Optional[Path]) -> dict[str, Record]:
    """The records of a study by the names of its runs; empty if there are no files.

    Raises:
        ConfigError: a file is damaged; names it.
    """
    if folder is None:
        return {}
    path = folder / RUNS
    if not path.is_file():
        return {}
    try:
        shared, *runs = map(json.loads, path.read_text("utf-8").splitlines())
        if shared["format"] != FORMAT:
            raise ConfigError(f"{path} has format {shared['format']!r}; allowed: {FORMAT}")
        rows: dict[str, list[dict[str, Any]]] = {run["name"]: [] for run in runs}
        path = folder / METRICS
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                # a run is not listed if the process was killed between writing the two files
                rows.setdefault(row.pop("run"), []).append(
                    {key: json.loads(value) for key, value in row.items() if value}
                )
        for run in runs:
            if len(rows[run["name"]]) != run["rows"]:
                raise ConfigError(
                    f"{path} has {len(rows[run['name']])} of {run['rows']} rows of {run['name']}; "
                    "restore it"
                )
        path = folder / RUNS
        return {
            run["name"]: Record(
                RunState(
                    run["state"],
                    {**shared["settings"], **run["settings"]},
                    run["reason"],
                    run["seconds"],
                ),
                rows[run["name"]],
                run["run_record"],
            )
            for run in runs
        }
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {type(error).__name__}: {error}; restore it"
        ) from error


def write_records(folder: Path, title: str, records: Mapping[str, Record]) -> None:
    """Writes both files, each atomically; a run is recorded once `runs.jsonl` names it.

    Args:
        folder: folder of the records.
        title: title of the study.
        records: run name -> record, for all runs.

    Raises:
        UserError: a file cannot be written.
    """
    texts = {
        name: {(key, json.dumps(value)) for key, value in record.state.settings.items()}
        for name, record in records.items()
    }
    shared = set.intersection(*texts.values())
    first: dict[str, Any] = {"format": FORMAT, "title": title, "settings": {}}
    lines = [first]
    for name, record in records.items():
        own: dict[str, Any] = {}
        for key, value in record.state.settings.items():
            (first["settings"] if (key, json.dumps(value)) in shared else own)[key] = value
        state = {**asdict(record.state), "settings": own}
        rows = {"rows": len(record.rows)}  # a metrics.csv that was cut is told from a whole one
        lines.append({"name": name, **state, **rows, "run_record": record.run_record})
    keys = sorted({key for record in records.values() for row in record.rows for key in row})
    columns = ["iteration", *(key for key in keys if key != "iteration")]
    table = [
        [name, *(json.dumps(row[key]) if key in row else "" for key in columns)]
        for name, record in records.items()
        for row in record.rows
    ]
    write_text(folder / METRICS, csv_text([["run", *columns], *table]))
    write_text(folder / RUNS, "".join(json.dumps(line) + "\n" for line in lines))


def add_records(folder: Path, title: str, records: Mapping[str, Record]) -> None:
    """Adds records, which replace earlier ones of the same runs.

    Raises:
        UserError: a file cannot be read or written.
    """
    if records:
        with locked(folder / LOCK, busy=None):
            write_records(folder, title, {**read_records(folder), **records})


def is_recorded(run: StudyRun, state: Optional[RunState]) -> bool:
    """Whether a run in this state is recorded: it is finished, or diverged in a search.

    For a search, divergence is a result; outside of it, a diverged run is tried again.
    """
    return _rank(run, state) < _NOT_ENDED


def folder_record(run: StudyRun, state: RunState) -> Record:
    """The record of a run, from the files in its folder and its state."""
    return Record(state, read_run(run.folder, run.name).rows, read_run_record(run.folder))


def read_results(runs: Sequence[StudyRun], records: Mapping[str, Record]) -> list[RunResult]:
    """Results in the order of the runs."""
    return [read_result(run, records) for run in runs]


def read_result(run: StudyRun, records: Mapping[str, Record]) -> RunResult:
    """The result of a run, also if it was never started or has failed; changes no file.

    Args:
        run: a run of the study or its search.
        records: as returned by `read_records`; the run's folder is used only if its state is
            further.

    Raises:
        ConfigError: the folder or the record has other settings than the run.
    """
    state, record = read_state(run), records.get(run.name)
    if record is not None:
        _check_settings(run, record.state, f"the record of {run.name}", "its line in runs.jsonl")
    damaged = False
    if record is None or _rank(run, state) < _rank(run, record.state):
        if state is None:
            return RunResult(run, None, Run(run.name, run.folder))
        record = folder_record(run, state)
        damaged = not record.run_record and (run.folder / RUN_RECORD).is_file()
    state = record.state
    metrics = Run(run.name, run.folder, config=state.settings, rows=merge_rows(record.rows))
    notes = [f"{state.state.upper()}: {state.reason}"] if state.state in (DIVERGED, FAILED) else []
    ap: dict[str, float] = {}
    if state.state == FINISHED:
        ap, more = final_ap(metrics, TASKS[: 2 if run.settings["MODEL.MASK_ON"] else 1])
        notes += more
    if damaged:
        notes.append(f"{RUN_RECORD} is damaged: machine, time and memory are unknown")
    starts = record.run_record.get("starts", 1)
    if starts > 1:
        notes.append(f"resumed: {starts} starts")
    return RunResult(run, state, metrics, ap, record.run_record, tuple(notes))


def final_ap(run: Run, tasks: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """AP of the last evaluation, and notes on it.

    A detector without any prediction has no AP in detectron2's metrics. By COCO's rules it is 0,
    and skipping it would raise the mean of its variant, so it counts as 0.
    """
    box = ap_key(run, TASKS[0])
    evaluations = [row for row in run.rows if box in row]
    if not evaluations:
        return {}, ["it was never evaluated: DATASETS.TEST is empty"]
    values = {task: evaluations[-1].get(ap_key(run, task), math.nan) for task in tasks}
    missing = [task for task, value in values.items() if not math.isfinite(value)]
    notes = ["it detects nothing: AP counts as 0"] if missing else []
    return {task: value if task not in missing else 0.0 for task, value in values.items()}, notes


def read_run_record(folder: Path) -> dict[str, Any]:
    """A run's run_record.json; empty if there is none."""
    try:
        content = json.loads((folder / RUN_RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def tasks_of(results: Sequence[RunResult]) -> list[str]:
    """Tasks with an AP in any result; boxes alone if there is none yet."""
    return [task for task in TASKS if any(task in result.ap for result in results)] or [TASKS[0]]


_NOT_ENDED = 2


def _rank(run: StudyRun, state: Optional[RunState]) -> int:
    """0 for a finished run, 1 for one that diverged in a search, else `_NOT_ENDED`."""
    if state is not None and state.state == FINISHED:
        return 0
    diverged = state is not None and state.state == DIVERGED
    return 1 if run.searching and diverged else _NOT_ENDED


def _check_settings(run: StudyRun, state: RunState, where: str, what: str) -> None:
    # keys that only one of them has come with another version of detectron2
    free = (*MAY_CHANGE, *MAY_CHANGE_AFTER_END) if is_recorded(run, state) else MAY_CHANGE
    differing = {
        key: f"{key} was {state.settings[key]!r} and is {value!r}"
        for key, value in run.settings.items()
        if key in state.settings and state.settings[key] != value and key not in free
    }
    if differing:
        device = ", or finish it with the --device it was begun on"
        raise ConfigError(
            f"{where} holds a run with other settings: {'; '.join(differing.values())}. Give the "
            f"study another `output`, or delete {what}"
            + (device if "MODEL.DEVICE" in differing else "")
        )
