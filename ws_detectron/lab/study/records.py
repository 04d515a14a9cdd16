"""What is known of a study's runs, from their folders and from the study's records.

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import ConfigError
from ws_detectron.evaluation.coco_eval import TASKS
from ws_detectron.evaluation.runs import Run, ap_key, merge_rows, read_run
from ws_detectron.utils.io import csv_text, write_json, write_text
from ws_detectron.utils.locking import locked

from .plan import StudyRun, Values
from .study_file import Study

STATE, OUTPUT, RUN_RECORD = "run.json", "run.log", "run_record.json"  # in a run's folder
RUNS, METRICS, LOCK = "runs.jsonl", "metrics.csv", ".lock"  # in the folder of records
FORMAT = 1
STORED = ("state", "settings", "reason", "seconds")  # in run.json; the rest has its own files

RUNNING, FINISHED, DIVERGED, FAILED = "running", "finished", "diverged", "failed"

# Keys that may change between starts of a run, as they do not change the result
MAY_CHANGE = ("OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "DATASETS.REGISTER")
# Keys that may change once a run has ended: all of a run should be trained on one device
DEVICE = ("MODEL.DEVICE", "device")


@dataclass(frozen=True)
class Record:
    """What is stored of a run.

    Args:
        state: "running" (also if its process was stopped: it then resumes from its checkpoint),
            "finished", "diverged" (its loss became infinite or NaN) or "failed" (any other error).
        settings: those of the run.
        reason: why it diverged or failed.
        seconds: wall time of its last process, including start-up and evaluations.
        rows: lines of its metrics.json, see `merge_rows`.
        run_record: its run_record.json, see `engine.hooks.RunRecord`; empty if there is none.
    """

    state: str
    settings: dict[str, Any]
    reason: str = ""
    seconds: Optional[float] = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    run_record: dict[str, Any] = field(default_factory=dict)


Records = Mapping[str, Record]  # name of a run -> its record


@dataclass(frozen=True)
class RunResult:
    """A run and its results.

    Args:
        run: the run.
        record: None if it was never started.
        keys: score ("bbox", "segm", or a metric of a command) -> its name in the rows.
        scores: score -> value in % at the end of training; empty unless it finished.
        notes: remarks for the report.
    """

    run: StudyRun
    record: Optional[Record] = None
    keys: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """The state's name; "running" includes runs that were interrupted."""
        return self.record.state if self.record else "not started"

    @property
    def is_recorded(self) -> bool:
        """Whether the run has ended for good: it is finished, or diverged in a search.

        For a search, divergence is a result; outside of it, a diverged run is tried again.
        """
        return self.status == FINISHED or (self.run.searching and self.status == DIVERGED)

    @property
    def mean(self) -> Optional[float]:
        """The criterion of a search: the mean of box and mask AP."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else None


@dataclass(frozen=True)
class StudyResults:
    """A study and the results of its runs.

    Args:
        study: the study.
        runs: results without those of the search, in order.
        search: results of the search; empty without one.
        choices: what the search has found, see `choose`.
    """

    study: Study
    runs: Sequence[RunResult]
    search: Sequence[RunResult] = ()
    choices: Mapping[tuple[str, int], Optional[Values]] = field(default_factory=dict)


def choose(study: Study, results: Sequence[RunResult]) -> dict[tuple[str, int], Optional[Values]]:
    """(variant, searched batch) -> the combination with the highest mean of box and mask AP.

    A run that diverged is never chosen. None if all runs diverged, or until all have ended. Of
    equal combinations the first in the grid is chosen.
    """
    choices: dict[tuple[str, int], Optional[Values]] = {}
    for result in results:
        where = result.run.variant, result.run.batch
        if where in choices:
            continue
        tried = [r for r in results if (r.run.variant, r.run.batch) == where]
        best = max(tried, key=lambda r: -math.inf if r.mean is None else r.mean)
        found = best.mean is not None and all(r.is_recorded for r in tried)
        choices[where] = best.run.choice if found else None
    return choices


def read_state(run: StudyRun) -> Optional[Record]:
    """The state that `write_state` wrote; None for a run that was never started.

    Raises:
        ConfigError: the folder holds a run with other settings; names the keys.
    """
    path = run.folder / STATE
    try:
        record = Record(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is broken: {error}; delete the folder to start again") from error
    _check_settings(run, record, str(run.folder), "the folder")
    return record


def write_state(
    run: StudyRun, state: str, *, reason: str = "", seconds: Optional[float] = None
) -> Record:
    """Writes and returns a run's state."""
    record = Record(state, run.settings, reason, seconds)
    stored = {key: value for key, value in asdict(record).items() if key in STORED}
    write_json(run.folder / STATE, stored)
    return record


def read_result(run: StudyRun, records: Records) -> RunResult:
    """The result of a run, also if it was never started or has failed; changes no file.

    Args:
        run: a run of the study or its search.
        records: as returned by `read_records`; the run's folder is used only if its state is
            further.

    Raises:
        ConfigError: the folder or the record has other settings than the run.
    """
    own, recorded = read_state(run), records.get(run.name)
    if recorded is not None:
        _check_settings(run, recorded, f"the record of {run.name}", "its line in runs.jsonl")
    if own is None and recorded is None:
        return RunResult(run)
    if recorded is None or (own and _order(RunResult(run, own)) < _order(RunResult(run, recorded))):
        assert own is not None
        rows = read_run(run.folder, run.name).rows
        record = replace(own, rows=rows, run_record=_read_run_record(run.folder))
    else:
        record = replace(recorded, rows=merge_rows(recorded.rows))
    keys = {score: score for score in run.scores} or _ap_keys(run, record)
    scores, notes = final_scores(run, record.rows, keys)
    if record.state != FINISHED:
        scores, notes = {}, [f"{record.state.upper()}: {record.reason}"] if record.reason else []
    starts = record.run_record.get("starts", 1)
    if starts > 1:
        notes.append(f"resumed: {starts} starts")
    return RunResult(run, record, keys, scores, tuple(notes))


