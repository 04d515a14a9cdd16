"""AP over batch size, and learning curves of all variants at each batch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws_detectron.evaluation.coco_report import TITLES
from ws_detectron.evaluation.curves import line_style
from ws_detectron.evaluation.runs import ap_key, series

from .differences import summary
from .records import FINISHED, RunResult, tasks_of
from .spec import Study

LEGEND_WIDTH = 1.7
"""Inches for a column of the legend: its line, and a name like bn_ws_decay."""


def draw_ap_over_batch(study: Study, results: Sequence[RunResult]) -> Figure:
    """Mean AP of each variant over the batch, bars of one standard deviation; a panel per task."""
    tasks = tasks_of(results)
    figure = Figure(figsize=(1 + 4.6 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    batches = sorted(study.batches)
    for panel, task in zip(panels, tasks):
        for number, variant in enumerate(study.variants):
            found = [
                (batch, reached)
                for batch in batches
                if (reached := summary(results, variant.name, batch, task)) is not None
            ]
            if found:
                # bars of different variants stand beside each other
                shift = 1.02 ** (number - (len(study.variants) - 1) / 2)
                panel.errorbar(
                    [batch * shift for batch, _ in found],
                    [reached.mean for _, reached in found],
                    yerr=[reached.deviation or 0.0 for _, reached in found],
                    label=variant.name,
                    capsize=3,
                    **line_style(number),
                )
        panel.set_xscale("log", base=2)
        panel.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.set_xlabel(study.unit)
        panel.set_ylabel(f"{TITLES[task]} AP (per cent)")
    _finish(figure, panels)
    return figure


def draw_study_curves(study: Study, results: Sequence[RunResult]) -> Figure:
    """Loss and AP over the images seen: a column per batch, a row per quantity.

    Lines are means over the seeds that have finished (over all, where none has); the band is from
    the smallest to the largest.
    """
    keys = ["total_loss", *tasks_of(results)]
    batches = sorted(study.batches)
    size = (0.8 + 3.0 * len(batches), 0.8 + 2.4 * len(keys))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(keys), len(batches), squeeze=False, sharex=True, sharey="row")
    for row, key in zip(panels, keys):
        for panel, batch in zip(row, batches):
            for number, variant in enumerate(study.variants):
                runs = [r for r in results if (r.run.variant, r.run.batch) == (variant.name, batch)]
                done = [run for run in runs if run.status == FINISHED]
                images, values = _curves(done or runs, key)
                if len(images):
                    style = line_style(number)
                    markers = max(1, len(images) // 6)
                    mean = np.nanmean(values, 0)
                    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                    panel.plot(images, mean, label=variant.name, markevery=markers, **style)
                    panel.fill_between(images, low, high, color=style["color"], alpha=0.15, lw=0)
        name = "total loss" if key == "total_loss" else f"{TITLES[key]} AP"
        row[0].set_ylabel(name)
    for panel, batch in zip(panels[0], batches):
        unit = study.unit if batch > 1 else study.unit.replace("images", "image")
        panel.set_title(f"{batch} {unit}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("images seen")
        panel.locator_params(axis="x", nbins=5)  # numbers of five digits would touch
    _finish(figure, [*panels.flat])
    return figure


def _curves(runs: Sequence[RunResult], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images seen, and values (runs, positions) where any run has one; NaN where a run has none.

    A run that was killed in an evaluation lacks it: it resumes behind it.
    """
    curves = []
    for result in runs:
        name = key if key == "total_loss" else ap_key(result.metrics, key)
        iterations, values = series(result.metrics.rows, name)
        per_step = result.run.batch * result.run.processes
        # a last evaluation is written one iteration after the last step
        last = result.run.iterations
        curves.append({min(i + 1, last) * per_step: value for i, value in zip(iterations, values)})
    positions = sorted({position for curve in curves for position in curve})
    table = [[curve.get(position, math.nan) for position in positions] for curve in curves]
    return np.array(positions), np.array(table)


def _finish(figure: Figure, panels: Sequence[Axes]) -> None:
    """A grid, axes that start at 0, and one legend for all panels."""
    entries: dict[str, Any] = {}
    for panel in panels:
        panel.grid(True, linewidth=0.4, color="0.8")
        lines, names = panel.get_legend_handles_labels()
        if lines:
            panel.update_datalim([(panel.dataLim.x1, 0)])  # leaves room above what is highest
            panel.autoscale_view()
        panel.set_ylim(bottom=0)
        entries.update(zip(names, lines))
        if not lines:
            panel.text(0.5, 0.5, "no values", transform=panel.transAxes, ha="center")
    if entries:
        figure.legend(
            [*entries.values()],
            [*entries],
            loc="outside lower center",
            ncols=max(1, min(6, len(entries), int(figure.get_figwidth() / LEGEND_WIDTH))),
        )
