"""Runs side by side: a table of figures, differences to a baseline, and where configs differ."""

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
    """The comparison as text; the first run is the baseline.

    Differences stand behind the figures of the other runs, in points of per cent.
    """
    columns = [(t, n) for t in TASKS for n in SHOWN if any(f"{t}/{n}" in r.figures for r in runs)]
    rows = []
    for run in runs:
        cells = [_with_difference(run, runs[0], f"{task}/{name}") for task, name in columns]
        iterations, seconds = effort(run)
        each = f"{seconds / iterations:.3f}" if iterations and seconds else UNDEFINED
        count = str(iterations) if iterations else UNDEFINED
        rows.append([run.name, *cells, count, duration(seconds), each, run.source or UNDEFINED])
    headers = ["run", *(f"{TITLES[task]} {name}" for task, name in columns)]
    headers += ["iterations", "training time", "s/iteration", "figures from"]
    parts = [
        "# Comparison",
        f"Baseline: {runs[0].name}. Per cent, in brackets the difference to the baseline; "
        f"{UNDEFINED} where there is no figure. Training time is that of the training steps, "
        "reconstructed from the median seconds per iteration in metrics.json; evaluations, "
        "checkpoints and interruptions are not in it.",
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
    """The comparison for programs: all figures, differences and differing config keys.

    One line per run, the baseline first; what is undefined or missing is empty.
    """
    names = [f"{t}/{n}" for t in TASKS for n in COCO_METRICS]
    names = [name for name in names if any(name in run.figures for run in runs)]
    keys = differing_keys(runs)
    header = ["run", *names, *(f"{name} - baseline" for name in names)]
    header += ["iterations", "training_seconds", "source", *keys, "problems"]
    rows = [header]
    for run in runs:
        differences = [difference(run, runs[0], name) for name in names]
        row: list[Any] = [run.name, *(run.figures.get(name) for name in names), *differences]
        row += [*effort(run), run.source, *(run.config.get(key) for key in keys)]
        rows.append([*row, "; ".join(run.problems)])
    return csv_text(rows)


def difference(run: Run, baseline: Run, name: str) -> Optional[float]:
    """Figure of a run less that of the baseline; None where either is undefined."""
    own, theirs = run.figures.get(name), baseline.figures.get(name)
    return None if own is None or theirs is None else own - theirs


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Config keys that are not the same in all runs that have a config, but OUTPUT_DIR."""
    configs = [run.config for run in runs if run.config]
    keys = sorted({key for config in configs for key in config} - set(NOT_COMPARED))
    missing = object()
    return [
        key
        for key in keys
        if any(config.get(key, missing) != configs[0].get(key, missing) for config in configs)
    ]


def effort(run: Run) -> tuple[Optional[int], Optional[float]]:
    """Iterations trained, and seconds of training steps; see `training_seconds`."""
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
    text = format_metric(run.figures.get(name))
    change = difference(run, baseline, name)
    return text if run is baseline or change is None else f"{text} ({change:+.2f})"


def _value(run: Run, key: str) -> str:
    return f"`{run.config[key]!r}`" if key in run.config else UNDEFINED
