"""Figures of studies: scores over batch size, by variant at a batch, and learning curves.

Needs the packages of the extra `lab`, see `runner.check_packages`.
"""

from collections.abc import Collection, Sequence
from typing import Any, Optional

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws_detectron.evaluation.curves import line_style, write_figure
from ws_detectron.evaluation.runs import series

from .records import FINISHED, StudyResults
from .scores import LEVEL, contrast, score_table, scores_of, values_of
from .study_file import Study

__all__ = ["draw_batches", "draw_over_batch", "draw_study_curves", "write_figure"]

NAMES = {"bn": "BN", "gn": "GN", "ln": "LN", "wn": "WN", "bn_ws": "BN+WS", "gn_ws": "GN+WS"}
LEGEND_WIDTH = 1.7
"""Inches for a column of the legend: a line and a name like bn_ws_decay."""


def draw_over_batch(results: StudyResults) -> Figure:
    """Mean of each variant over the batch, bars of one standard deviation; a panel per score."""
    study, table = results.study, score_table(results.runs)
    scores = scores_of(results.runs, study.scores)
    figure = Figure(figsize=(1 + 4.6 * len(scores), 4.2), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    batches = sorted(study.batches)
    groups = table.groupby(["score", "variant", "batch"]).value.agg(["mean", "std"]).fillna(0.0)
    for panel, score in zip(panels, scores):
        for number, variant in enumerate(study.variants):
            if (score, variant) in groups.index.droplevel("batch"):
                found = groups.loc[(score, variant)]
                # shifted, so that bars do not overlap
                shift = 1.02 ** (number - (len(study.variants) - 1) / 2)
                panel.errorbar(
                    found.index * shift,
                    found["mean"],
                    yerr=found["std"],
                    label=variant,
                    capsize=3,
                    **line_style(number),
                )
        panel.set_xscale("log", base=2)
        panel.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.set_xlabel(study.unit)
        panel.set_ylabel(f"{study.scores[score]} (%)")
        if study.detectors:  # an accuracy is far from 0
            _from_zero(panel)
    _finish(figure, panels)
    return figure


def draw_batches(
    studies: Sequence[StudyResults],
    batches: Optional[Collection[int]] = None,
    scores: Sequence[str] = (),
) -> Figure:
    """Score of each variant at a batch: mean, 95 % interval, seeds; a row per variant.

    Args:
        studies: results of the studies, in the order of the panels.
        batches: batches to draw, a panel each; None for all.
        scores: a panel for each; empty: the first alone.
    """
    shown = [
        (results, batch, score)
        for results in studies
        for batch in sorted(results.study.batches)
        if batches is None or batch in batches
        for score in scores or [*results.study.scores][:1]
    ]
    rows = max(len(results.study.variants) for results, *_ in shown)
    colours = [*dict.fromkeys(name for results, *_ in shown for name in results.study.variants)]
    figure = Figure(figsize=(1 + 4.2 * len(shown), 1.5 + 0.45 * rows), layout="constrained")
    one_scale = len(studies) > 1 or len(scores) < 2
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=one_scale)[0]
    for panel, (results, batch, score) in zip(panels, shown):
        study, table = results.study, score_table(results.runs)
        for row, variant in enumerate(study.variants):
            values = values_of(table, variant, batch, score)
            reached = contrast([values])
            if reached is None:
                continue
            colour = line_style(colours.index(variant))["color"]
            panel.plot(values, [row] * len(values), "|", color=colour, markersize=9, alpha=0.7)
            ends = [reached.mean if end is None else end for end in (reached.low, reached.high)]
            panel.plot(ends, [row, row], color=colour, linewidth=5, alpha=0.25)
            panel.plot(reached.mean, row, "o", color=colour, markersize=6)
            panel.annotate(
                f"{reached.mean:.1f}", (reached.mean, row), (0, 7), textcoords="offset points",
                ha="center", fontsize=9,
            )  # fmt: skip
        panel.set_yticks(range(len(study.variants)), [NAMES.get(n, n) for n in study.variants])
        panel.set_ylim(len(study.variants) - 0.4, -0.7)
        panel.set_xlabel(f"{study.scores[score]}, mean and {LEVEL:.0%} interval")
        panel.set_title(_panel_title(results, batch), fontsize=10)
        panel.grid(True, axis="x", linewidth=0.4, color="0.8")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    return figure


