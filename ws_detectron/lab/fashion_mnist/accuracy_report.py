"""The report on finished runs: README with table, figures, and all metrics as data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from tabulate import tabulate

from ws_detectron.evaluation.curves import line_style, write_figure
from ws_detectron.lab.study.scores import LEVEL, contrast
from ws_detectron.utils.io import csv_text, write_json, write_text

from .accuracy_results import (
    RECORDS,
    SHARED,
    FinishedRun,
    RunGroup,
    group_runs,
    read_records,
    read_runs,
)
from .files import FASHION_CLASSES, find_fashion_mnist, load_fashion_mnist
from .training_settings import RECIPE, VARIANTS, WARMUP, TrainingSettings

UNDEFINED = "–"
COLUMNS = (
    "normalization",
    "batch",
    "LR",
    "seeds",
    "time / epoch, s",
    "accuracy, %",
    "report: time / epoch, s",
    "report: accuracy, %",
)
SHOWN_VARIANT = "gn_ws"
SHEET = (5, 8)  # rows and columns of misclassified images


def write_report(runs_folder: Path, folder: Path, data_dir: Optional[Path] = None) -> list[Path]:
    """Writes README.md, table.csv, runs.json and the figures for all finished runs.

    They include the runs that an earlier report in `folder` recorded, so a grid can be trained in
    parts, on machines that keep nothing but the report.

    Args:
        runs_folder: holds a folder for each run.
        folder: for the report; created if missing.
        data_dir: see `root` of `find_fashion_mnist`.

    Returns:
        The paths, README.md first.

    Raises:
        UserError: there are no finished runs, or some cannot be averaged.
    """
    runs = read_runs(runs_folder, read_records(folder))
    groups = group_runs(runs)
    paths = [folder / name for name in ("README.md", "table.csv", RECORDS)]
    write_text(paths[0], report_text(groups))
    write_text(paths[1], _csv(groups))
    write_json(paths[2], [run.as_record() for run in runs])
    paths.append(write_figure(draw_learning_curves(groups), folder / "learning_curves.png"))
    paths.append(write_figure(draw_accuracy_over_batch(groups), folder / "accuracy_over_batch.png"))
    chosen = _best_with_logits(groups)
    if chosen is None:  # the figure of an earlier report, if any, stays
        return paths
    group, run, logits = chosen
    images, labels = load_fashion_mnist("test", find_fashion_mnist("test", root=data_dir))
    figure = draw_misclassified(
        f"{group.title}, batch {group.batch_size}, seed {run.settings['seed']}",
        images[: len(logits)],
        labels[: len(logits)],
        logits,
        FASHION_CLASSES,
    )
    return [*paths, write_figure(figure, folder / "misclassified.png")]


def _best_with_logits(
    groups: Sequence[RunGroup],
) -> Optional[tuple[RunGroup, FinishedRun, np.ndarray]]:
    """A run with logits from the best possible group, preferably of `SHOWN_VARIANT`."""
    for group in sorted(groups, key=lambda g: (g.variant != SHOWN_VARIANT, -g.accuracy)):
        for run in group.runs:
            logits = run.test_logits()
            if logits is not None:
                return group, run, logits
    return None


def report_text(groups: Sequence[RunGroup]) -> str:
    """README.md of the results."""
    runs = [run for group in groups for run in group.runs]
    settings = runs[0].settings
    kept = {name: sorted({str(run.settings[name]) for run in runs}) for name in (*SHARED, "device")}
    facts = "; ".join(f"{name} {' or '.join(values)}" for name, values in kept.items())
    machines = sorted({machine for run in runs for machine in _machines(run)})
    # older results have the date of their start alone
    dates = sorted(run.result.get("finished", run.result["environment"]["date"]) for run in runs)
    commands = sorted({run.result.get("command") or UNDEFINED for run in runs})
    held_out = TrainingSettings(**settings).held_out
    split = f"{settings['images']:,} / {held_out:,} / {held_out:,}"
    best = max(groups, key=lambda group: group.accuracy).accuracy
    error = 100 * math.sqrt(best / 100 * (1 - best / 100) / held_out)
    return f"""# Fashion-MNIST

Made with

{"".join(f"    {command}{chr(10)}" for command in commands)}
These commands resume interrupted runs; with `--report` and this folder they skip the runs that are
recorded here.

{accuracy_table(groups)}

