"""COCO figures as a table for the screen, as JSON and as CSV."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

from tabulate import tabulate

from ws_detectron.utils.io import atomic_write, check_folder, refuse_overwrite

from .coco_eval import CATEGORY_FIGURES, FIGURES, CocoResult

FORMAT = "ws_detectron.coco_evaluation"
TITLES = {"bbox": "box", "segm": "mask"}
UNDEFINED = "–"
KEYPOINTS = "keypoints are not evaluated here; tools/train_net.py --eval-only evaluates them"


def figure(value: Optional[float], digits: int = 2) -> str:
    """A figure for people; a dash where it is undefined."""
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def as_text(result: CocoResult) -> str:
    """Tables of the twelve figures and of the categories, and what they were computed from."""
    rows = [
        [TITLES[t], *(figure(values[f]) for f in FIGURES)] for t, values in result.figures.items()
    ]
    summary = tabulate(rows, ["task", *FIGURES], disable_numparse=True, stralign="right")
    names = [(task, name) for task in result.figures for name in ("AP", "AP50", "AP75")]
    per_category = [
        [c.name, c.objects, *(figure(result.per_category[task][c.id][n]) for task, n in names)]
        for c in result.categories
    ]
    headers = ["category", "objects", *(f"{TITLES[task]} {name}" for task, name in names)]
    align = ["left", *["right"] * (len(headers) - 1)]
    categories = tabulate(per_category, headers, disable_numparse=True, colalign=align)
    objects = sum(category.objects for category in result.categories)
    note = (
        f"{result.images} images, {objects} objects, {result.predictions} predictions; "
        f"per cent, {UNDEFINED} where there is nothing to find; {result.backend}"
    )
    if result.images_without_predictions:
        note += f"\n{result.images_without_predictions} images have no prediction"
    return f"{categories}\n\n{summary}\n{note}"


def as_dict(result: CocoResult, **about: Any) -> dict[str, Any]:
    """The result for JSON; `about` is stored with it (paths, config, weights)."""
    return {
        "format": FORMAT,
        "unit": "per cent; null where there is no object to find",
        "backend": result.backend,
        **about,
        "images": result.images,
        "images_without_predictions": result.images_without_predictions,
        "predictions": result.predictions,
        **result.figures,
        "categories": [
            {
                "id": category.id,
                "name": category.name,
                "objects": category.objects,
                **{task: result.per_category[task][category.id] for task in result.figures},
            }
            for category in result.categories
        ],
    }


def check_reports(folder: Union[str, Path], *inputs: str) -> None:
    """`write_reports` can write into a folder, and overwrites none of the inputs.

    Raises:
        UserError: it cannot.
    """
    check_folder(folder)
    refuse_overwrite(_report_paths(folder), inputs)


def _report_paths(folder: Union[str, Path]) -> tuple[Path, Path]:
    return Path(folder, "coco_evaluation.json"), Path(folder, "coco_evaluation.csv")


def write_reports(result: CocoResult, folder: Union[str, Path], **about: Any) -> tuple[Path, Path]:
    """Writes `coco_evaluation.json` and `.csv`, atomically.

    The CSV has one line per task for all categories together and one per task and category; fields
    that are undefined are empty.

    Args:
        result: of `evaluate`.
        folder: made if need be.
        about: goes into the JSON.

    Returns:
        The two paths.

    Raises:
        UserError: a file cannot be written.
    """
    paths = _report_paths(folder)
    with atomic_write(paths[0]) as file:
        json.dump(as_dict(result, **about), file, indent=2)
        file.write("\n")
    with atomic_write(paths[1]) as file:
        csv.writer(file, lineterminator="\n").writerows(_csv_rows(result))
    return paths


def _csv_rows(result: CocoResult) -> list[Sequence[Any]]:
    objects = sum(category.objects for category in result.categories)
    rows: list[Sequence[Any]] = [["task", "category", "category_id", "objects", *FIGURES]]
    for task, figures in result.figures.items():
        rows.append([task, "all", None, objects, *figures.values()])
        for category in result.categories:
            values = result.per_category[task][category.id]
            own = [values.get(name) if name in CATEGORY_FIGURES else None for name in FIGURES]
            rows.append([task, category.name, category.id, category.objects, *own])
    return rows