def _order(result: RunResult) -> int:
    """0 for a finished run, 1 for one that diverged in a search, else 2."""
    return 2 - result.is_recorded - (result.status == FINISHED)


def _ap_keys(run: StudyRun, record: Record) -> dict[str, str]:
    tasks = TASKS if run.settings["MODEL.MASK_ON"] else TASKS[:1]
    read = Run(run.name, run.folder, config=record.settings, rows=record.rows)
    return {task: ap_key(read, task) for task in tasks}


def final_scores(
    run: StudyRun, rows: Sequence[dict[str, Any]], keys: Mapping[str, str]
) -> tuple[dict[str, float], list[str]]:
    """The scores at the end, not the best ones, and notes on them.

    A detector without any prediction has no AP in detectron2's metrics. By COCO's rules it is 0,
    and skipping it would raise the mean of its variant, so it counts as 0.

    Args:
        run: its last row has all scores of a command; a detector's last evaluation has boxes.
        rows: lines of metrics.json.
        keys: score -> name in the rows.
    """
    first = next(iter(keys.values()))
    evaluated = rows[-1:] if run.scores else [row for row in rows if first in row]
    last = evaluated[-1] if evaluated else {}
    values = {score: last.get(key) for score, key in keys.items()}
    scores = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    if len(scores) == len(keys):
        return scores, []
    if run.scores:
        missing = ", ".join(key for key in keys if key not in scores)
        return {}, [f"the last line of metrics.json has no {missing}"]
    if not last:
        return {}, ["it was never evaluated: DATASETS.TEST is empty"]
    return {k: scores.get(k, 0.0) for k in keys}, ["it detects nothing: AP counts as 0"]


def _read_run_record(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RUN_RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_records(folder: Optional[Path]) -> dict[str, Record]:
    """The records of a study by the names of its runs; empty if there are no files.

    Raises:
        ConfigError: a file is damaged; names it.
    """
    path = (folder or Path()) / RUNS
    if folder is None or not path.is_file():
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
        records = {}
        for run in runs:
            name, count = run.pop("name"), run.pop("rows")
            if len(rows[name]) != count:
                raise ConfigError(
                    f"{path} has {len(rows[name])} of {count} rows of {name}; restore it"
                )
            run["settings"] = {**shared["settings"], **run["settings"]}
            records[name] = Record(**run, rows=rows[name])
        return records
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {type(error).__name__}: {error}; restore it"
        ) from error


def write_records(folder: Path, title: str, records: Records) -> None:
    """Writes both files, each atomically; a run is recorded once `runs.jsonl` names it.

    Args:
        folder: folder of the records.
        title: title of the study.
        records: for all runs.

    Raises:
        UserError: a file cannot be written.
    """
    texts = [
        {(key, json.dumps(value)) for key, value in record.settings.items()}
        for record in records.values()
    ]
    common = set.intersection(*texts)
    shared: dict[str, Any] = {}
    lines: list[dict[str, Any]] = [{"format": FORMAT, "title": title, "settings": shared}]
    for name, record in records.items():
        own: dict[str, Any] = {}
        for key, value in record.settings.items():
            (shared if (key, json.dumps(value)) in common else own)[key] = value
        # with the number of rows, a metrics.csv that was cut is told from a whole one
        content = {**asdict(record), "settings": own, "rows": len(record.rows)}
        lines.append({"name": name, **content})
    keys = {key for record in records.values() for row in record.rows for key in row}
    columns = ["iteration", *sorted(keys - {"iteration"})]
    table = [
        [name, *(json.dumps(row[key]) if key in row else "" for key in columns)]
        for name, record in records.items()
        for row in record.rows
    ]
    write_text(folder / METRICS, csv_text([["run", *columns], *table]))
    write_text(folder / RUNS, "".join(json.dumps(line) + "\n" for line in lines))


def add_records(folder: Path, title: str, records: Records) -> None:
    """Adds records, which replace earlier ones of the same runs.

    Raises:
        UserError: a file cannot be read or written.
    """
    if records:
        with locked(folder / LOCK, busy=None):
            write_records(folder, title, {**read_records(folder), **records})


def _check_settings(run: StudyRun, record: Record, where: str, what: str) -> None:
    # keys that only one of them has come with another version of detectron2
    ended = RunResult(run, record).is_recorded
    differing = {
        key: f"{key} was {record.settings[key]!r} and is {value!r}"
        for key, value in run.settings.items()
        if key in record.settings
        and record.settings[key] != value
        and key not in (*MAY_CHANGE, *(DEVICE if ended else ()))
    }
    if differing:
        device = ", or finish it with the --device it was begun on"
        raise ConfigError(
            f"{where} holds a run with other settings: {'; '.join(differing.values())}. Give the "
            f"study another `output`, or delete {what}"
            + (device if differing.keys() & {*DEVICE} else "")
        )
