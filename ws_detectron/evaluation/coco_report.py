"""COCO metrics as text tables, as JSON and as CSV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

from tabulate import tabulate

from ws_detectron.utils.io import (
    check_folder,
    csv_text,
    refuse_overwrite,
    write_json,
    write_text,
)

from .coco_eval import COCO_METRICS, CocoResult

FORMAT = "ws_detectron.coco_evaluation"
JSON_NAME, CSV_NAME = "coco_evaluation.json", "coco_evaluation.csv"
TITLES = {"bbox": "box", "segm": "mask"}
UNDEFINED = "–"
KEYPOINTS = "keypoints are not evaluated here; use tools/train_net.py --eval-only"


def format_metric(value: Optional[float], digits: int = 2) -> str:
    """A metric with fixed decimals; a dash if it is undefined."""
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def as_text(result: CocoResult) -> str:
    """Text tables per category and per task, and a note on what was evaluated."""
    names = [(task, name) for task in result.metrics for name in ("AP", "AP50", "AP75")]
    headers = ["category", "objects", *(f"{TITLES[task]} {name}" for task, name in names)]
    rows = [
        [c.name, c.objects, *(format_metric(c.metrics[task][name]) for task, name in names)]
        for c in result.categories
    ]
    align = ["left", *["right"] * (len(headers) - 1)]
    categories = tabulate(rows, headers, disable_numparse=True, colalign=align)
    rows = [
        [TITLES[t], *map(format_metric, metrics.values())] for t, metrics in result.metrics.items()
    ]
    summary = tabulate(rows, ["task", *COCO_METRICS], disable_numparse=True, stralign="right")
    objects = sum(category.objects for category in result.categories)
    note = (
        f"{result.images} images, {objects} objects, {result.predictions} predictions; "
        f"in %, {UNDEFINED} if there is no ground truth; {result.backend}"
    )
    if result.images_without_predictions:
        note += f"\n{result.images_without_predictions} images have no prediction"
    return f"{categories}\n\n{summary}\n{note}"


def check_reports(folder: Union[str, Path], *inputs: str) -> None:
    """Checks that `write_reports` can write into a folder and overwrites no input.

    Raises:
        UserError: the folder is not writable, or a report would overwrite an input.
    """
    check_folder(folder)
    refuse_overwrite([Path(folder, JSON_NAME), Path(folder, CSV_NAME)], inputs)


def write_reports(result: CocoResult, folder: Union[str, Path], **about: Any) -> tuple[Path, Path]:
    """Writes `coco_evaluation.json` and `coco_evaluation.csv`, atomically.

    The CSV has one line per task for all categories and one per task and category; undefined
    metrics are empty.

    Args:
        result: as returned by `evaluate`.
        folder: created if missing.
        about: paths, config, weights and the like, stored in the JSON file.

    Returns:
        The paths of both files.

    Raises:
        UserError: a file cannot be written.
    """
    json_path, csv_path = Path(folder, JSON_NAME), Path(folder, CSV_NAME)
    content = {
        "format": FORMAT,
        "unit": "%; null if there is no ground truth",
        "backend": result.backend,
        **about,
        "images": result.images,
        "images_without_predictions": result.images_without_predictions,
        "predictions": result.predictions,
        **result.metrics,
        "categories": [
            {"id": c.id, "name": c.name, "objects": c.objects, **c.metrics}
            for c in result.categories
        ],
    }
    objects = sum(category.objects for category in result.categories)
    rows: list[Sequence[Any]] = [["task", "category", "category_id", "objects", *COCO_METRICS]]
    for task, metrics in result.metrics.items():
        rows.append([task, "all", None, objects, *metrics.values()])
        for c in result.categories:
            own = [c.metrics[task].get(name) for name in COCO_METRICS]
            rows.append([task, c.name, c.id, c.objects, *own])
    write_json(json_path, content, indent=2)
    write_text(csv_path, csv_text(rows))
    return json_path, csv_path
