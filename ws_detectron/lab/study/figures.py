"""Figures of studies: scores over batch size, by variant at a batch, and learning curves.

Needs the packages of the extra `lab`, see `runner.check_packages`.
"""

from collections.abc import Collection, Sequence
from typing import Optional

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ws_detectron.evaluation.curves import finish_figure, line_style
from ws_detectron.evaluation.runs import series

from .records import FINISHED, StudyResults
from .report import LEVEL, contrast, samples, score_table, titles_of
from .study_file import Study

NAMES = {"bn": "BN", "gn": "GN", "ln": "LN", "wn": "WN", "bn_ws": "BN+WS", "gn_ws": "GN+WS"}


def draw_scores(results: StudyResults) -> Figure:
    """The scores of each variant: over the batch, or if there is a single one, by variant."""
    if len(results.study.batches) > 1:
        return draw_over_batch(results)
    return draw_batches([results], scores=[*titles_of(results.study, results.runs)])


def draw_over_batch(results: StudyResults) -> Figure:
    """Mean of each variant over the batch, bars of one standard deviation; a panel per score."""
    study, titles = results.study, titles_of(results.study, results.runs)
    batches = sorted(study.batches)
    figure = Figure(figsize=(1 + 4.6 * len(titles), 4.2), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, (score, title) in zip(panels, titles.items()):
        groups = score_table(results, score).groupby(["variant", "batch"]).value
        table = groups.agg(["mean", "std"]).fillna(0)
        for number, variant in enumerate(study.variants):
            found = table.query("variant == @variant and batch in @batches").droplevel(0)
            # shifted, so that bars do not overlap
            shift = 1.02 ** (number - (len(study.variants) - 1) / 2)
            if len(found):
                style = {"label": variant, "capsize": 3, **line_style(number)}
                panel.errorbar(found.index * shift, found["mean"], yerr=found["std"], **style)
        panel.set_xscale("log", base=2)
        panel.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.set_xlabel(study.unit)
        panel.set_ylabel(f"{title} (%)")
        if study.detectors:  # an accuracy is far from 0
            _start_at_zero(panel)
    finish_figure(figure, panels)
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
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=len(scores) < 2)[0]
    for panel, (results, batch, score) in zip(panels, shown):
        names = [*results.study.variants]
        values = samples(results, score)
        for row, variant in enumerate(names):
            some = values[variant, batch]
            reached = contrast([some])
            if reached is None:
                continue
            colour = line_style(colours.index(variant))["color"]
            panel.plot(some, [row] * len(some), "|", color=colour, markersize=9, alpha=0.7)
            ends = [reached.low, reached.high]
            panel.plot(ends, [row, row], color=colour, linewidth=5, alpha=0.25)
            panel.plot(reached.mean, row, "o", color=colour, markersize=6)
            panel.annotate(
                f"{reached.mean:.1f}", (reached.mean, row), (0, 7), textcoords="offset points",
                ha="center", fontsize=9,
            )  # fmt: skip
        panel.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
        panel.set_ylim(len(names) - 0.4, -0.7)
        panel.set_xlabel(f"{results.study.scores[score]}, mean and {LEVEL:.0%} interval")
        images = sorted({f"{r.run.images:,}" for r in results.runs if r.run.images})
        seen = f"\n{' or '.join(images)} images" if images else ""
        panel.set_title(f"{_batch_title(results.study, batch)}{seen}", fontsize=10)
        panel.grid(True, axis="x", linewidth=0.4, color="0.8")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    return figure


def draw_study_curves(results: StudyResults) -> Figure:
    """Loss and scores over the images seen: a column per batch, a row per quantity.

    Lines are means over finished runs (over all, if none has finished); bands show the range.
    """
    study, batches = results.study, sorted(results.study.batches)
    titles = study.curves or {"total_loss": "total loss", **titles_of(study, results.runs)}
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
                    band = {"color": style["color"], "alpha": 0.15, "lw": 0}
                    panel.fill_between(curve.index, curve["min"], curve["max"], **band)
            if study.detectors or key == "total_loss":
                _start_at_zero(panel)
        row[0].set_ylabel(titles[key])
    for top, bottom, batch in zip(panels[0], panels[-1], batches):
        top.set_title(_batch_title(study, batch), fontsize=10)
        bottom.set_xlabel("images seen")
        bottom.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k; longer numbers overlap
    finish_figure(figure, panels.flat)
    return figure


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
