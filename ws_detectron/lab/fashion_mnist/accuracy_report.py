"""The report of the runs: table, figures, and all figures as data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tabulate import tabulate

from ws_detectron.evaluation.curves import write_figure
from ws_detectron.evaluation.statistics import LEVEL, mean_with_interval
from ws_detectron.utils.io import csv_text, write_json, write_text

from .accuracy_figures import draw_accuracy_over_batch, draw_learning_curves, draw_misclassified
from .accuracy_results import RECORDS, SHARED, Cell, FinishedRun, gather, read_records, read_runs
from .files import FASHION_CLASSES, find_fashion_mnist, load_fashion_mnist
from .recipe import RECIPE, WARMUP
from .training_settings import TrainingSettings

UNDEFINED = "–"
SHOWN_ARM = "gn_ws"
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


def write_report(runs_folder: Path, folder: Path, data_dir: Optional[Path] = None) -> list[Path]:
    """Writes README.md, table.csv, runs.json, and the figures, of all finished runs.

    Runs that an earlier report in `folder` recorded count as well, so a grid can be made bit by
    bit, on machines that keep nothing but the report.

    Args:
        runs_folder: holds a folder for each run.
        folder: where to; made if need be.
        data_dir: of Fashion-MNIST, see `find_fashion_mnist`.

    Returns:
        The paths, README.md first.

    Raises:
        UserError: there are no finished runs, or some cannot be averaged.
    """
    runs = read_runs(runs_folder, read_records(folder))
    cells = gather(runs)
    paths = [folder / name for name in ("README.md", "table.csv", RECORDS)]
    write_text(paths[0], report_text(cells))
    write_text(paths[1], _csv(cells))
    write_json(paths[2], [run.as_record() for run in runs])
    paths.append(write_figure(draw_learning_curves(cells), folder / "learning_curves.png"))
    paths.append(write_figure(draw_accuracy_over_batch(cells), folder / "accuracy_over_batch.png"))
    chosen = _to_be_looked_at(cells)
    if chosen is None:  # an earlier report's sheet, if any, stays
        return paths
    cell, run, logits = chosen
    images, labels = load_fashion_mnist("test", find_fashion_mnist("test", root=data_dir))
    figure = draw_misclassified(
        f"{cell.title}, batch {cell.batch_size}, seed {run.settings['seed']}",
        images[: len(logits)],
        labels[: len(logits)],
        logits,
        FASHION_CLASSES,
    )
    return [*paths, write_figure(figure, folder / "misclassified.png")]


def _to_be_looked_at(cells: Sequence[Cell]) -> Optional[tuple[Cell, FinishedRun, np.ndarray]]:
    """A run of the best cell, of `SHOWN_ARM` if there is one, whose logits are there."""
    for cell in sorted(cells, key=lambda cell: (cell.arm != SHOWN_ARM, -cell.accuracy)):
        for run in cell.runs:
            logits = run.test_logits()
            if logits is not None:
                return cell, run, logits
    return None


def report_text(cells: Sequence[Cell]) -> str:
    """README.md of the results."""
    runs = [run for cell in cells for run in cell.runs]
    settings = runs[0].settings
    kept = {name: sorted({str(run.settings[name]) for run in runs}) for name in (*SHARED, "device")}
    facts = "; ".join(f"{name} {' or '.join(values)}" for name, values in kept.items())
    machines = sorted({machine for run in runs for machine in _machines(run)})
    # results that do not name their end have the date of it in place of that of their start
    dates = sorted(run.result.get("finished", run.result["environment"]["date"]) for run in runs)
    commands = sorted({run.result.get("command") or UNDEFINED for run in runs})
    held_out = TrainingSettings(**settings).held_out
    split = f"{settings['images']:,} / {held_out:,} / {held_out:,}"
    best = max(cells, key=lambda cell: cell.accuracy).accuracy
    error = 100 * math.sqrt(best / 100 * (1 - best / 100) / held_out)
    return f"""# Fashion-MNIST

Made by

{"".join(f"    {command}{chr(10)}" for command in commands)}
which go on with what was interrupted, and with `--report` and this folder skip what is recorded
here.

{accuracy_table(cells)}

Test accuracy after training on {split} images (training, validation, test), of the epoch with the
best validation accuracy; the test images are looked at once. Mean ± standard deviation (n - 1) over
seeds, none of a single one; that {held_out:,} images were drawn for the test leaves another
{error:.2f} points of standard error in an accuracy of {best:.1f} %, which all rows share in part.
The time is the median of all training epochs, without validation, "compiled" with
`--compile`; what runs at the same time on the machine changes it, so times of different rows are to
be compared by `tools/benchmark.py classifier`, interleaved. The report is that of
Ehling and Rouault (IIT, April 2019; Keras on a GPU), whose WS never acted: its GN+WS rows are GN.

