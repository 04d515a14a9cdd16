"""The report of a study: Markdown, CSV, figures, and one self-contained page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import UserError
from ws_detectron.evaluation.comparison import differing_keys, duration, effort
from ws_detectron.evaluation.curves import write_figure
from ws_detectron.evaluation.report import TITLES, UNDEFINED, figure
from ws_detectron.evaluation.runs import Run
from ws_detectron.evaluation.statistics import LEVEL, Difference, Summary
from ws_detectron.io import csv_text, write_text

from .blocks import Block, Heading, Picture, Problems, Table, Text, as_html, as_markdown
from .figures import draw_ap_over_batch, draw_study_curves
from .results import (
    CellResult,
    arm_difference,
    at_the_edge,
    change_of_difference,
    choose,
    has_ended,
    overall_difference,
    score,
    summary,
    tasks_of,
)
from .spec import Study

# Where two cells of one study differ without that being a setting of the arm
NOT_SETTINGS = {"OUTPUT_DIR", "SEED"}


@dataclass(frozen=True)
class StudyResults:
    """A study with all that was run of it.

    Args:
        study: the study.
        cells: of the study proper, all that were asked for, in order.
        search: of its search; empty without one.
    """

    study: Study
    cells: Sequence[CellResult]
    search: Sequence[CellResult]


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
    environments = _environments(results)
    if environments:
        blocks.append(Text("Measured on " + "; ".join(environments) + "."))
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
        blocks.append(_ap_table(results, task))
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
        blocks += [_difference_table(results, pair) for pair in results.study.comparisons]
    blocks += [Heading("Learning curves"), *pictures[1:]]
    if results.search:
        blocks += _search_blocks(results)
    blocks += _settings_blocks(results)
    blocks += [
        Heading("Cells"),
        Text(
            "Training time is that of the training steps (median of 20 iterations); per image it "
            "is divided by the images of one GPU or process. Wall time includes start-up, "
            "evaluations and checkpoints, of the last start alone. Memory is the peak of the main "
            "process: on a GPU what torch allocated there, on the CPU all that is resident, "
            "libraries included."
        ),
        _cell_table(results.cells),
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
            problems.append(f"the search for {arm} at {_images(batch)} {why}")
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


def _environments(results: StudyResults) -> list[str]:
    """Machines, versions and dates, each as often as they differ."""
    found: dict[str, set[str]] = {}
    for result in results.cells:
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


def _ap_table(results: StudyResults, task: str) -> Table:
    batches = sorted(results.study.batches)
    rows = [
        (
            arm.name,
            *(_summary(summary(results.cells, arm.name, batch, task)) for batch in batches),
        )
        for arm in results.study.arms
    ]
    headers = (f"{TITLES[task]} AP", *(_images(batch) for batch in batches))
    return Table(headers, tuple(rows))


def _images(batch: int) -> str:
    return "1 image" if batch == 1 else f"{batch} images"


def _summary(value: Optional[Summary]) -> str:
    if value is None:
        return UNDEFINED
    deviation = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:.2f}{deviation} ({value.count})"


def _difference_table(results: StudyResults, pair: tuple[str, str]) -> Table:
    tasks = tasks_of(results.cells)
    rows = [
        (
            _images(batch),
            *(_difference(arm_difference(results.cells, pair, batch, task)) for task in tasks),
        )
        for batch in sorted(results.study.batches)
    ]
    everything = [
        _difference(overall_difference(results.cells, pair, results.study.batches, task))
        for task in tasks
    ]
    if len(rows) > 1:
        rows.append(("all batches", *everything))
    for batches in _changes(results):
        changed = [change_of_difference(results.cells, pair, batches, task) for task in tasks]
        here, there = map(_images, batches)
        rows.append((f"more at {here} than at {there}", *map(_difference, changed)))
    headers = (f"{pair[0]} - {pair[1]}", *(f"{TITLES[task]} AP" for task in tasks))
    return Table(headers, tuple(rows))


def _changes(results: StudyResults) -> list[tuple[int, int]]:
    """The smallest batch and each other one."""
    smallest, *others = sorted(results.study.batches)
    return [(smallest, other) for other in others]


def _difference(value: Optional[Difference]) -> str:
    if value is None:
        return UNDEFINED
    text = f"{value.mean:+.2f}"
    if value.low is not None and value.high is not None:
        text += f" ({value.low:+.2f} to {value.high:+.2f})"
    return f"**{text}**" if value.excludes_zero else text


def _search_blocks(results: StudyResults) -> list[Block]:
    study = results.study
    assert study.search is not None
    keys = tuple(study.search.grid)
    tasks = tasks_of(results.search)
    choices = choose(study, results.search)
    rows = []
    for result in _searched_in_order(results):
        chosen = choices[result.cell.arm, result.cell.batch] == result.cell.choice
        reached = "failed" if result.word == "failed" else figure(score(result))
        rows.append(
            (
                result.cell.arm,
                str(result.cell.batch),
                *(str(result.cell.choice[key]) for key in keys),
                *(figure(result.ap.get(task)) for task in tasks),
                f"**{reached}**" if chosen else reached,
            )
        )
    headers = ("arm", study.unit, *(f"`{k}`" for k in keys))
    headers += (*(f"{TITLES[task]} AP" for task in tasks), "mean")
    edges = [
        f"{arm} at {batch}: {', '.join(f'`{key}`' for key in at_the_edge(study, choice))}"
        for (arm, batch), choice in choices.items()
        if choice is not None and at_the_edge(study, choice)
    ]
    blocks: list[Block] = [
        Heading("Search"),
        Text(
            f"Each arm got the same {len(results.search) // len(study.arms)} runs of "
            f"{study.search.images:,} images (seed {study.search.seed}); values are at the "
            "reference batch of the arm's config. **Bold**: chosen, by the mean of box and mask "
            "AP. A cell takes what was found at the nearest searched batch."
        ),
        Table(headers, tuple(rows)),
    ]
    if edges:
        blocks.append(
            Text(f"Chosen at the edge of the grid, so the best may lie beyond: {'; '.join(edges)}.")
        )
    return blocks


def _searched_in_order(results: StudyResults) -> list[CellResult]:
    """Arms as the study lists them, and numbers upwards, in whatever order the grid has them."""
    arms = [arm.name for arm in results.study.arms]

    def place(result: CellResult) -> tuple[Any, ...]:
        values = result.cell.choice.values()
        numbers = (v if isinstance(v, (int, float)) else 0 for v in values)
        return (arms.index(result.cell.arm), result.cell.batch, *numbers)

    return sorted(results.search, key=place)


def _settings_blocks(results: StudyResults) -> list[Block]:
    """Config keys that differ between arms at one batch, and between batches of one arm."""
    cells = results.cells
    blocks: list[Block] = [Heading("Where the configs differ")]
    batch = max(results.study.batches)
    arms = _first_of(cells, lambda r: r.cell.arm, lambda r: r.cell.batch == batch)
    arm = results.study.arms[0].name
    batches = _first_of(cells, lambda r: str(r.cell.batch), lambda r: r.cell.arm == arm)
    blocks += _settings_table(f"Between arms, at {_images(batch)}:", arms)
    blocks += _settings_table(f"Between batches, for {arm}:", batches)
    return blocks


def _first_of(
    results: Sequence[CellResult],
    name: Callable[[CellResult], str],
    wanted: Callable[[CellResult], bool],
) -> list[Run]:
    """The first cell of each name as a run with the config that it has or would have."""
    found: dict[str, Run] = {}
    for result in results:
        if wanted(result):
            run = Run(name(result), result.cell.folder, config=result.cell.settings)
            found.setdefault(name(result), run)
    return [*found.values()]


def _settings_table(title: str, runs: Sequence[Run]) -> list[Block]:
    keys = [key for key in differing_keys(runs) if key not in NOT_SETTINGS]
    if not keys:
        return [Text(f"{title} nowhere.")]
    rows = tuple((f"`{key}`", *(f"`{run.config.get(key)}`" for run in runs)) for key in keys)
    return [Text(title), Table(("key", *(run.name for run in runs)), rows)]


def _cell_table(cells: Sequence[CellResult]) -> Table:
    tasks = tasks_of(cells)
    rows = []
    for result in cells:
        cell = result.cell
        iterations, seconds = effort(result.run)
        per_image = seconds / (iterations * cell.batch) if iterations and seconds else None
        memory = result.record.get("peak_memory_bytes")
        rows.append(
            (
                cell.name,
                result.word,
                *(figure(result.ap.get(task)) for task in tasks),
                f"{cell.options['SOLVER.BASE_LR']:.4g}",
                f"{iterations or 0} / {cell.iterations}",
                duration(seconds),
                duration(result.state.seconds if result.state else None),
                figure(per_image, 3),
                UNDEFINED if memory is None else f"{memory / 2**20:,.0f} MiB",
                "; ".join(result.notes),
            )
        )
    headers = ("cell", "state", *(f"{TITLES[task]} AP" for task in tasks), "LR", "iterations")
    headers += ("training time", "wall time", "s per image", "peak memory", "notes")
    return Table(headers, tuple(rows))


def cell_rows(results: StudyResults) -> list[list[Any]]:
    """For cells.csv: one line per run, those of the search first; what is undefined is empty."""
    tasks = tasks_of([*results.search, *results.cells])
    keys = sorted({key for r in [*results.search, *results.cells] for key in r.cell.choice})
    rows: list[list[Any]] = [
        ["cell", "arm", "images_per_gpu", "seed", "state", *(f"{task}/AP" for task in tasks)]
        + ["images", "iterations", "SOLVER.BASE_LR", "training_seconds", "wall_seconds"]
        + ["peak_memory_bytes", *(f"reference {key}" for key in keys), "notes"]
    ]
    for result in [*results.search, *results.cells]:
        cell = result.cell
        row: list[Any] = [cell.name, cell.arm, cell.batch, cell.seed, result.word]
        row += [result.ap.get(task) for task in tasks]
        row += [cell.images, cell.iterations, cell.options["SOLVER.BASE_LR"]]
        row += [effort(result.run)[1], result.state.seconds if result.state else None]
        row += [result.record.get("peak_memory_bytes")]
        row += [*(cell.choice.get(key) for key in keys), "; ".join(result.notes)]
        rows.append(row)
    return rows


def summary_rows(results: StudyResults) -> list[list[Any]]:
    """For summary.csv: mean and deviation of each arm, batch and task."""
    rows: list[list[Any]] = [["arm", "images_per_gpu", "task", "cells", "mean", "deviation"]]
    for arm in results.study.arms:
        for batch in sorted(results.study.batches):
            for task in tasks_of(results.cells):
                found = summary(results.cells, arm.name, batch, task)
                count, mean, deviation = (
                    (found.count, found.mean, found.deviation) if found else (0, None, None)
                )
                rows.append([arm.name, batch, task, count, mean, deviation])
    return rows


def difference_rows(results: StudyResults) -> list[list[Any]]:
    """For differences.csv: each comparison at each batch, over all of them, and its change."""
    rows: list[list[Any]] = [["arm", "baseline", "images_per_gpu", "task", "mean", "low", "high"]]
    for pair in results.study.comparisons:
        for task in tasks_of(results.cells):
            found: list[tuple[Any, Optional[Difference]]] = [
                (batch, arm_difference(results.cells, pair, batch, task))
                for batch in sorted(results.study.batches)
            ]
            overall = overall_difference(results.cells, pair, results.study.batches, task)
            changes = [
                (
                    f"{batches[0]} less {batches[1]}",
                    change_of_difference(results.cells, pair, batches, task),
                )
                for batches in _changes(results)
            ]
            for batch, value in [*found, ("all", overall), *changes]:
                ends = (value.mean, value.low, value.high) if value else (None, None, None)
                rows.append([*pair, batch, task, *ends])
    return rows


def _draw(results: StudyResults, folder: Path) -> tuple[list[Picture], list[Path]]:
    pictures, paths = [], []
    drawings = (
        ("ap_over_batch", draw_ap_over_batch, "AP of each arm over the batch"),
        ("learning_curves", draw_study_curves, "Loss and AP of each arm over the images seen"),
    )
    for name, draw, caption in drawings:
        png, svg = write_figure(draw(results.study, results.cells), folder / name)
        pictures.append(Picture(name, caption, svg.read_text("utf-8")))
        paths += [png, svg]
    return pictures, paths
