"""Tables of a report: AP, differences between arms, and what each cell took."""

from collections.abc import Sequence
from typing import Optional

from ws_detectron.evaluation.coco_report import TITLES, UNDEFINED, format_metric
from ws_detectron.evaluation.comparison import duration, effort
from ws_detectron.evaluation.statistics import Difference, Summary

from .blocks import Table
from .differences import (
    arm_difference,
    change_of_difference,
    overall_difference,
    pairs_of_batches,
    summary,
)
from .results import CellResult, StudyResults, tasks_of


def ap_table(results: StudyResults, task: str) -> Table:
    batches = sorted(results.study.batches)
    rows = [
        (
            arm.name,
            *(_summary(summary(results.cells, arm.name, batch, task)) for batch in batches),
        )
        for arm in results.study.arms
    ]
    headers = (f"{TITLES[task]} AP", *(images(batch) for batch in batches))
    return Table(headers, tuple(rows))


def difference_table(results: StudyResults, pair: tuple[str, str]) -> Table:
    tasks = tasks_of(results.cells)
    rows = [
        (
            images(batch),
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
    for batches in pairs_of_batches(results.study.batches):
        changed = [change_of_difference(results.cells, pair, batches, task) for task in tasks]
        here, there = map(images, batches)
        rows.append((f"more at {here} than at {there}", *map(_difference, changed)))
    headers = (f"{pair[0]} - {pair[1]}", *(f"{TITLES[task]} AP" for task in tasks))
    return Table(headers, tuple(rows))


def cell_table(cells: Sequence[CellResult]) -> Table:
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
                *(format_metric(result.ap.get(task)) for task in tasks),
                f"{cell.options['SOLVER.BASE_LR']:.4g}",
                f"{iterations or 0} / {cell.iterations}",
                duration(seconds),
                duration(result.state.seconds if result.state else None),
                format_metric(per_image, 3),
                UNDEFINED if memory is None else f"{memory / 2**20:,.0f} MiB",
                "; ".join(result.notes),
            )
        )
    headers = ("cell", "state", *(f"{TITLES[task]} AP" for task in tasks), "LR", "iterations")
    headers += ("training time", "wall time", "s per image", "peak memory", "notes")
    return Table(headers, tuple(rows))


def images(batch: int) -> str:
    return "1 image" if batch == 1 else f"{batch} images"


def _summary(value: Optional[Summary]) -> str:
    if value is None:
        return UNDEFINED
    deviation = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:.2f}{deviation} ({value.count})"


def _difference(value: Optional[Difference]) -> str:
    if value is None:
        return UNDEFINED
    text = f"{value.mean:+.2f}"
    if value.low is not None and value.high is not None:
        text += f" ({value.low:+.2f} to {value.high:+.2f})"
    return f"**{text}**" if value.excludes_zero else text
