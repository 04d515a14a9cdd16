"""Learning curves, accuracy over batch size, and what was taken for something else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ws_detectron.evaluation.curves import line_style

from .accuracy_results import Cell
from .variants import ARMS

SHEET = (5, 8)  # rows and columns of misclassified articles


def draw_learning_curves(cells: Sequence[Cell]) -> Figure:
    """Validation error (above) and training loss over epochs, a column for each batch size.

    Lines are means over seeds. The axes are logarithmic, as all arms but a collapsed one end within
    a point of accuracy.
    """
    batches = sorted({cell.batch_size for cell in cells})
    figure = Figure(figsize=(0.8 + 3.4 * len(batches), 6.4), layout="constrained")
    panels = figure.subplots(2, len(batches), squeeze=False, sharex=True, sharey="row")
    titles = _titles(cells)
    for column, batch in enumerate(batches):
        panels[0][column].set_title(f"batch {batch}", fontsize=10)
        panels[1][column].set_xlabel("epoch")
        panels[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
        for cell in cells:
            if cell.batch_size != batch:
                continue
            style = line_style(titles.index(cell.title))
            for row, key in enumerate(("validation_accuracy", "train_loss")):
                values = np.array(
                    [[_number(entry[key]) for entry in run.history] for run in cell.runs]
                )
                # a run that diverged has no loss from there on, and must not hide the others'
                values = np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)
                epochs = np.arange(1, len(values) + 1)
                panels[row][column].plot(
                    epochs, 100 * (1 - values) if row == 0 else values, label=cell.title, **style
                )
    panels[0][0].set_ylabel("validation error (per cent)")
    panels[1][0].set_ylabel("training loss")
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    _finish(figure, list(panels.flat), titles)
    return figure


def draw_accuracy_over_batch(cells: Sequence[Cell]) -> Figure:
    """Mean test accuracy over batch size; left all of it, right the top.

    Bars are of one deviation over seeds; a single seed has none.
    """
    batches = sorted({cell.batch_size for cell in cells})
    titles = _titles(cells)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel in panels:
        for number, title in enumerate(titles):
            line = [cell for cell in cells if cell.title == title]
            shift = 1.03 ** (number - (len(titles) - 1) / 2)  # bars stand beside each other
            panel.errorbar(
                [cell.batch_size * shift for cell in line],
                [cell.accuracy for cell in line],
                yerr=[_number(cell.deviation) for cell in line],
                label=title,
                capsize=3,
                **line_style(number),
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.set_xlabel("images per step")
    panels[0].set_ylabel("test accuracy (per cent)")
    panels[0].set_ylim(0, 100)
    best = max(cell.accuracy for cell in cells)
    panels[1].set_ylim(best - 2.5, best + 0.5)
    panels[1].set_title("the top of it", fontsize=10)
    _finish(figure, list(panels), titles)
    return figure


def draw_misclassified(
    title: str,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    classes: Sequence[str],
) -> Figure:
    """The articles that were taken for something else with the most confidence.

    Args:
        title: of the model.
        images: (N, 28, 28) uint8.
        labels: (N,) classes.
        logits: (N, 10).
        classes: their names.
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = shifted / shifted.sum(axis=1, keepdims=True)
    taken_for = logits.argmax(axis=1)
    wrong = np.flatnonzero(taken_for != labels)
    worst = wrong[np.argsort(-confidence[wrong, taken_for[wrong]], kind="stable")]
    rows, columns = SHEET
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns).flat)
    for panel in panels:
        panel.axis("off")
    for panel, index in zip(panels, worst):
        panel.imshow(images[index], cmap="gray_r", vmin=0, vmax=255)
        panel.set_title(
            f"{classes[taken_for[index]]} {confidence[index, taken_for[index]]:.0%}\n"
            f"is {classes[labels[index]]}",
            fontsize=8,
        )
    figure.suptitle(
        f"{title}: {len(wrong):,} of {len(labels):,} test images are taken for something else; "
        f"these with the most confidence",
        fontsize=10,
    )
    return figure


def _titles(cells: Sequence[Cell]) -> list[str]:
    """Arms in their usual order, whatever is finished first, then the variants of the model."""
    arms = list(ARMS)
    ordered = sorted(
        cells, key=lambda cell: (cell.title != ARMS[cell.arm].title, arms.index(cell.arm))
    )
    return list(dict.fromkeys(cell.title for cell in ordered))


def _number(value: object) -> float:
    return np.nan if value is None else float(value)  # type: ignore[arg-type]


def _finish(figure: Figure, panels: Sequence[Axes], titles: Sequence[str]) -> None:
    """A grid, and one legend for all panels, in the order of `titles`."""
    entries: dict[str, Any] = {}
    for panel in panels:
        panel.grid(True, linewidth=0.4, color="0.8")
        lines, names = panel.get_legend_handles_labels()
        entries.update(zip(names, lines))
    figure.legend(
        [entries[title] for title in titles],
        titles,
        loc="outside lower center",
        ncols=min(7, len(titles)),
    )