{difference_text(cells)}
![test accuracy over batch size](accuracy_over_batch.png)

![learning curves](learning_curves.png)

[misclassified.png](misclassified.png) shows articles that were taken for something else;
[table.csv](table.csv) and [runs.json](runs.json) hold all figures.

Settings of all runs: {facts}; {RECIPE["optimizer"]} {RECIPE["momentum"]}, weight decay
{RECIPE["weight_decay"]:g}; the cosine schedule's LR rises in the first {WARMUP:.0%} of all steps.
Measured on {"; ".join(machines)}; they ended {dates[0]} to {dates[-1]}.
"""


def _machines(run: FinishedRun) -> list[str]:
    """Where a run was begun, and where it was resumed."""
    texts = []
    for about in (run.result["environment"], *run.result.get("resumed", ())):
        device = about["gpu" if run.settings["device"] == "cuda" else "cpu"]
        versions = f"torch {about['torch']}, Python {about['python']}"
        threads = about.get("threads", run.result["threads"])
        texts.append(f"{device}, {threads} thread{'' if threads == 1 else 's'}, {versions}")
    return texts


def accuracy_table(cells: Sequence[Cell]) -> str:
    """The report's table, in Markdown, with ours beside it."""
    rows = []
    for cell in cells:
        report = cell.reported
        deviation = "" if cell.deviation is None else f" ± {cell.deviation:.2f}"
        compiled = ", compiled" if cell.runs[0].settings["compile"] else ""
        rows.append(
            (
                cell.title,
                cell.batch_size,
                f"{cell.runs[0].settings['lr']:g}",
                len(cell.runs),
                f"{cell.seconds:.0f}{compiled}",
                f"{cell.accuracy:.2f}{deviation}",
                UNDEFINED if report is None else f"{report[0]:.0f}",
                UNDEFINED if report is None else f"{report[1]:.2f}",
            )
        )
    return tabulate(rows, COLUMNS, tablefmt="github", disable_numparse=True)


def difference_text(cells: Sequence[Cell]) -> str:
    """GN+WS less GN and less BN, as measured, seed by seed; empty where there is no such pair."""
    lines = []
    by_key = {(c.arm, c.order, c.groups, c.batch_size): c for c in cells}
    for baseline in ("gn", "bn"):
        for (arm, *rest), cell in by_key.items():
            other = by_key.get((baseline, *rest)) if arm == "gn_ws" else None  # type: ignore[arg-type]
            if other is not None:
                lines += _difference_line(cell, other)
    if not lines:
        return ""
    return (
        "GN+WS less GN, which is what WS adds, and less BN, in points: mean over the seeds (its "
        f"{LEVEL:.0%} interval,\nStudent's t; each seed).\n\n" + "".join(lines)
    )


def _difference_line(cell: Cell, other: Cell) -> list[str]:
    """None where the two have no seed in common, which is also that of their split."""
    accuracies = dict(zip((run.settings["seed"] for run in other.runs), other.accuracies))
    pairs = [
        accuracy - accuracies[run.settings["seed"]]
        for run, accuracy in zip(cell.runs, cell.accuracies)
        if run.settings["seed"] in accuracies
    ]
    found = mean_with_interval(pairs)
    if found is None:
        return []
    about = "one seed, so no interval"
    if found.low is not None:
        each = ", ".join(f"{pair:+.2f}" for pair in pairs)
        about = f"{found.low:+.2f} to {found.high:+.2f}; {each}"
    return [
        f"- {cell.title} - {other.title}, batch {cell.batch_size}: {found.mean:+.2f} ({about})\n"
    ]


def _csv(cells: Sequence[Cell]) -> str:
    rows: list[Sequence[Any]] = [
        ["arm", "order", "groups", "batch_size", "lr", "seed", "best_epoch", "test_accuracy"]
        + ["validation_accuracy", "test_loss", "seconds_per_epoch"]
    ]
    for cell in cells:
        for run in cell.runs:
            s, r = run.settings, run.result
            rows.append(
                [s["arm"], s["order"], s["groups"], s["batch_size"], s["lr"], s["seed"]]
                + [r["best_epoch"], r["test_accuracy"], r["validation_accuracy"], r["test_loss"]]
                + [round(r["seconds_per_epoch"], 3)]
            )
    return csv_text(rows)
