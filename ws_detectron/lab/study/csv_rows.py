"""Rows of a report's CSV files, each with its header; what is undefined is empty."""

from typing import Any, Optional

from ws_detectron.evaluation.comparison import effort
from ws_detectron.evaluation.statistics import Difference

from .differences import (
    change_of_difference,
    overall_difference,
    pairs_of_batches,
    summary,
    variant_difference,
)
from .results import StudyResults, tasks_of


def run_rows(results: StudyResults) -> list[list[Any]]:
    """For cells.csv: one line per run, those of the search first; what is undefined is empty."""
    tasks = tasks_of([*results.search, *results.runs])
    keys = sorted({key for r in [*results.search, *results.runs] for key in r.run.choice})
    rows: list[list[Any]] = [
        ["run", "variant", "batch", "seed", "state", *(f"{task}/AP" for task in tasks)]
        + ["images", "iterations", "SOLVER.BASE_LR", "training_seconds", "wall_seconds"]
        + ["peak_memory_bytes", *(f"reference {key}" for key in keys), "notes"]
    ]
    for result in [*results.search, *results.runs]:
        run = result.run
        row: list[Any] = [run.name, run.variant, run.batch, run.seed, result.word]
        row += [result.ap.get(task) for task in tasks]
        row += [run.images, run.iterations, run.options["SOLVER.BASE_LR"]]
        row += [effort(result.metrics)[1], result.state.seconds if result.state else None]
        row += [result.record.get("peak_memory_bytes")]
        row += [*(run.choice.get(key) for key in keys), "; ".join(result.notes)]
        rows.append(row)
    return rows


def summary_rows(results: StudyResults) -> list[list[Any]]:
    """For summary.csv: mean and deviation of each variant, batch and task."""
    rows: list[list[Any]] = [["variant", "batch", "task", "cells", "mean", "deviation"]]
    for variant in results.study.variants:
        for batch in sorted(results.study.batches):
            for task in tasks_of(results.runs):
                found = summary(results.runs, variant.name, batch, task)
                count, mean, deviation = (
                    (found.count, found.mean, found.deviation) if found else (0, None, None)
                )
                rows.append([variant.name, batch, task, count, mean, deviation])
    return rows


def difference_rows(results: StudyResults) -> list[list[Any]]:
    """For differences.csv: each comparison at each batch, over all of them, and its change."""
    rows: list[list[Any]] = [["variant", "baseline", "batch", "task", "mean", "low", "high"]]
    for pair in results.study.comparisons:
        for task in tasks_of(results.runs):
            found: list[tuple[Any, Optional[Difference]]] = [
                (batch, variant_difference(results.runs, pair, batch, task))
                for batch in sorted(results.study.batches)
            ]
            overall = overall_difference(results.runs, pair, results.study.batches, task)
            changes = [
                (
                    f"{batches[0]} less {batches[1]}",
                    change_of_difference(results.runs, pair, batches, task),
                )
                for batches in pairs_of_batches(results.study.batches)
            ]
            for batch, value in [*found, ("all", overall), *changes]:
                ends = (value.mean, value.low, value.high) if value else (None, None, None)
                rows.append([*pair, batch, task, *ends])
    return rows
