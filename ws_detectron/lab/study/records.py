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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import ConfigError
from ws_detectron.evaluation.runs import Rows, Run, ap_key, merge_rows, read_run
from ws_detectron.utils.io import csv_text, locked, write_json, write_text

from .plan import Choices, StudyRun
from .study_file import Study, Values

STATE, OUTPUT, RUN_RECORD = "run.json", "run.log", "run_record.json"  # in a run's folder
RUNS, METRICS, LOCK = "runs.jsonl", "metrics.csv", ".lock"  # in the folder of records
FORMAT = 1

# A stopped run stays "running", and resumes from its checkpoint. A diverged run had an infinite
# loss or NaN, a failed one any other error.
RUNNING, FINISHED, DIVERGED, FAILED = "running", "finished", "diverged", "failed"

# Keys that may change between starts of a run, as they do not change the result
MAY_CHANGE = ("OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "DATASETS.REGISTER")
# Keys that may change once a run has ended: all of a run should be trained on one device
DEVICE = ("MODEL.DEVICE", "device")


@dataclass(frozen=True)
class Record:
    """What is stored of a run."""

    state: str
    settings: Values
    reason: str = ""  # why it diverged or failed
    seconds: Optional[float] = None  # of its last process, with start-up and evaluations
    rows: Rows = field(default_factory=list)
    run_record: Values = field(default_factory=dict)  # its run_record.json, if any


Records = Mapping[str, Record]  # name of a run -> its record


@dataclass(frozen=True)
class RunResult:
    """A run and its results."""

    run: StudyRun
    record: Optional[Record] = None  # None if it was never started
    scores: dict[str, float] = field(default_factory=dict)  # in %; empty unless it finished
    notes: tuple[str, ...] = ()  # for the report

    @property
    def status(self) -> str:
        return self.record.state if self.record else "not started"

    @property
    def has_ended(self) -> bool:
        """Whether it is recorded and not trained again: finished, or in a search diverged.

        For a search, divergence is a result; outside of it, a diverged run is tried again.
        """
        return self.status == FINISHED or (self.run.searching and self.status == DIVERGED)

    @property
    def starts(self) -> int:
        """Number of processes that have trained it."""
        return int(self.record.run_record.get("starts", 1)) if self.record else 0

    @property
    def mean(self) -> Optional[float]:
        """The criterion of a search: the mean of box and mask AP."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else None


@dataclass(frozen=True)
class StudyResults:
    """A study and the results of its runs."""

    study: Study
    runs: Sequence[RunResult]  # without those of the search
    search: Sequence[RunResult] = ()
    choices: Choices = field(default_factory=dict)


def choose(results: Sequence[RunResult]) -> Choices:
    """(variant, searched batch) -> the combination with the highest mean of box and mask AP.

    A run that diverged is never chosen. None if all runs diverged, or until all have ended. Of
    equal combinations the first in the grid is chosen.
    """
    tried: dict[tuple[str, int], list[RunResult]] = {}
    for result in results:
        tried.setdefault((result.run.variant, result.run.batch), []).append(result)
    choices: dict[tuple[str, int], Optional[Values]] = {}
    for where, some in tried.items():
        best = max(some, key=lambda result: -math.inf if result.mean is None else result.mean)
        found = best.mean is not None and all(result.has_ended for result in some)
        choices[where] = best.run.choice if found else None
    return choices


def read_state(run: StudyRun) -> Optional[Record]:
    """What `write_state` wrote; None for a run that was never started.

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
) -> None:
    """Writes a run's state."""
    content = {"state": state, "settings": run.settings, "reason": reason, "seconds": seconds}
    write_json(run.folder / STATE, content)


