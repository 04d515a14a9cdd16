"""Figures of studies: scores over batch size, by variant at a batch, and learning curves.

Needs the packages of the extra `lab`, see `runner.check_packages`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ws_detectron.evaluation.figure_style import (
    add_grid,
    add_title,
    finish_figure,
    line_styles,
    page_svg,
    same_limits,
)
from ws_detectron.evaluation.runs import series

from .records import FINISHED, StudyResults
from .report import LEVEL, contrast, samples, score_table, titles_of
from .study_file import Study

MANY = 6
"""More variants than this are drawn a row each: their lines could not be told apart."""
WIDTH = 0.36
"""Of the place of a batch, over which the variants are spread."""


def draw_scores(results: StudyResults, *, stacked: bool = False) -> Figure:
    """The scores of each variant: over the batch, or by variant for one batch or many variants.

    Args:
        results: of a study.
        stacked: panels below each other, for a narrow page.
    """
    study = results.study
    if len(study.batches) > 1 and len(study.variants) <= MANY:
        return draw_over_batch(results, stacked=stacked)
    scores = [*titles_of(study, results.runs)]
    return draw_batches([results], scores=scores, stacked=stacked)


def draw_over_batch(results: StudyResults, *, stacked: bool = False) -> Figure:
    """Mean of each variant over the batch, bars of one standard deviation; a panel per score.

    The variants stand side by side within the place of their batch.
    """
    study, titles = results.study, titles_of(results.study, results.runs)
    batches, styles = sorted(study.batches), _styles(study)
    offsets = dict(zip(styles, np.linspace(-WIDTH / 2, WIDTH / 2, len(styles))))
    figure, grid = _panels(1, len(titles), (4.6, 3.9), stacked)
    panels = [*grid.flat]
    for panel, (score, title) in zip(panels, titles.items()):
        groups = score_table(results, score).groupby(["variant", "batch"]).value
        table = groups.agg(["mean", "std"])
        for variant, style in styles.items():
            found = table.query("variant == @variant and batch in @batches").droplevel(0)
            places = [batches.index(batch) + offsets[variant] for batch in found.index]
            if len(found):
                panel.errorbar(places, found["mean"], yerr=found["std"], capsize=3, **style)
        for place in range(0, len(batches), 2):
            panel.axvspan(place - 0.5, place + 0.5, color="0.5", alpha=0.1, linewidth=0)
        panel.set_xlim(-0.5, len(batches) - 0.5)
        panel.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        panel.set_xlabel(study.unit)
        panel.set_ylabel(f"{title} (%)")
        if study.detectors:  # an accuracy is far from 0
            _start_at_zero(panel)
    same_limits(panels)
    note = _over_seeds(results, "standard deviation")
    finish_figure(figure, panels, f"{study.title}\n{note}")
    for panel in panels:
        panel.grid(False, axis="x")
    return figure


def draw_batches(
    studies: Sequence[StudyResults],
    batches: Optional[Collection[int]] = None,
    scores: Sequence[str] = (),
    *,
    stacked: bool = False,
) -> Figure:
    """Score of each variant at a batch: mean, 95 % interval, seeds; a row per variant.

    Args:
        studies: results of the studies, in the order of the panels.
        batches: batches to draw, a panel each; None for all.
        scores: a panel for each; empty: the first alone.
        stacked: panels below each other, for a narrow page.
    """
    shown = [
        (results, batch, score)
        for results in studies
        for batch in sorted(results.study.batches)
        if batches is None or batch in batches
        for score in scores or [*results.study.scores][:1]
    ]
    rows = max(len(results.study.variants) for results, *_ in shown)
    styles = _styles(*(results.study for results, *_ in shown))
    figure, grid = _panels(1, len(shown), (3.6, 1.0 + 0.36 * rows), stacked)
    panels = [*grid.flat]
    for number, (panel, (results, batch, score)) in enumerate(zip(panels, shown)):
        names = [*results.study.variants]
        values = samples(results, score)
        for row, variant in enumerate(names):
            some = values[variant, batch]
            reached = contrast([some])
            if reached is None:
                continue
            colour, marker = styles[variant]["color"], styles[variant]["marker"]
            fill = styles[variant].get("markerfacecolor", colour)
            panel.plot(some, [row] * len(some), "|", color=colour, markersize=9, alpha=0.7)
            ends = [reached.low, reached.high]
            panel.plot(ends, [row, row], color=colour, linewidth=5, alpha=0.3)
            mean = {"color": colour, "marker": marker, "markersize": 6, "markerfacecolor": fill}
            panel.plot(reached.mean, row, **mean)
            panel.annotate(
                f"{reached.mean:.1f}", (reached.mean, row), (0, 7), textcoords="offset points",
                ha="center", fontsize=9,
            )  # fmt: skip
        labels = [styles[name]["label"] for name in names]
        # panels of one study have the same rows
        repeated = number > 0 and not stacked and names == [*shown[0][0].study.variants]
        panel.set_yticks(range(len(names)), [""] * len(names) if repeated else labels)
        panel.set_ylim(len(names) - 0.4, -0.7)
        panel.margins(x=0.08)  # for the numbers
        panel.set_xlabel(f"{results.study.scores[score]} (%)")
        images = sorted({f"{r.run.images:,}" for r in results.runs if r.run.images})
        seen = f"\n{' or '.join(images)} training images" if images else ""
        panel.set_title(f"{_batch_title(results.study, batch)}{seen}", fontsize="medium")
        add_grid(panel, "x")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    same_limits(panels, "x")
    title = _common_title([results.study.title for results, *_ in shown])
    several = any(len(results.study.seeds) > 1 for results, *_ in shown)
    note = f"symbol: mean, bar: {100 * LEVEL:g} % interval, tick: a run" if several else ""
    add_title(figure, f"{title}\n{note}")
    return figure


def draw_study_curves(results: StudyResults, *, stacked: bool = False) -> Figure:
    """Loss and scores over the images seen: a column per batch, a row per quantity.

    Lines are means over finished runs (over all, if none has finished); bands show the range.

    Args:
        results: of a study.
        stacked: panels below each other, for a narrow page.
    """
    study, batches = results.study, sorted(results.study.batches)
    titles = study.curves or {"total_loss": "total loss", **titles_of(study, results.runs)}
    table = _curves(results, [*titles])
    styles = _styles(study)
    figure, grid = _panels(len(titles), len(batches), (3.0, 2.4), stacked)
    alike: dict[str, list[Axes]] = {}
    for number, (panel, key, batch) in enumerate(
        (grid.flat[row * len(batches) + column], key, batch)
        for row, key in enumerate(titles)
        for column, batch in enumerate(batches)
    ):
        for variant, style in styles.items():
            wanted = table.variant.eq(variant) & table.batch.eq(batch) & table.key.eq(key)
            curve = table[wanted].groupby("images").value.agg(["mean", "min", "max"])
            if len(curve):
                step = max(1, len(curve) // 6)
                panel.plot(curve.index, curve["mean"], markevery=step, **style)
                band = {"color": style["color"], "alpha": 0.15, "lw": 0}
                panel.fill_between(curve.index, curve["min"], curve["max"], **band)
        if study.detectors or key == "total_loss":
            _start_at_zero(panel)
        first_row, first_column = number < len(batches), number % len(batches) == 0
        if stacked or first_row:
            panel.set_title(_batch_title(study, batch), fontsize="medium")
        if stacked or first_column:
            in_percent = key in study.scores and "%" not in titles[key]
            panel.set_ylabel(f"{titles[key]} (%)" if in_percent else titles[key])
        else:
            panel.tick_params(labelleft=False)
        if stacked or number >= len(batches) * (len(titles) - 1):
            panel.set_xlabel("images seen")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k; longer numbers overlap
        else:
            panel.tick_params(labelbottom=False)
        alike.setdefault("score" if key in study.scores else key, []).append(panel)
    for some in alike.values():
        same_limits(some)
    same_limits([*grid.flat], "x")
    finish_figure(figure, grid.flat, f"{study.title}\n{_over_seeds(results, 'range')}")
    return figure


def page_figure(name: str, draw: Callable[..., Figure], results: StudyResults) -> str:
    """A figure for wide and for narrow pages, two SVGs of which `PAGE` shows one.

    Args:
        name: of the figure on the page.
        draw: `draw_scores` or `draw_study_curves`.
        results: of a study.
    """
    wide, narrow = (draw(results, stacked=stacked) for stacked in (False, True))
    return page_svg(wide, f"{name} wide") + page_svg(narrow, f"{name} narrow")


def _panels(
    rows: int, columns: int, size: tuple[float, float], stacked: bool
) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, an array of (rows, columns) or, stacked, of (rows * columns, 1).

    Args:
        rows: of panels.
        columns: of panels.
        size: width and height of a panel, inches.
        stacked: panels below each other, of the width of a telephone.
    """
    if stacked:
        rows, columns, size = rows * columns, 1, (3.6, max(size[1] * 0.9, 2.3))
    figsize = (1 + size[0] * columns, 0.9 + size[1] * rows)
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _styles(*studies: Study) -> Mapping[str, dict[str, Any]]:
    """The style of each variant, the same in all figures of a study."""
    names = [*dict.fromkeys(name for study in studies for name in study.variants)]
    return dict(zip(names, line_styles(names)))


