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

from .coco_eval import CATEGORY_METRICS, COCO_METRICS, CocoResult

FORMAT = "ws_detectron.coco_evaluation"
TITLES = {"bbox": "box", "segm": "mask"}
UNDEFINED = "–"
KEYPOINTS = "keypoints are not evaluated here; use tools/train_net.py --eval-only"


def format_metric(value: Optional[float], digits: int = 2) -> str:
    """A metric with fixed decimals; a dash if it is undefined."""
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def as_text(result: CocoResult) -> str:
    """Text tables per category and per task, and a note on what was evaluated."""
    rows = [
        [TITLES[t], *(format_metric(values[f]) for f in COCO_METRICS)]
        for t, values in result.metrics.items()
    ]
    summary = tabulate(rows, ["task", *COCO_METRICS], disable_numparse=True, stralign="right")
    names = [(task, name) for task in result.metrics for name in ("AP", "AP50", "AP75")]
    per_category = [
        [
            c.name,
            c.objects,
            *(format_metric(result.per_category[task][c.id][n]) for task, n in names),
        ]
        for c in result.categories
    ]
    headers = ["category", "objects", *(f"{TITLES[task]} {name}" for task, name in names)]
    align = ["left", *["right"] * (len(headers) - 1)]
    categories = tabulate(per_category, headers, disable_numparse=True, colalign=align)
    objects = sum(category.objects for category in result.categories)
    note = (
        f"{result.images} images, {objects} objects, {result.predictions} predictions; "
        f"in %, {UNDEFINED} if there is no ground truth; {result.backend}"
    )
    if result.images_without_predictions:
        note += f"\n{result.images_without_predictions} images have no prediction"
    return f"{categories}\n\n{summary}\n{note}"


def as_dict(result: CocoResult, **about: Any) -> dict[str, Any]:
    """The result as JSON; `about` (paths, config, weights) is stored with it."""
    return {
        "format": FORMAT,
        "unit": "per cent; null where there is no object to find",
        "backend": result.backend,
        **about,
        "images": result.images,
        "images_without_predictions": result.images_without_predictions,
        "predictions": result.predictions,
        **result.metrics,
        "categories": [
            {
                "id": category.id,
                "name": category.name,
                "objects": category.objects,
                **{task: result.per_category[task][category.id] for task in result.metrics},
            }
            for category in result.categories
        ],
    }


def check_reports(folder: Union[str, Path], *inputs: str) -> None:
    """Checks that `write_reports` can write into a folder and overwrites no input.

    Raises:
        UserError: the folder is not writable, or a report would overwrite an input.
    """
    check_folder(folder)
    refuse_overwrite(_report_paths(folder), inputs)


def _report_paths(folder: Union[str, Path]) -> tuple[Path, Path]:
    return Path(folder, "coco_evaluation.json"), Path(folder, "coco_evaluation.csv")


def write_reports(result: CocoResult, folder: Union[str, Path], **about: Any) -> tuple[Path, Path]:
    """Writes `coco_evaluation.json` and `coco_evaluation.csv`, atomically.

    The CSV has one line per task for all categories and one per task and category; undefined
    metrics are empty.

    Args:
        result: as returned by `evaluate`.
        folder: created if missing.
        about: stored in the JSON file.

    Returns:
        The paths of both files.

    Raises:
        UserError: a file cannot be written.
    """
    paths = _report_paths(folder)
    write_json(paths[0], as_dict(result, **about), indent=2)
    write_text(paths[1], csv_text(_csv_rows(result)))
    return paths


def _csv_rows(result: CocoResult) -> list[Sequence[Any]]:
    objects = sum(category.objects for category in result.categories)
    rows: list[Sequence[Any]] = [["task", "category", "category_id", "objects", *COCO_METRICS]]
    for task, metrics in result.metrics.items():
        rows.append([task, "all", None, objects, *metrics.values()])
        for category in result.categories:
            values = result.per_category[task][category.id]
            own = [values.get(name) if name in CATEGORY_METRICS else None for name in COCO_METRICS]
            rows.append([task, category.name, category.id, category.objects, *own])
    return rows
