"""Tables of a report: AP, differences between variants, and what each run took."""

from collections.abc import Sequence
from typing import Optional

from ws_detectron.evaluation.coco_report import TITLES, UNDEFINED, figure
from ws_detectron.evaluation.comparison import duration, effort
from ws_detectron.evaluation.statistics import Difference, Summary

from .blocks import Table
from .differences import (
    change_of_difference,
    overall_difference,
    pairs_of_batches,
    summary,
    variant_difference,
)
from .results import RunResult, StudyResults, tasks_of


def ap_table(results: StudyResults, task: str) -> Table:
    batches = sorted(results.study.batches)
    rows = [
        (
            variant.name,
            *(_summary(summary(results.runs, variant.name, batch, task)) for batch in batches),
        )
        for variant in results.study.variants
    ]
    headers = (f"{TITLES[task]} AP", *(images(batch) for batch in batches))
    return Table(headers, tuple(rows))


def difference_table(results: StudyResults, pair: tuple[str, str]) -> Table:
    tasks = tasks_of(results.runs)
    rows = [
        (
            images(batch),
            *(_difference(variant_difference(results.runs, pair, batch, task)) for task in tasks),
        )
        for batch in sorted(results.study.batches)
    ]
    everything = [
        _difference(overall_difference(results.runs, pair, results.study.batches, task))
        for task in tasks
    ]
    if len(rows) > 1:
        rows.append(("all batches", *everything))
    for batches in pairs_of_batches(results.study.batches):
        changed = [change_of_difference(results.runs, pair, batches, task) for task in tasks]
        here, there = map(images, batches)
        rows.append((f"more at {here} than at {there}", *map(_difference, changed)))
    headers = (f"{pair[0]} - {pair[1]}", *(f"{TITLES[task]} AP" for task in tasks))
    return Table(headers, tuple(rows))


def run_table(runs: Sequence[RunResult]) -> Table:
    tasks = tasks_of(runs)
    rows = []
    for result in runs:
        run = result.run
        iterations, seconds = effort(result.metrics)
        per_image = seconds / (iterations * run.batch) if iterations and seconds else None
        memory = result.record.get("peak_memory_bytes")
        rows.append(
            (
                run.name,
                result.word,
                *(figure(result.ap.get(task)) for task in tasks),
                f"{run.options['SOLVER.BASE_LR']:.4g}",
                f"{iterations or 0} / {run.iterations}",
                duration(seconds),
                duration(result.state.seconds if result.state else None),
                figure(per_image, 3),
                UNDEFINED if memory is None else f"{memory / 2**20:,.0f} MiB",
                "; ".join(result.notes),
            )
        )
    headers = ("run", "state", *(f"{TITLES[task]} AP" for task in tasks), "LR", "iterations")
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
