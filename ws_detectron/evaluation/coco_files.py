"""Reads and checks COCO annotations and results files.

Formats: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results.
This module imports neither torch nor detectron2.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Union

from ws_detectron.data.validate import finite, read_json, validate
from ws_detectron.errors import DataError, list_some

NAMED_AT_MOST = 5


def load_annotations(path: Union[str, Path]) -> dict[str, Any]:
    """Reads a COCO instances file, checked and fixed by `data.validate`.

    Raises:
        DataError: the file cannot be read or has errors; lists them.
    """
    return validate(read_json(path, "annotations"), str(path)).usable()


def load_predictions(path: Union[str, Path]) -> list[dict[str, Any]]:
    """Reads a COCO results file, such as detectron2's `coco_instances_results.json`.

    Args:
        path: a JSON list of objects with `image_id`, `category_id`, `score`, and `bbox`
            ([x, y, width, height], pixels) or `segmentation` (RLE) or both.

    Raises:
        DataError: the file is missing or not JSON, or an entry is malformed; names the entry.
    """
    content = read_json(path, "predictions")
    if not isinstance(content, list):
        swapped = isinstance(content, dict) and "annotations" in content
        raise DataError(
            f"predictions {path} are not a COCO results file, which is a list of objects; found "
            f"{type(content).__name__}"
            + (": are --annotations and --predictions swapped?" if swapped else "")
        )
    for number, entry in enumerate(content):
        problem = _problem_of(entry)
        if problem:
            raise DataError(f"predictions {path}, entry {number}: {problem}")
    return content


def check_ids(
    predictions: Sequence[dict[str, Any]],
    annotations: dict[str, Any],
    predictions_name: Union[str, Path],
    annotations_name: Union[str, Path],
) -> None:
    """Checks that the annotations have all image and category ids of the predictions.

    Raises:
        DataError: they lack some; names these, the existing ids and the usual cause.
    """
    images = {image["id"] for image in annotations["images"]}
    unknown = {entry["image_id"] for entry in predictions} - images
    if unknown:
        raise DataError(
            f"predictions {predictions_name} name {len(unknown)} image ids that the annotations "
            f"{annotations_name} do not have: {_some(unknown)} (they have: {_some(images)}); "
            "were they computed on another data set or split?"
        )
    categories = {category["id"] for category in annotations["categories"]}
    unknown = {entry["category_id"] for entry in predictions} - categories
    if unknown:
        raise DataError(
            f"predictions {predictions_name} name {len(unknown)} category ids that the annotations "
            f"{annotations_name} do not have: {_some(unknown)} (they have: {_some(categories)}); "
            "results files hold the data set's own ids, not the model's class numbers from 0"
        )


def _problem_of(entry: Any) -> str:
    """The first problem of an entry of a results file; empty if there is none."""
    if not isinstance(entry, dict):
        return f"must be an object, found {type(entry).__name__}"
    for key in ("image_id", "category_id", "score"):
        if key not in entry:
            return f"has no {key!r}"
    for key in ("image_id", "category_id"):
        if type(entry[key]) not in (int, str, float):
            return f"{key} must be a number or text, found {entry[key]!r:.60}"
    if finite(entry["score"]) is None:
        return f"score must be a finite number, found {entry['score']!r:.60}"
    if entry.get("bbox") is None and entry.get("segmentation") is None:
        return "has neither 'bbox' nor 'segmentation'"
    box = entry.get("bbox")
    if box is not None:
        if not isinstance(box, list) or len(box) != 4 or None in map(finite, box):
            return f"bbox must be four finite numbers x, y, width, height; found {box!r:.60}"
        if box[2] < 0 or box[3] < 0:
            return f"bbox has a negative width or height: {box!r:.60}"
    return ""


def _some(values: Iterable[Any]) -> str:
    """The first few values and the number of the others."""
    return list_some([repr(value) for value in sorted(values, key=str)], NAMED_AT_MOST)
