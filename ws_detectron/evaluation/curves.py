"""Learning curves and AP curves of several runs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import matplotlib
import numpy as np
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
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, squeeze=False)
    _draw_row(panels[0], runs, ["total_loss"] * len(runs), markers=8)
    panels[0][0].set_ylabel("total loss (median of 20 iterations)")
    _finish(figure, panels)
    return figure


def draw_ap_curves(runs: Sequence[Run]) -> Figure:
    """Box AP (above) and mask AP over iterations (left) and over training time (right)."""
    tasks = [t for t in TASKS if any(series(run.rows, ap_key(run, t))[0] for run in runs)]
    tasks = tasks or list(TASKS[:1])
    figure = Figure(figsize=(10, 0.7 + 3.5 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(panels, tasks):
        _draw_row(row, runs, [ap_key(run, task) for run in runs], markers=0)
        row[0].set_ylabel(f"{TITLES[task]} AP (%)")
    _finish(figure, panels)
    return figure


def write_figure(figure: Figure, path: Union[str, Path]) -> Path:
    """Writes `path`, a `.png` or `.svg`, atomically; the same data give the same bytes."""
    path, packed = Path(path), io.BytesIO()
    metadata: dict[str, Any] = {"Date" if path.suffix == ".svg" else "Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "ws_detectron", "svg.fonttype": "path"}):
        figure.savefig(packed, format=path.suffix[1:], dpi=120, metadata=metadata)
    with atomic_write(path, "wb") as file:
        file.write(packed.getvalue())
    return path


def _draw_row(
    panels: Sequence[Axes], runs: Sequence[Run], keys: Sequence[str], *, markers: int
) -> None:
    """Draws a metric over iterations and over training time.

    Args:
        panels: left and right.
        runs: runs without the metric are skipped.
        keys: name of the metric in each run.
        markers: approximate number of markers along a line; 0: one at each value.
    """
    unit, divisor = _time_unit(runs)
    panels[0].set_xlabel("iteration")
    panels[1].set_xlabel(f"training time ({unit})")
    drawn = False
    for number, (run, key) in enumerate(zip(runs, keys)):
        iterations, values = series(run.rows, key)
        if not iterations:
            continue
        drawn = True
        style = {**line_style(number), "clip_on": False}  # an AP of 0 shows its whole marker
        if markers:
            # markers of different runs are shifted, as their curves may overlap
            step = max(1, len(values) // markers)
            style["markevery"] = (number * step // max(1, len(runs)), step)
        panels[0].plot([i + 1 for i in iterations], values, label=as_label(run.name), **style)
        seconds = training_seconds(run.rows, iterations)
        if len(seconds):
            panels[1].plot(seconds / divisor, values, **style)
    for panel in panels:
        panel.grid(True, linewidth=0.4, color="0.8")
        panel.set_xlim(left=0)
        if not drawn:
            panel.text(0.5, 0.5, "no values", transform=panel.transAxes, ha="center")


def _time_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """Name and seconds of the largest unit of which the longest run takes at least two."""
    ends = [training_seconds(run.rows, [run.rows[-1]["iteration"]]) for run in runs if run.rows]
    longest = max((float(end[0]) for end in ends if len(end)), default=0.0)
    for unit, seconds in (("h", 3600.0), ("min", 60.0)):
        if longest >= 2 * seconds:
            return unit, seconds
    return "s", 1.0


def _finish(figure: Figure, panels: np.ndarray) -> None:
    """Adds one legend for all panels, and lets y axes start at 0, as no value is negative."""
    for panel in panels.flat:
        panel.set_ylim(bottom=0)
    lines, names = panels[0][0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(names)))
