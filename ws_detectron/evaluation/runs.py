"""Reads the files of training runs, also of unfinished or damaged ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from detectron2.config import CfgNode

from ws_detectron.engine import as_flat_dict
from ws_detectron.errors import UserError
from ws_detectron.utils.yaml_files import load_yaml_with_base

from .coco_eval import COCO_METRICS, TASKS, Metrics
from .coco_report import FORMAT, JSON_NAME, format_metric

METRICS = "metrics.json"
CONFIG = "config.yaml"

Rows = list[dict[str, Any]]  # of metrics.json, one per iteration, in order; see `merge_rows`


@dataclass
class Run:
    """A run as read by `read_run`.

    Args:
        name: for tables and legends.
        path: folder or file.
        config: full config key -> value; empty if there is none.
        rows: rows of metrics.json, one per iteration, in order; see `merge_rows`.
        metrics: "bbox/AP" and so on -> %, None where undefined.
        source: file that the metrics come from.
        evaluation: folder of that file and of its curves, if tools/evaluate_coco.py wrote it.
        problems: what is missing or broken, each naming a file.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: Rows = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)
    source: str = ""
    evaluation: Optional[Path] = None
    problems: list[str] = field(default_factory=list)


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Reads runs from command-line arguments, `PATH` or `NAME=PATH`.

    Without a name, a run is named by the shortest end of its path that no other run has.

    Raises:
        UserError: two runs have one name.
    """
    named = [a.partition("=")[::2] if "=" in a else ("", a) for a in arguments]
    paths = [Path(path) for _, path in named]
    names = [name or _short(path, paths) for path, (name, _) in zip(paths, named)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are named {name}; give another name to one: NAME=PATH")
    return [read_run(path, name) for path, name in zip(paths, names)]


def _short(path: Path, others: Sequence[Path]) -> str:
    parts, all_parts = path.resolve().parts, [other.resolve().parts for other in others]
    for length in range(1, len(parts) + 1):
        if [other[-length:] for other in all_parts].count(parts[-length:]) == 1:
            return "/".join(parts[-length:])
    return str(path)


def read_run(path: Path, name: str) -> Run:
    """Reads a run folder, a `metrics.json`, or the JSON file of tools/evaluate_coco.py.

    Never fails: `problems` lists what is missing or broken.
    """
    run = Run(name, path)
    if not path.exists():
        run.problems.append(f"there is no run folder or file {path}")
    elif path.is_file() and path.name != METRICS:
        _read_evaluation(run, path)
    else:
        if path.is_dir():
            _read_config(run, path / CONFIG)
        _read_metrics(run, path / METRICS if path.is_dir() else path)
        evaluation = _find_evaluation(run)
        if evaluation:
            _read_evaluation(run, evaluation)
        else:
            _take_last_evaluation(run)
    return run


def _read_config(run: Run, path: Path) -> None:
    if not path.is_file():
        run.problems.append(f"{path} is missing")
        return
    try:
        run.config = as_flat_dict(CfgNode(load_yaml_with_base(path)))
    except (AssertionError, UserError) as error:  # AssertionError: a `_BASE_` that cannot be merged
        run.problems.append(f"{path} is not a YAML config: {_first_line(error)}")


def _read_metrics(run: Run, path: Path) -> None:
    if not path.is_file():
        run.problems.append(f"{path} is missing")
        return
    rows = []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row.get("iteration"), int):
                raise ValueError("no iteration")
            rows.append(row)
        except (ValueError, AttributeError) as error:
            run.problems.append(f"{path}, line {number} is broken: {_first_line(error)}")
    if not rows:
        run.problems.append(f"{path} holds no metrics: the run ended before it wrote any")
    run.rows = merge_rows(rows)


def merge_rows(rows: Rows) -> Rows:
    """Merges the lines that detectron2's JSONWriter wrote into one row per iteration, in order.

    A resumed run starts from its last checkpoint and appends, so rows that were written after that
    checkpoint are dropped, evaluations included. If two lines have the same iteration, their
    values are merged, and the later line takes precedence.
    """
    merged: dict[int, dict[str, Any]] = {}
    last_step = -1
    for row in rows:
        iteration = row["iteration"]
        if "total_loss" in row:
            if iteration <= last_step:
                merged = {i: kept for i, kept in merged.items() if i < iteration}
            last_step = iteration
        merged.setdefault(iteration, {}).update(row)
    return [merged[iteration] for iteration in sorted(merged)]


def training_seconds(rows: Rows, iterations: Sequence[int]) -> np.ndarray:
    """Wall time of training steps up to the end of given iterations.

    metrics.json has no timestamps, but `time`, the median seconds of the last 20 iterations. The
    time between two rows is estimated as their distance times the later row's median. It includes
    data loading, and excludes evaluations, checkpoints, start-up and interruptions. Iterations much
    slower than the median are underestimated.

    Args:
        rows: as returned by `merge_rows`.
        iterations: iterations, from 0.

    Returns:
        Seconds, interpolated between rows; empty if no row has a `time`.
    """
    timed = [row for row in rows if isinstance(row.get("time"), (int, float))]
    if not timed:
        return np.zeros(0)
    done = np.array([0, *(row["iteration"] + 1 for row in timed)])
    seconds = np.concatenate([[0], np.cumsum(np.diff(done) * [row["time"] for row in timed])])
    return np.interp(np.asarray(iterations) + 1, done, seconds)


def series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of a metric; values that are not finite numbers are skipped."""
    found = [(row["iteration"], row[key]) for row in rows if _is_finite(row.get(key))]
    return [iteration for iteration, _ in found], [value for _, value in found]