def draw_study_curves(results: StudyResults) -> Figure:
    """Loss and scores over the images seen: a column per batch, a row per quantity.

    Lines are means over finished runs (over all, if none has finished); bands show the range. A
    run that was killed in an evaluation resumes after it and has no value there.
    """
    study, batches = results.study, sorted(results.study.batches)
    scores = scores_of(results.runs, study.scores)
    titles = study.curves or {
        "total_loss": "total loss", **{score: study.scores[score] for score in scores}
    }  # fmt: skip
    table = _curves(results, [*titles])
    size = (0.8 + 3.0 * len(batches), 0.8 + 2.4 * len(titles))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(titles), len(batches), squeeze=False, sharex=True, sharey="row")
    for row, key in zip(panels, titles):
        for panel, batch in zip(row, batches):
            for number, variant in enumerate(study.variants):
                wanted = table.variant.eq(variant) & table.batch.eq(batch) & table.key.eq(key)
                curve = table[wanted].groupby("images").value.agg(["mean", "min", "max"])
                if len(curve):
                    style = {**line_style(number), "markevery": max(1, len(curve) // 6)}
                    panel.plot(curve.index, curve["mean"], label=variant, **style)
                    panel.fill_between(
                        curve.index, curve["min"], curve["max"],
                        color=style["color"], alpha=0.15, lw=0,
                    )  # fmt: skip
            if study.detectors or key == "total_loss":
                _from_zero(panel)
        row[0].set_ylabel(titles[key])
    for panel, batch in zip(panels[0], batches):
        panel.set_title(_batch_title(study, batch), fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("images seen")
        panel.locator_params(axis="x", nbins=5)  # numbers of five digits would overlap
    _finish(figure, [*panels.flat])
    return figure


def _curves(results: StudyResults, keys: Sequence[str]) -> pd.DataFrame:
    """Values over the images seen, in long form."""
    done = {(r.run.variant, r.run.batch) for r in results.runs if r.status == FINISHED}
    rows = []
    for result in results.runs:
        run, record = result.run, result.record
        if record is None or (result.status != FINISHED and (run.variant, run.batch) in done):
            continue
        per_step = run.batch * run.processes
        # a last evaluation is written one iteration after the last step
        last = run.images or float("inf")
        for key in keys:
            for iteration, value in zip(*series(record.rows, key)):
                seen = min((iteration + 1) * per_step, last)
                rows.append((run.variant, run.batch, key, seen, value))
    return pd.DataFrame(rows, columns=["variant", "batch", "key", "images", "value"])


def _batch_title(study: Study, batch: int) -> str:
    """For example "1 image per step"."""
    return f"{batch} {study.unit if batch > 1 else study.unit.replace('images', 'image')}"


def _panel_title(results: StudyResults, batch: int) -> str:
    seen = sorted({result.run.images for result in results.runs if result.run.images})
    counts = f"\n{' or '.join(f'{count:,}' for count in seen)} images" if seen else ""
    return f"{_batch_title(results.study, batch)}{counts}"


def _from_zero(panel: Axes) -> None:
    """Lets the y axis start at 0, with room above the highest value."""
    panel.update_datalim([(panel.dataLim.x1, 0)])
    panel.autoscale_view()
    panel.set_ylim(bottom=0)


def _finish(figure: Figure, panels: Sequence[Axes]) -> None:
    """Adds a grid, and one legend for all panels."""
    entries: dict[str, Any] = {}
    for panel in panels:
        panel.grid(True, linewidth=0.4, color="0.8")
        lines, names = panel.get_legend_handles_labels()
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
