"""The report of a study: Markdown, CSV, figures, and one self-contained page."""

from collections.abc import Sequence
from pathlib import Path

from ws_detectron.errors import UserError
from ws_detectron.evaluation.coco_report import UNDEFINED
from ws_detectron.evaluation.curves import write_figure
from ws_detectron.evaluation.statistics import LEVEL
from ws_detectron.utils.io import csv_text, write_text

from .blocks import Block, Heading, Picture, Problems, Text, as_html, as_markdown
from .choice import choose, has_ended
from .csv_rows import cell_rows, difference_rows, summary_rows
from .figures import draw_ap_over_batch, draw_study_curves
from .results import CellResult, StudyResults, tasks_of
from .sections import search_blocks, settings_blocks
from .tables import ap_table, cell_table, difference_table, images


def write_report(results: StudyResults, folder: Path) -> list[Path]:
    """Writes report.md, index.html, cells.csv, summary.csv, differences.csv and two figures.

    Returns:
        The paths, the page first.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        pictures, paths = _draw(results, folder)
        blocks = report_blocks(results, pictures)
        texts = {
            "index.html": as_html(results.study.title, blocks),
            "report.md": as_markdown(results.study.title, blocks),
            "cells.csv": csv_text(cell_rows(results)),
            "summary.csv": csv_text(summary_rows(results)),
            "differences.csv": csv_text(difference_rows(results)),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return [*(folder / name for name in texts), *paths]


def report_blocks(results: StudyResults, pictures: Sequence[Picture]) -> list[Block]:
    """All that the report says, in order."""
    blocks: list[Block] = [Text(_what_was_run(results))]
    environments = _environments(results.cells)
    if environments:
        blocks.append(Text("Measured on " + "; ".join(environments) + "."))
    searched = _environments(results.search)
    if searched:
        blocks.append(Text("Searched on " + "; ".join(searched) + "."))
    problems = problems_of(results)
    if problems:
        blocks += [Heading("Missing or failed"), Problems(tuple(problems))]
    blocks += [
        Heading("AP over batch size"),
        Text(
            "Mean ± standard deviation (n - 1) over seeds, in brackets their number; AP in per "
            "cent at the end of training, not the best of it."
        ),
    ]
    for task in tasks_of(results.cells):
        blocks.append(ap_table(results, task))
    blocks += pictures[:1]
    if results.study.comparisons:
        several = len(results.study.batches) > 1
        blocks += [
            Heading("Differences"),
            Text(
                f"In points of AP, in brackets the {LEVEL:.0%} confidence interval of Welch's "
                "t-test over seeds, **bold** where it excludes 0. Each interval stands for itself: "
                "of twenty, one is expected to miss."
                + (
                    " Then what is of each seed's mean over all batches, and how the difference "
                    "changes with the batch."
                    if several
                    else ""
                )
            ),
        ]
        blocks += [difference_table(results, pair) for pair in results.study.comparisons]
    blocks += [Heading("Learning curves"), *pictures[1:]]
    if results.search:
        blocks += search_blocks(results)
    blocks += settings_blocks(results)
    blocks += [
        Heading("Cells"),
        Text(
            "Training time is that of the training steps (median of 20 iterations); per image it "
            "is divided by the images of one GPU or process. Wall time includes start-up, "
            "evaluations and checkpoints, of the last start alone. Memory is the peak of the main "
            "process: on a GPU what torch allocated there, on the CPU all that is resident, "
            "libraries included."
        ),
        cell_table(results.cells),
    ]
    return blocks


def problems_of(results: StudyResults) -> list[str]:
    """Cells that are not finished, with the reason, and arms for which a search has no result.

    Cells that were never started share a line: a study made in several sittings has many.
    """
    problems = []
    every = [*results.search, *results.cells]
    waiting = [result.cell.name for result in every if result.state is None]
    if waiting:
        problems.append(f"{len(waiting)} of {len(every)} not started: {', '.join(waiting)}")
    for result in every:
        if result.state is not None and result.word != "finished":
            reason = f": {result.state.reason}" if result.state.reason else ""
            problems.append(f"{result.cell.name} is {result.word}{reason}")
    for (arm, batch), choice in choose(results.study, results.search).items():
        if choice is None:
            runs = [r for r in results.search if (r.cell.arm, r.cell.batch) == (arm, batch)]
            why = (
                "found nothing: all its runs failed"
                if all(has_ended(run) for run in runs)
                else "has not ended, and what follows from it is not shown"
            )
            problems.append(f"the search for {arm} at {images(batch)} {why}")
    return problems


def _what_was_run(results: StudyResults) -> str:
    study = results.study
    images = sorted({result.cell.images for result in results.cells})
    seen = " or ".join(f"{count:,}" for count in images) or "no"
    data = " and ".join(
        ", ".join(sorted({str(_setting(r, key)) for r in results.cells})) or UNDEFINED
        for key in ("DATASETS.TRAIN", "DATASETS.TEST")
    )
    return (
        f"{len(study.arms)} arms ({', '.join(arm.name for arm in study.arms)}) at "
        f"{', '.join(map(str, sorted(study.batches)))} {study.unit}"
        + (f" ({study.processes} of them)" if study.processes > 1 else "")
        + f", seeds {', '.join(map(str, study.seeds))}. "
        f"Every cell sees {seen} training images: LR is proportional to the batch, warm-up and "
        f"schedule are counted in images. Trained and evaluated on {data}."
    )


def _setting(result: CellResult, key: str) -> str:
    value = result.cell.settings[key]
    return "+".join(value) if isinstance(value, list) else str(value)


def _environments(cells: Sequence[CellResult]) -> list[str]:
    """Machines, versions and dates, each as often as they differ."""
    found: dict[str, set[str]] = {}
    for result in cells:
        record = result.record
        if "device" in record:
            versions = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
            what = (
                f"{record.get('device')}, {record.get('threads')} thread(s) per process, {versions}"
            )
            found.setdefault(what, set()).add(str(record.get("date")))
    return [
        f"{what}, {min(dates)}" + (f" to {max(dates)}" if len(dates) > 1 else "")
        for what, dates in sorted(found.items())
    ]


def _draw(results: StudyResults, folder: Path) -> tuple[list[Picture], list[Path]]:
    pictures, paths = [], []
    drawings = (
        ("ap_over_batch", draw_ap_over_batch, "AP of each arm over the batch"),
        ("learning_curves", draw_study_curves, "Loss and AP of each arm over the images seen"),
    )
    for name, draw, caption in drawings:
        figure = draw(results.study, results.cells)
        png, svg = (write_figure(figure, folder / f"{name}{end}") for end in (".png", ".svg"))
        pictures.append(Picture(name, caption, svg.read_text("utf-8")))
        paths += [png, svg]
    return pictures, paths
