"""Rows of a report's CSV files, each with its header; what is undefined is empty."""

from typing import Any, Optional

from ws_detectron.evaluation.comparison import effort
from ws_detectron.evaluation.statistics import Difference

from .differences import (
    arm_difference,
    change_of_difference,
    overall_difference,
    pairs_of_batches,
    summary,
)
from .results import StudyResults, tasks_of


def cell_rows(results: StudyResults) -> list[list[Any]]:
    """For cells.csv: one line per run, those of the search first; what is undefined is empty."""
    tasks = tasks_of([*results.search, *results.cells])
    keys = sorted({key for r in [*results.search, *results.cells] for key in r.cell.choice})
    rows: list[list[Any]] = [
        ["cell", "arm", "batch", "seed", "state", *(f"{task}/AP" for task in tasks)]
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
    rows: list[list[Any]] = [["arm", "batch", "task", "cells", "mean", "deviation"]]
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
    rows: list[list[Any]] = [["arm", "baseline", "batch", "task", "mean", "low", "high"]]
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
                for batches in pairs_of_batches(results.study.batches)
            ]
            for batch, value in [*found, ("all", overall), *changes]:
                ends = (value.mean, value.low, value.high) if value else (None, None, None)
                rows.append([*pair, batch, task, *ends])
    return rows
