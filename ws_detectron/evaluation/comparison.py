"""Comparison of runs: metrics, differences to a baseline, and differing config keys."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

from tabulate import tabulate

from ws_detectron.modeling import REGISTRATIONS
from ws_detectron.utils.io import csv_text

from .coco_eval import COCO_METRICS, TASKS
from .coco_report import TITLES, UNDEFINED, format_metric
from .runs import Rows, Run, training_seconds

SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def as_markdown(runs: Sequence[Run]) -> str:
    """The comparison as Markdown; the first run is the baseline."""
    columns = [(t, m) for t in TASKS for m in SHOWN if any(f"{t}/{m}" in r.metrics for r in runs)]
    rows = []
    for run in runs:
        row = {"run": run.name}
        for task, metric in columns:
            value = format_metric(run.metrics.get(f"{task}/{metric}"))
            change = difference(run, runs[0], f"{task}/{metric}")
            shown = run is not runs[0] and change is not None
            row[f"{TITLES[task]} {metric}"] = f"{value} ({change:+.2f})" if shown else value
        iterations, seconds = effort(run.rows)
        row["iterations"] = str(iterations or UNDEFINED)
        row["training time"] = duration(seconds)
        row["s/iteration"] = format_metric(iterations and seconds and seconds / iterations, 3)
        rows.append({**row, "metrics from": run.source or UNDEFINED})
    configs = {run.name: run.config for run in runs if run.config}
    keys = differing_keys([*configs.values()])
    nowhere = "Nowhere." if len(configs) > 1 else "Fewer than two runs have a config."
    problems = [f"- {run.name}: {problem}" for run in runs for problem in run.problems]
    parts = [
        "# Comparison",
        f"Baseline: {runs[0].name}. Metrics in %, in brackets the difference to the baseline in "
        f"percentage points; {UNDEFINED}: undefined. Training time is that of the training steps, "
        "estimated from the median seconds per iteration in metrics.json, without evaluations, "
        "checkpoints and interruptions.",
        markdown_table(rows),
    ]
    if "DATASETS.TEST" in keys:
        parts.append("**Not all runs were evaluated on the same data: see DATASETS.TEST.**")
    parts += ["## Where the configs differ", settings_table(configs, keys) if keys else nowhere]
    if problems:
        parts += ["## Missing or broken", "\n".join(problems)]
    return "\n\n".join(parts) + "\n"


def as_csv(runs: Sequence[Run]) -> str:
    """The comparison as CSV: all metrics, differences and differing config keys.

    One line per run, the baseline first; undefined and missing values are empty.
    """
    names = [f"{t}/{n}" for t in TASKS for n in COCO_METRICS]
    names = [name for name in names if any(name in run.metrics for run in runs)]
    keys = differing_keys([run.config for run in runs if run.config])
    header: list[Any] = ["run", *names, *(f"{name} - baseline" for name in names)]
    rows = [[*header, "iterations", "training_seconds", "source", *keys, "problems"]]
    for run in runs:
        metrics = [run.metrics.get(name) for name in names]
        changes = [difference(run, runs[0], name) for name in names]
        rest = [*effort(run.rows), run.source, *map(run.config.get, keys), "; ".join(run.problems)]
        rows.append([run.name, *metrics, *changes, *rest])
    return csv_text(rows)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in GitHub's Markdown, of rows that map headers to text."""
    escaped = [{key: text.replace("|", "\\|") for key, text in row.items()} for row in rows]
    return tabulate(escaped, headers="keys", tablefmt="github", disable_numparse=True)


def differing_keys(
    configs: Sequence[Mapping[str, Any]], ignored: Collection[str] = ("OUTPUT_DIR",)
) -> list[str]:
    """Config keys, except ignored ones, that differ between configs, or that some of them lack."""
    keys = sorted({key for config in configs for key in config}.difference(ignored))
    missing = object()
    values = {key: [config.get(key, missing) for config in configs] for key in keys}
    return [key for key in keys if any(value != values[key][0] for value in values[key])]


def settings_table(configs: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A Markdown table of config keys, a column for each config.

    A switch of MODEL.WS is undefined where the config has no part with WS that it would turn on.
    """

    def shown(config: Mapping[str, Any], key: str) -> str:
        if key not in config or _without_effect(config, key):
            return UNDEFINED
        return f"`{config[key]}`" if config[key] != "" else "`''`"

    return markdown_table(
        [
            {"key": f"`{key}`", **{name: shown(config, key) for name, config in configs.items()}}
            for key in keys
        ]
    )


def _without_effect(config: Mapping[str, Any], key: str) -> bool:
    """Whether a key is a switch of MODEL.WS for parts that are all detectron2's own."""
    node, _, switch = key.rpartition(".")
    rows = [row for row in REGISTRATIONS if switch in row.norms and row.key in config]
    return node == "MODEL.WS" and bool(rows) and all(config[r.key] != r.name for r in rows)


def difference(run: Run, baseline: Run, name: str) -> Optional[float]:
    """A metric of a run minus that of the baseline; None if either is undefined."""
    value, reference = run.metrics.get(name), baseline.metrics.get(name)
    return None if value is None or reference is None else value - reference


def effort(rows: Rows) -> tuple[Optional[int], Optional[float]]:
    """Number of iterations, and seconds of training steps; see `training_seconds`."""
    steps = [row["iteration"] for row in rows if "total_loss" in row]
    if not steps:
        return None, None
    seconds = training_seconds(rows, [steps[-1]])
    return steps[-1] + 1, float(seconds[0]) if len(seconds) else None


def duration(seconds: Optional[float]) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return UNDEFINED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
