"""Times the two COCO evaluators side by side on the same data."""

import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from tabulate import tabulate

from ws_detectron.evaluation.coco_eval import TASKS, CocoResult, compute
from ws_detectron.evaluation.coco_report import TITLES
from ws_detectron.utils.io import write_json, write_text

BACKENDS = ("faster-coco-eval", "pycocotools")


def enlarged(annotations: dict[str, Any], num_images: int) -> dict[str, Any]:
    """A COCO set of any size: the images of a small one in turns, with new ids.

    Args:
        annotations: of `load_annotations`.
        num_images: in the new set.
    """
    images = annotations["images"]
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for annotation in annotations["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    copies: list[dict[str, Any]] = []
    copied_objects: list[dict[str, Any]] = []
    for number in range(1, num_images + 1):
        image = images[(number - 1) % len(images)]
        copies.append({**image, "id": number})
        for annotation in objects[image["id"]]:
            copied_objects.append({**annotation, "id": len(copied_objects) + 1, "image_id": number})
    return {**annotations, "images": copies, "annotations": copied_objects}


def measure(
    annotations: dict[str, Any], predictions: Sequence[dict[str, Any]], rounds: int
) -> dict[str, Any]:
    """Runs both evaluators in turns.

    What is timed starts with annotations and predictions in memory, checked, and ends with the
    figures: copies, conversion of polygons, matching, accumulation. Each round runs both, the
    first of them in turns, so that a change of the machine's load meets both.

    Args:
        annotations: of `load_annotations`.
        predictions: of `load_predictions`.
        rounds: runs of each.

    Returns:
        `tasks`: task -> `wall_s` and `cpu_s`, backend -> seconds of each round, and `ratio`, how
        many times longer pycocotools took in each round; `largest_difference` of any figure of the
        two, in per cent.
    """
    tasks: dict[str, Any] = {}
    difference = 0.0
    for task in TASKS:
        wall: dict[str, list[float]] = {name: [] for name in BACKENDS}
        cpu: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for number in range(rounds):
            results = {}
            for name in BACKENDS[:: 1 if number % 2 == 0 else -1]:
                gc.collect()
                start, start_cpu = time.perf_counter(), time.process_time()
                results[name] = compute(
                    annotations, predictions, [task], reference=name == "pycocotools"
                )
                cpu[name].append(time.process_time() - start_cpu)
                wall[name].append(time.perf_counter() - start)
            difference = max(difference, largest_difference(*results.values()))
        ratio = [slow / fast for fast, slow in zip(*wall.values())]
        tasks[task] = {"wall_s": wall, "cpu_s": cpu, "ratio": ratio}
    return {"tasks": tasks, "largest_difference": difference}


def largest_difference(one: CocoResult, other: CocoResult) -> float:
    """The largest difference of two results' figures, categories included; infinite where one is
    undefined and the other is not."""
    pairs = [
        (values[name], other.metrics[task][name])
        for task, values in one.metrics.items()
        for name in values
    ]
    pairs += [
        (values[name], other.per_category[task][category][name])
        for task, by_category in one.per_category.items()
        for category, values in by_category.items()
        for name in values
    ]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def write_measurement(
    folder: Union[str, Path], about: dict[str, Any], measured: dict[str, Any]
) -> str:
    """Writes `benchmark.json` and `benchmark.md`.

    Args:
        folder: made if need be.
        about: environment, data and command.
        measured: of `measure`.

    Returns:
        The text of the Markdown file.
    """
    write_json(Path(folder, "benchmark.json"), {**about, **measured}, indent=2)
    tasks = measured["tasks"]
    rows = [_row(TITLES[task], [values]) for task, values in tasks.items()]
    rows.append(_row("both", list(tasks.values())))
    headers = ["task", *(f"{name}, s" for name in BACKENDS), "times faster", "by CPU time"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in about.items())
    text = f"""# COCO evaluation: faster-coco-eval and pycocotools

{table}

Seconds are medians over the rounds; "times faster" is the median, least and greatest of the ratios
within each round, in which both ran one after the other. "By CPU time" depends less on what else
the machine was doing, which a load average above 0 at the start tells of. Timed from annotations
and predictions in memory to the figures. Largest difference of any figure of the two, categories
included: {measured["largest_difference"]:.1e} per cent.

{facts}
"""
    write_text(Path(folder, "benchmark.md"), text)
    return text


def _row(title: str, tasks: Sequence[dict[str, Any]]) -> list[str]:
    """A line of the table: the times of `tasks` added up, round by round."""
    fast, slow = ([sum(r) for r in zip(*(t["wall_s"][name] for t in tasks))] for name in BACKENDS)
    cpu_fast, cpu_slow = (sum(statistics.median(t["cpu_s"][n]) for t in tasks) for n in BACKENDS)
    ratios = [b / a for a, b in zip(fast, slow)]
    spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    times = [f"{statistics.median(seconds):.2f}" for seconds in (fast, slow)]
    return [title, *times, spread, f"{cpu_slow / cpu_fast:.1f}"]
