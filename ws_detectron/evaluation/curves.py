"""Learning curves and AP curves of several runs."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws_detectron.utils.io import atomic_write

from .coco_eval import TASKS
from .coco_report import TITLES
from .drawing import as_label
from .runs import Run, ap_key, series, training_seconds

# Runs also differ in dashes and markers, for prints in black and white. The colours are those of
# Okabe and Ito, which colour-blind people can distinguish.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LEGEND_WIDTH = 1.7
"""Inches for a column of the legend: a line and a name like bn_ws_decay."""


def line_style(number: int) -> dict[str, Any]:
    """Arguments of matplotlib's `plot` for the n-th line of a figure."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def draw_learning_curves(runs: Sequence[Run]) -> Figure:
    """Total loss over iterations (left) and over training time (right)."""
    title = "total loss (median of 20 iterations)"
    return _draw(runs, {title: ["total_loss"] * len(runs)}, markers=8)


def draw_ap_curves(runs: Sequence[Run]) -> Figure:
    """Box AP (above) and mask AP over iterations (left) and over training time (right)."""
    keys = {task: [ap_key(run, task) for run in runs] for task in TASKS}
    drawn = [t for t in TASKS if any(series(r.rows, k)[0] for r, k in zip(runs, keys[t]))]
    return _draw(runs, {f"{TITLES[task]} AP (%)": keys[task] for task in drawn or TASKS[:1]})


def write_figure(figure: Figure, path: Union[str, Path]) -> Path:
    """Writes `path`, a `.png` or `.svg`, atomically; the same data give the same bytes."""
    path, packed = Path(path), io.BytesIO()
    metadata: dict[str, Any] = {"Date" if path.suffix == ".svg" else "Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "ws_detectron", "svg.fonttype": "path"}):
        figure.savefig(packed, format=path.suffix[1:], dpi=120, metadata=metadata)
    with atomic_write(path, "wb") as file:
        file.write(packed.getvalue())
    return path


def finish_figure(figure: Figure, panels: Iterable[Axes]) -> None:
    """Adds a grid to each panel, and one legend for all."""
    entries: dict[str, Any] = {}
    for panel in panels:
        panel.grid(True, linewidth=0.4, color="0.8")
        lines, names = panel.get_legend_handles_labels()
        entries.update(zip(names, lines))
    if entries:
        columns = max(1, min(6, len(entries), int(figure.get_figwidth() / LEGEND_WIDTH)))
        figure.legend([*entries.values()], [*entries], loc="outside lower center", ncols=columns)


def _draw(runs: Sequence[Run], rows: Mapping[str, Sequence[str]], markers: int = 0) -> Figure:
    """Draws metrics over iterations and over training time.

    Args:
        runs: runs without a metric are skipped there.
        rows: title -> name of the metric in each run; a row of panels each.
        markers: approximate number of markers along a line; 0: one at each value.
    """
    figure = Figure(figsize=(10, 0.7 + 3.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    unit, divisor = _time_unit(runs)
    for (left, right), (title, keys) in zip(panels, rows.items()):
        for number, (run, key) in enumerate(zip(runs, keys)):
            iterations, values = series(run.rows, key)
            if not iterations:
                continue
            style = {**line_style(number), "clip_on": False}  # an AP of 0 shows its whole marker
            if markers:
                # markers of different runs are shifted, as their curves may overlap
                step = max(1, len(values) // markers)
                style["markevery"] = (number * step // len(runs), step)
            left.plot([i + 1 for i in iterations], values, label=as_label(run.name), **style)
            seconds = training_seconds(run.rows, iterations)
            if len(seconds):
                right.plot(seconds / divisor, values, **style)
        left.set_ylabel(title)
        left.set_xlabel("iteration")
        right.set_xlabel(f"training time ({unit})")
        for panel in (left, right):
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
            if not left.lines:
                panel.text(0.5, 0.5, "no values", transform=panel.transAxes, ha="center")
    finish_figure(figure, panels.flat)
    return figure


def _time_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """Name and seconds of the largest unit of which the longest run takes at least two."""
    ends = [training_seconds(run.rows, [run.rows[-1]["iteration"]]) for run in runs if run.rows]
    longest = max((float(end[0]) for end in ends if len(end)), default=0.0)
    for unit, seconds in (("h", 3600.0), ("min", 60.0)):
        if longest >= 2 * seconds:
            return unit, seconds
    return "s", 1.0