def read_result(run: StudyRun, records: Records) -> RunResult:
    """The result of a run, also if it was never started or has failed; changes no file.

    Args:
        run: a run of the study or its search.
        records: as returned by `read_records`; one of a run that has ended takes precedence over
            the run's folder.

    Raises:
        ConfigError: the folder or the record has other settings than the run.
    """
    state, record = read_state(run), records.get(run.name)
    if record is not None:
        _check_settings(run, record, f"the record of {run.name}", "its line in runs.jsonl")
    if state is not None and not RunResult(run, record).has_ended:
        about: Any = {}
        with suppress(OSError, ValueError):
            about = json.loads((run.folder / RUN_RECORD).read_text("utf-8"))
        about = about if isinstance(about, dict) else {}
        record = replace(state, rows=read_run(run.folder, "").rows, run_record=about)
    if record is None:
        return RunResult(run)
    record = replace(record, rows=_with_plain_keys(run, record))
    scores: dict[str, float] = {}
    notes = [f"{record.state.upper()}: {record.reason}"] if record.reason else []
    if record.state == FINISHED:
        scores, notes = final_scores(run, record.rows)
    return RunResult(run, record, scores, tuple(notes))


def _with_plain_keys(run: StudyRun, record: Record) -> Rows:
    """The rows, with the AP of the first of several test sets under the plain name, too."""
    rows = merge_rows(record.rows)  # earlier versions have recorded them as they were written
    read = Run(run.name, run.folder, config=record.settings, rows=rows)
    keys = {score: ap_key(read, score.partition("/")[0]) for score in run.scores} if run.cfg else {}
    return [{**row, **{s: row[key] for s, key in keys.items() if key in row}} for row in rows]


def final_scores(run: StudyRun, rows: Rows) -> tuple[dict[str, float], list[str]]:
    """The scores at the end, not the best ones, and notes on them.

    A detector without any prediction has no AP in detectron2's metrics. By COCO's rules it is 0,
    and skipping it would raise the mean of its variant, so it counts as 0.

    Args:
        run: a command's last row has all its scores; a detector's last evaluation has box AP.
        rows: rows of metrics.json.
    """
    detector = run.cfg is not None
    ends = [row for row in rows if run.scores[0] in row] if detector else rows
    values = {score: ends[-1].get(score, math.nan) if ends else math.nan for score in run.scores}
    missing = [score for score, value in values.items() if not math.isfinite(value)]
    if not missing:
        return values, []
    if not detector:
        return {}, [f"the last line of metrics.json has no {', '.join(missing)}"]
    if not ends:
        return {}, ["it was never evaluated: DATASETS.TEST is empty"]
    return {**values, **dict.fromkeys(missing, 0.0)}, ["it detects nothing: AP counts as 0"]


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
        path = folder / METRICS
        # also of runs without a line, if the process was killed between writing the two files
        rows: defaultdict[str, Rows] = defaultdict(list)
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                name = row.pop("run")
                rows[name].append({key: json.loads(value) for key, value in row.items() if value})
        for run in runs:
            found, count = rows[run["name"]], run["rows"]
            if len(found) != count:
                raise ConfigError(
                    f"{path} has {len(found)} of {count} rows of {run['name']}; restore it"
                )
            run.update(rows=found, settings={**shared["settings"], **run["settings"]})
        return {run.pop("name"): Record(**run) for run in runs}
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
    settings = [record.settings for record in records.values()]
    texts = [{(key, json.dumps(value)) for key, value in some.items()} for some in settings]
    common = {key for key, _ in set.intersection(*texts)}
    shared = {key: value for key, value in settings[0].items() if key in common}
    lines: list[Values] = [{"format": FORMAT, "title": title, "settings": shared}]
    for name, record in records.items():
        own = {key: value for key, value in record.settings.items() if key not in common}
        # with the number of rows, a metrics.csv that was cut is told from a whole one
        lines.append({"name": name, **asdict(record), "settings": own, "rows": len(record.rows)})
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
    free = {*MAY_CHANGE, *(DEVICE if RunResult(run, record).has_ended else ())}
    # keys that only one of them has come with another version of detectron2
    differing = {
        key: f"{key} was {record.settings[key]!r} and is {value!r}"
        for key, value in run.settings.items()
        if key not in free and record.settings.get(key, value) != value
    }
    if differing:
        remedy = f"Give the study another `output`, or delete {what}"
        if not differing.keys().isdisjoint(DEVICE):
            remedy += ", or finish it with the --device it was begun on"
        changes = "; ".join(differing.values())
        raise ConfigError(f"{where} holds a run with other settings: {changes}. {remedy}")