def ap_key(run: Run, task: str) -> str:
    """The key of a task's AP in metrics.json.

    With several test sets, that of the first in DATASETS.TEST, or without a config, of the first by
    name.
    """
    plain = f"{task}/AP"
    tested = [f"{name}/{plain}" for name in run.config.get("DATASETS.TEST", ())]
    found = {name for row in run.rows for name in row if name.endswith(plain)}
    return next((name for name in (plain, *tested, *sorted(found)) if name in found), plain)


def main_metrics(metrics: Mapping[str, Any]) -> str:
    """AP, PQ and mIoU among "bbox/AP" and so on, such as "bbox AP 40.6, segm AP 36.6"."""
    found = {k: v for k, v in metrics.items() if k.split("/")[-1] in ("AP", "PQ", "mIoU")}
    return ", ".join(f"{k.replace('/', ' ')} {format_metric(v, 1)}" for k, v in found.items())


def _find_evaluation(run: Run) -> Optional[Path]:
    """The JSON file of tools/evaluate_coco.py in a run folder; that of the first test set."""
    for place in (run.path / "inference", run.path):
        if (place / JSON_NAME).is_file():
            return place / JSON_NAME
    order = {name: number for number, name in enumerate(run.config.get("DATASETS.TEST", ()))}
    found = sorted(
        run.path.glob(f"inference/*/{JSON_NAME}"),
        key=lambda path: (order.get(path.parent.name, len(order)), path),
    )
    if len(found) > 1:
        names = ", ".join(path.parent.name for path in found)
        run.problems.append(
            f"{run.path} was evaluated on several data sets ({names}); the first is used, for "
            f"another give the path of its {JSON_NAME}"
        )
    return found[0] if found else None


def _read_evaluation(run: Run, path: Path) -> None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        run.problems.append(f"{path} is not JSON: {_first_line(error)}")
        return
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        run.problems.append(
            f"{path} is not an evaluation that tools/evaluate_coco.py wrote; for a results file, "
            "run it with --predictions and --annotations"
        )
        return
    found = {task: content.get(task) or {} for task in TASKS}
    run.metrics = {f"{task}/{name}": value for task in TASKS for name, value in found[task].items()}
    run.source, run.evaluation = path.name, path.parent


def _take_last_evaluation(run: Run) -> None:
    for task in TASKS:
        key = ap_key(run, task)
        last = next((row for row in reversed(run.rows) if key in row), None)
        if last is not None:
            for name in COCO_METRICS:
                if (value := last.get(f"{key[:-2]}{name}", ...)) is not ...:
                    run.metrics[f"{task}/{name}"] = value if _is_finite(value) else None
            run.source = f"{METRICS}, iteration {last['iteration']}"
    if run.rows and not run.metrics:
        run.problems.append(
            f"{run.path} was never evaluated: {METRICS} has no AP and there is no {JSON_NAME}; "
            "run tools/evaluate_coco.py on its checkpoint"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