def _common_title(titles: Sequence[str]) -> str:
    """What the titles of studies have in common after their colons: "Data, model"."""
    if len(set(titles)) == 1:
        return titles[0]
    end, *others = {title.partition(": ")[2] for title in titles}
    return "" if others else f"{end[:1].upper()}{end[1:]}"


def _over_seeds(results: StudyResults, spread: str) -> str:
    """What is drawn of the seeds, "mean and range of 3 seeds"; empty for a single one."""
    counts = Counter((r.run.variant, r.run.batch) for r in results.runs if r.status == FINISHED)
    low, high = min(counts.values(), default=0), max(counts.values(), default=0)
    number = high if low == high else f"{low} to {high}"
    return f"mean and {spread} of {number} seeds" if high > 1 else ""


def _curves(results: StudyResults, keys: Sequence[str]) -> pd.DataFrame:
    """Values over the images seen, in long form."""
    finished = {(r.run.variant, r.run.batch) for r in results.runs if r.status == FINISHED}
    rows = []
    for result in results.runs:
        run, record = result.run, result.record
        if record is None or (result.status != FINISHED and (run.variant, run.batch) in finished):
            continue
        for key in keys:
            for iteration, value in zip(*series(record.rows, key)):
                # a last evaluation is written one iteration after the last step
                seen = (iteration + 1) * run.batch * run.study.processes
                rows.append((run.variant, run.batch, key, min(seen, run.images or seen), value))
    return pd.DataFrame(rows, columns=["variant", "batch", "key", "images", "value"])


def _batch_title(study: Study, batch: int) -> str:
    """For example "1 image per step"."""
    return f"{batch} {study.unit if batch > 1 else study.unit.replace('images', 'image')}"


def _start_at_zero(panel: Axes) -> None:
    panel.axhline(0, linewidth=0)  # so that there is room above the highest value, too
    panel.set_ylim(bottom=0)
