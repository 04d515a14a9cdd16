"""The report of the runs: table, figures, and all figures as data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tabulate import tabulate

from ws_detectron.data.fashion_mnist import FASHION_CLASSES, find_fashion_mnist, load_fashion_mnist
from ws_detectron.evaluation.curves import write_figure
from ws_detectron.io import csv_text, write_json, write_text

from .figures import draw_accuracy_over_batch, draw_learning_curves, draw_misclassified
from .results import RECORDS, SHARED, Cell, FinishedRun, gather, read_records, read_runs

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
    paths += write_figure(draw_learning_curves(cells), folder / "learning_curves")
    paths += write_figure(draw_accuracy_over_batch(cells), folder / "accuracy_over_batch")
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
    paths += write_figure(figure, folder / "misclassified")[:1]
    paths[-1].with_suffix(".svg").unlink()  # it would hold the same pixels, larger
    return paths


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
    machines = sorted({_machine(run) for run in runs})
    dates = sorted(run.result["environment"]["date"] for run in runs)
    commands = sorted({run.result.get("command") or UNDEFINED for run in runs})
    split = f"{settings['images']:,} / {settings['images'] // 5:,} / {settings['images'] // 5:,}"
    return f"""# Fashion-MNIST

Made by

{"".join(f"    {command}{chr(10)}" for command in commands)}
which skip what is recorded here (run them with another `--report` to make everything anew) and go
on with what was interrupted.

{accuracy_table(cells)}

Test accuracy after training on {split} images (training, validation, test), of the epoch with the
best validation accuracy; the test images are looked at once. Mean ± standard deviation (n - 1) over
seeds. The time is the median of all training epochs, without validation, "compiled" with
`--compile`; what runs at the same time on the machine changes it, so times of different rows are to
be compared by `tools/benchmark.py classifier`, which measures in turns. The report is that of
Ehling and Rouault (IIT, April 2019; Keras on a GPU), whose WS never acted: its GN+WS rows are GN.

{difference_text(cells)}
![test accuracy over batch size](accuracy_over_batch.png)

![learning curves](learning_curves.png)

[misclassified.png](misclassified.png) shows articles that were taken for something else;
[table.csv](table.csv) and [runs.json](runs.json) hold all figures.

Settings of all runs: {facts}; SGD with Nesterov momentum 0.9, weight decay 5e-4.
Measured on {"; ".join(machines)}; {dates[0]} to {dates[-1]}.
"""


def _machine(run: FinishedRun) -> str:
    about = run.result["environment"]
    device = about["gpu" if run.settings["device"] == "cuda" else "cpu"]
    versions = f"torch {about['torch']}, Python {about['python']}"
    threads = run.result["threads"]
    return f"{device}, {threads} thread{'' if threads == 1 else 's'}, {versions}"


def accuracy_table(cells: Sequence[Cell]) -> str:
    """The report's table, in Markdown, with ours beside it."""
    rows = []
    for cell in cells:
        report = cell.report
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
    """What WS adds to GN, as measured; empty where one of them is missing."""
    lines = []
    by_key = {(c.arm, c.order, c.groups, c.batch_size): c for c in cells}
    for (arm, *rest), cell in by_key.items():
        other = by_key.get(("gn", *rest)) if arm == "gn_ws" else None  # type: ignore[arg-type]
        if other is None:
            continue
        seeds = {run.settings["seed"]: 100 * run.result["test_accuracy"] for run in other.runs}
        pairs = [
            100 * run.result["test_accuracy"] - seeds[run.settings["seed"]]
            for run in cell.runs
            if run.settings["seed"] in seeds
        ]
        each = ", ".join(f"{difference:+.2f}" for difference in pairs)
        if pairs:
            lines.append(
                f"- {cell.title} against {other.title}, batch {cell.batch_size}: "
                f"{sum(pairs) / len(pairs):+.2f} points ({each} with the same seed)\n"
            )
    return "What WS adds to GN, seed by seed:\n\n" + "".join(lines) if lines else ""


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