Test accuracy after training on {split} images (training, validation, test), at the epoch
with the best validation accuracy; the test images are evaluated once. Mean ± standard deviation
(n - 1) over seeds; a single seed has none. The choice of {held_out:,} test images adds a standard
error of {error:.2f} points to an accuracy of {best:.1f} %, part of which all rows share.

Times are the median over all training epochs, without validation; "compiled": with `--compile`.
They depend on what else the machine ran; to compare variants, use `tools/benchmark.py classifier`,
which interleaves them.

The report is by Ehling and Rouault (IIT, April 2019; Keras on a GPU). Its WS had no effect, so its
GN+WS rows are GN.

{difference_text(groups)}
![test accuracy over batch size](accuracy_over_batch.png)

![learning curves](learning_curves.png)

[misclassified.png](misclassified.png) shows misclassified test images;
[table.csv](table.csv) and [runs.json](runs.json) hold all metrics.

Settings of all runs: {facts}; {RECIPE["optimizer"]} {RECIPE["momentum"]}, weight decay
{RECIPE["weight_decay"]:g}; the cosine schedule's LR rises in the first {WARMUP:.0%} of all steps.
Measured on {"; ".join(machines)}; finished {dates[0]} to {dates[-1]}.
"""


def _machines(run: FinishedRun) -> list[str]:
    """Machine and versions at the start of a run and at each resume."""
    texts = []
    for about in (run.result["environment"], *run.result.get("resumed", ())):
        device = about["gpu" if run.settings["device"] == "cuda" else "cpu"]
        versions = f"torch {about['torch']}, Python {about['python']}"
        threads = about.get("threads", run.result["threads"])
        texts.append(f"{device}, {threads} thread{'' if threads == 1 else 's'}, {versions}")
    return texts


def accuracy_table(groups: Sequence[RunGroup]) -> str:
    """Our results in Markdown, with those of the report in the last two columns."""
    rows = []
    for group in groups:
        report = group.reported
        deviation = "" if group.deviation is None else f" ± {group.deviation:.2f}"
        compiled = ", compiled" if group.runs[0].settings["compile"] else ""
        rows.append(
            (
                group.title,
                group.batch_size,
                f"{group.runs[0].settings['lr']:g}",
                len(group.runs),
                f"{group.seconds:.0f}{compiled}",
                f"{group.accuracy:.2f}{deviation}",
                UNDEFINED if report is None else f"{report[0]:.0f}",
                UNDEFINED if report is None else f"{report[1]:.2f}",
            )
        )
    return tabulate(rows, COLUMNS, tablefmt="github", disable_numparse=True)


def difference_text(groups: Sequence[RunGroup]) -> str:
    """GN+WS minus GN and minus BN, paired by seed; empty if there is no such pair."""
    lines = []
    by_key = {(g.variant, g.order, g.groups, g.batch_size): g for g in groups}
    for baseline in ("gn", "bn"):
        for (variant, order, norm_groups, batch), group in by_key.items():
            other = by_key.get((baseline, order, norm_groups, batch))
            if variant == "gn_ws" and other is not None:
                lines += _difference_line(group, other)
    if not lines:
        return ""
    return (
        "GN+WS minus GN, which is the effect of WS, and minus BN, in points: mean over seeds (its "
        f"{LEVEL:.0%}\ninterval, Student's t; each seed).\n\n" + "".join(lines)
    )


def _difference_line(group: RunGroup, other: RunGroup) -> list[str]:
    """Empty if the two have no seed, and so no split of the images, in common."""
    accuracies = dict(zip((run.settings["seed"] for run in other.runs), other.accuracies))
    pairs = [
        accuracy - accuracies[run.settings["seed"]]
        for run, accuracy in zip(group.runs, group.accuracies)
        if run.settings["seed"] in accuracies
    ]
    found = contrast([pairs])
    if found is None:
        return []
    about = "one seed, so no interval"
    if found.low is not None:
        each = ", ".join(f"{pair:+.2f}" for pair in pairs)
        about = f"{found.low:+.2f} to {found.high:+.2f}; {each}"
    return [
        f"- {group.title} - {other.title}, batch {group.batch_size}: {found.mean:+.2f} ({about})\n"
    ]


def _csv(groups: Sequence[RunGroup]) -> str:
    settings = ("variant", "order", "groups", "batch_size", "lr", "seed")
    results = ("best_epoch", "test_accuracy", "validation_accuracy", "test_loss")
    rows: list[Sequence[Any]] = [[*settings, *results, "seconds_per_epoch"]]
    for run in (run for group in groups for run in group.runs):
        row = [run.settings[name] for name in settings] + [run.result[name] for name in results]
        rows.append([*row, round(run.result["seconds_per_epoch"], 3)])
    return csv_text(rows)


def draw_learning_curves(groups: Sequence[RunGroup]) -> Figure:
    """Validation error (top) and training loss over epochs, a column for each batch size.

    Lines are means over seeds. The axes are logarithmic, as all variants that did not collapse end
    within a point of accuracy.
    """
    batches = sorted({group.batch_size for group in groups})
    figure = Figure(figsize=(0.8 + 3.4 * len(batches), 6.4), layout="constrained")
    panels = figure.subplots(2, len(batches), squeeze=False, sharex=True, sharey="row")
    titles = _titles(groups)
    for column, batch in enumerate(batches):
        panels[0][column].set_title(f"batch {batch}", fontsize=10)
        panels[1][column].set_xlabel("epoch")
        panels[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
        for group in groups:
            if group.batch_size != batch:
                continue
            style = line_style(titles.index(group.title))
            for row, key in enumerate(("validation_accuracy", "train_loss")):
                values = np.array(
                    [[_number(entry[key]) for entry in run.history] for run in group.runs]
                )
                # a diverged run has no loss; the mean is over the others
                values = np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)
                epochs = np.arange(1, len(values) + 1)
                panels[row][column].plot(
                    epochs, 100 * (1 - values) if row == 0 else values, label=group.title, **style
                )
    panels[0][0].set_ylabel("validation error (%)")
    panels[1][0].set_ylabel("training loss")
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    _finish(figure, list(panels.flat), titles)
    return figure


def draw_accuracy_over_batch(groups: Sequence[RunGroup]) -> Figure:
    """Mean test accuracy over batch size: the whole range (left) and the best 3 points (right).

    Error bars are one standard deviation over seeds; a single seed has none.
    """
    batches = sorted({group.batch_size for group in groups})
    titles = _titles(groups)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel in panels:
        for number, title in enumerate(titles):
            line = [group for group in groups if group.title == title]
            shift = 1.03 ** (number - (len(titles) - 1) / 2)  # error bars must not overlap
            panel.errorbar(
                [group.batch_size * shift for group in line],
                [group.accuracy for group in line],
                yerr=[_number(group.deviation) for group in line],
                label=title,
                capsize=3,
                **line_style(number),
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.set_xlabel("images per step")
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].set_ylim(0, 100)
    best = max(group.accuracy for group in groups)
    panels[1].set_ylim(best - 2.5, best + 0.5)
    panels[1].set_title("enlarged", fontsize=10)
    _finish(figure, list(panels), titles)
    return figure


def draw_misclassified(
    title: str,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    classes: Sequence[str],
) -> Figure:
    """The misclassified images with the highest confidence.

    Args:
        title: of the model.
        images: (N, 28, 28) uint8.
        labels: (N,) classes.
        logits: (N, 10).
        classes: names of the classes.
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = shifted / shifted.sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong, predicted[wrong]], kind="stable")]
    rows, columns = SHEET
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns).flat)
    for panel in panels:
        panel.axis("off")
    for panel, index in zip(panels, worst):
        panel.imshow(images[index], cmap="gray_r", vmin=0, vmax=255)
        panel.set_title(
            f"{classes[predicted[index]]} {confidence[index, predicted[index]]:.0%}\n"
            f"is {classes[labels[index]]}",
            fontsize=8,
        )
    figure.suptitle(
        f"{title}: {len(wrong):,} of {len(labels):,} test images are misclassified; "
        "these with the highest confidence",
        fontsize=10,
    )
    return figure


def _titles(groups: Sequence[RunGroup]) -> list[str]:
    """Titles in the order of `VARIANTS`; other models than the report's come last."""
    variants = list(VARIANTS)
    ordered = sorted(
        groups, key=lambda g: (g.title != VARIANTS[g.variant].title, variants.index(g.variant))
    )
    return list(dict.fromkeys(group.title for group in ordered))


def _number(value: Optional[float]) -> float:
    return np.nan if value is None else float(value)


def _finish(figure: Figure, panels: Sequence[Axes], titles: Sequence[str]) -> None:
    """Adds grids, and one legend for all panels, in the order of `titles`."""
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
