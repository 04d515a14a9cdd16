"""Figures of studies: AP over batch size, AP of each variant at one batch, learning curves."""

import math
from collections.abc import Collection, Sequence
from typing import Any, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws_detectron.evaluation.coco_report import TITLES
from ws_detectron.evaluation.curves import line_style
from ws_detectron.evaluation.runs import ap_key, series
from ws_detectron.evaluation.statistics import LEVEL, mean_with_interval

from .differences import summary, values_of
from .records import FINISHED, RunResult, StudyResults, tasks_of
from .spec import Study

VARIANTS = {"bn": "BN", "gn": "GN", "bn_ws": "BN+WS", "gn_ws": "GN+WS"}
LEGEND_WIDTH = 1.7
"""Inches for a column of the legend: a line and a name like bn_ws_decay."""


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
                # shifted, so that bars do not overlap
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
        panel.set_ylabel(f"{TITLES[task]} AP (%)")
    _finish(figure, panels)
    return figure


def draw_ap_by_variant(study: Study, results: Sequence[RunResult]) -> Figure:
    """AP of each variant at the only batch: mean, 95 % interval, seeds; a panel per task."""
    (batch,) = study.batches
    tasks = tasks_of(results)
    figure = Figure(
        figsize=(1 + 4.2 * len(tasks), 1.2 + 0.45 * len(study.variants)), layout="constrained"
    )
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        _draw_variants(panel, study, results, batch, task, [v.name for v in study.variants])
    return figure


def draw_batches(
    studies: Sequence[StudyResults], batches: Optional[Collection[int]] = None
) -> Figure:
    """Box AP of each variant as `draw_ap_by_variant` draws it; a panel per study and batch.

    Args:
        studies: results of the studies, in the order of the panels.
        batches: batches to draw; None for all.
    """
    shown = [
        (results, batch)
        for results in studies
        for batch in sorted(results.study.batches)
        if batches is None or batch in batches
    ]
    rows = max(len(results.study.variants) for results, _ in shown)
    colours = [*dict.fromkeys(v.name for results, _ in shown for v in results.study.variants)]
    figure = Figure(figsize=(1 + 4.2 * len(shown), 1.5 + 0.45 * rows), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=True)[0]
    for panel, (results, batch) in zip(panels, shown):
        _draw_variants(panel, results.study, results.runs, batch, "bbox", colours)
        images = sorted({result.run.images for result in results.runs})
        seen = " or ".join(f"{count:,}" for count in images)
        panel.set_title(f"{_batch_title(results.study, batch)}\n{seen} images", fontsize=10)
    return figure


def _batch_title(study: Study, batch: int) -> str:
    """For example "1 image per step"."""
    return f"{batch} {study.unit if batch > 1 else study.unit.replace('images', 'image')}"


def _draw_variants(
    panel: Axes,
    study: Study,
    results: Sequence[RunResult],
    batch: int,
    task: str,
    colours: Sequence[str],
) -> None:
    """Draws a row for each variant, the first on top; `colours`: variants in order of colour."""
    for row, variant in enumerate(study.variants):
        values = [*values_of(results, variant.name, batch, task).values()]
        reached = mean_with_interval(values)
        if reached is None:
            continue
        colour = line_style(colours.index(variant.name))["color"]
        panel.plot(values, [row] * len(values), "|", color=colour, markersize=9, alpha=0.7)
        ends = (reached.low, reached.high)
        low, high = (reached.mean if end is None else end for end in ends)
        panel.plot([low, high], [row, row], color=colour, linewidth=5, alpha=0.25)
        panel.plot(reached.mean, row, "o", color=colour, markersize=6)
        panel.annotate(
            f"{reached.mean:.1f}", (reached.mean, row), (0, 7), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
    names = [variant.name for variant in study.variants]
    panel.set_yticks(range(len(names)), [VARIANTS.get(name, name) for name in names])
    panel.set_ylim(len(names) - 0.4, -0.7)
    panel.set_xlabel(f"{TITLES[task]} AP, mean and {LEVEL:.0%} interval")
    panel.grid(True, axis="x", linewidth=0.4, color="0.8")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def draw_study_curves(study: Study, results: Sequence[RunResult]) -> Figure:
    """Loss and AP over the images seen: a column per batch, a row per quantity.

    Lines are means over finished runs (over all, if none has finished); bands show the range.
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
        panel.set_title(_batch_title(study, batch), fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("images seen")
        panel.locator_params(axis="x", nbins=5)  # numbers of five digits would overlap
    _finish(figure, [*panels.flat])
    return figure


def _curves(runs: Sequence[RunResult], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images seen at which any run has a value, and the values (runs, positions).

    NaN where a run has no value: if it is killed in an evaluation, it resumes after it.
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
    """Adds a grid, axes that start at 0, and one legend for all panels."""
    entries: dict[str, Any] = {}
    for panel in panels:
        panel.grid(True, linewidth=0.4, color="0.8")
        lines, names = panel.get_legend_handles_labels()
        if lines:
            panel.update_datalim([(panel.dataLim.x1, 0)])  # room above the highest value
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
