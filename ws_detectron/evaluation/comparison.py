"""Comparison of runs: metrics, differences to a baseline, and differing config keys."""

from collections.abc import Sequence
from typing import Any, Optional

from tabulate import tabulate

from ws_detectron.utils.io import csv_text

from .coco_eval import COCO_METRICS, TASKS
from .coco_report import TITLES, UNDEFINED, format_metric
from .runs import Run, training_seconds

SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")
NOT_COMPARED = ("OUTPUT_DIR",)


def as_markdown(runs: Sequence[Run]) -> str:
    """The comparison as Markdown; the first run is the baseline."""
    columns = [(t, n) for t in TASKS for n in SHOWN if any(f"{t}/{n}" in r.metrics for r in runs)]
    rows = []
    for run in runs:
        metrics = [_with_difference(run, runs[0], f"{task}/{name}") for task, name in columns]
        iterations, seconds = effort(run)
        each = f"{seconds / iterations:.3f}" if iterations and seconds else UNDEFINED
        count = str(iterations) if iterations else UNDEFINED
        rows.append([run.name, *metrics, count, duration(seconds), each, run.source or UNDEFINED])
    headers = ["run", *(f"{TITLES[task]} {name}" for task, name in columns)]
    headers += ["iterations", "training time", "s/iteration", "metrics from"]
    parts = [
        "# Comparison",
        f"Baseline: {runs[0].name}. Metrics in %, in brackets the difference to the baseline in "
        f"percentage points; {UNDEFINED}: undefined. Training time is that of the training steps, "
        "estimated from the median seconds per iteration in metrics.json, without evaluations, "
        "checkpoints and interruptions.",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
    ]
    keys = differing_keys(runs)
    if "DATASETS.TEST" in keys:
        parts.append("**Not all runs were evaluated on the same data: see DATASETS.TEST.**")
    with_config = [run for run in runs if run.config]
    parts.append("## Where the configs differ")
    if keys:
        table = [[f"`{key}`", *(_value(run, key) for run in with_config)] for key in keys]
        names = ["key", *(run.name for run in with_config)]
        parts.append(tabulate(table, names, tablefmt="github", disable_numparse=True))
    else:
        parts.append("Nowhere." if len(with_config) > 1 else "Fewer than two runs have a config.")
    problems = [f"- {run.name}: {problem}" for run in runs for problem in run.problems]
    if problems:
        parts += ["## Missing or broken", "\n".join(problems)]
    return "\n\n".join(parts) + "\n"


def as_csv(runs: Sequence[Run]) -> str:
    """The comparison as CSV: all metrics, differences and differing config keys.

    One line per run, the baseline first; undefined and missing values are empty.
    """
    names = [f"{t}/{n}" for t in TASKS for n in COCO_METRICS]
    names = [name for name in names if any(name in run.metrics for run in runs)]
    keys = differing_keys(runs)
    header = ["run", *names, *(f"{name} - baseline" for name in names)]
    header += ["iterations", "training_seconds", "source", *keys, "problems"]
    rows = [header]
    for run in runs:
        differences = [difference(run, runs[0], name) for name in names]
        row: list[Any] = [run.name, *(run.metrics.get(name) for name in names), *differences]
        row += [*effort(run), run.source, *(run.config.get(key) for key in keys)]
        rows.append([*row, "; ".join(run.problems)])
    return csv_text(rows)


def difference(run: Run, baseline: Run, name: str) -> Optional[float]:
    """A metric of a run minus that of the baseline; None if either is undefined."""
    value, reference = run.metrics.get(name), baseline.metrics.get(name)
    return None if value is None or reference is None else value - reference


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Config keys, except OUTPUT_DIR, that differ between the runs that have a config."""
    configs = [run.config for run in runs if run.config]
    keys = sorted({key for config in configs for key in config} - set(NOT_COMPARED))
    missing = object()
    return [
        key
        for key in keys
        if any(config.get(key, missing) != configs[0].get(key, missing) for config in configs)
    ]


def effort(run: Run) -> tuple[Optional[int], Optional[float]]:
    """Number of iterations, and seconds of training steps; see `training_seconds`."""
    steps = [row["iteration"] for row in run.rows if "total_loss" in row]
    if not steps:
        return None, None
    seconds = training_seconds(run.rows, [steps[-1]])
    return steps[-1] + 1, float(seconds[0]) if len(seconds) else None


def duration(seconds: Optional[float]) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return UNDEFINED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _with_difference(run: Run, baseline: Run, name: str) -> str:
    text = format_metric(run.metrics.get(name))
    change = difference(run, baseline, name)
    return text if run is baseline or change is None else f"{text} ({change:+.2f})"


def _value(run: Run, key: str) -> str:
    return f"`{run.config[key]!r}`" if key in run.config else UNDEFINED
