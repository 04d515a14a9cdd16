"""COCO annotations and results files, read with errors that a user can act on.

Formats: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results.
Needs no torch and no detectron2.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Union

from ws_detectron.errors import DataError

from .rle import first_malformed

ANNOTATION_LISTS = ("images", "annotations", "categories")
NAMED_AT_MOST = 5


def load_annotations(path: Union[str, Path]) -> dict[str, Any]:
    """A COCO instances file.

    Args:
        path: JSON with the lists `images`, `annotations` and `categories`.

    Raises:
        DataError: the file is missing, not JSON, or one of the lists or their ids is missing.
    """
    content = _read_json(path, "annotations")
    lists = content if isinstance(content, dict) else {}
    missing = [name for name in ANNOTATION_LISTS if not isinstance(lists.get(name), list)]
    if missing:
        raise DataError(
            f"annotations {path} are not in COCO format: missing the lists {', '.join(missing)}"
            + (
                "; it is a list, as results files are: are --annotations and --predictions swapped?"
                if isinstance(content, list)
                else ""
            )
        )
    for name in ANNOTATION_LISTS:
        numbers = [entry.get("id") if isinstance(entry, dict) else None for entry in content[name]]
        if None in numbers:
            raise DataError(f"annotations {path}: {name}[{numbers.index(None)}] has no id")
        if len(set(numbers)) < len(numbers):
            raise DataError(f"annotations {path}: ids in {name} are not unique")
    known: dict[str, set[Any]] = {
        "image_id": {image["id"] for image in content["images"]},
        "category_id": {category["id"] for category in content["categories"]},
    }
    for number, annotation in enumerate(content["annotations"]):
        for key in ("image_id", "category_id", "bbox", "area"):
            if key not in annotation:
                raise DataError(f"annotations {path}: annotations[{number}] has no {key!r}")
        for key, ids in known.items():
            if annotation[key] not in ids:
                raise DataError(
                    f"annotations {path}: annotations[{number}] has {key} {annotation[key]!r}, "
                    "which the file does not describe"
                )
    return content


def load_predictions(path: Union[str, Path]) -> list[dict[str, Any]]:
    """A COCO results file, such as detectron2's `coco_instances_results.json`.

    Args:
        path: JSON list of objects with `image_id`, `category_id`, `score` and `bbox`
            ([x, y, width, height], pixels) or `segmentation` (RLE) or both.

    Raises:
        DataError: the file is missing or not JSON, or an entry is malformed; names the entry.
    """
    content = _read_json(path, "predictions")
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
    """Image and category ids of predictions are those of the annotations.

    Raises:
        DataError: some are not; names them, what is there, and the usual reason.
    """
    images = {image["id"] for image in annotations["images"]}
    unknown = {entry["image_id"] for entry in predictions} - images
    if unknown:
        raise DataError(
            f"predictions {predictions_name} name {len(unknown)} image ids that the annotations "
            f"{annotations_name} do not have: {_some(unknown)} (they have: {_some(images)}); "
            "were they made on another data set or split?"
        )
    categories = {category["id"] for category in annotations["categories"]}
    unknown = {entry["category_id"] for entry in predictions} - categories
    if unknown:
        raise DataError(
            f"predictions {predictions_name} name {len(unknown)} category ids that the annotations "
            f"{annotations_name} do not have: {_some(unknown)} (they have: {_some(categories)}); "
            "results files hold the data set's own ids, not the model's class numbers from 0"
        )


def check_annotation_masks(annotations: dict[str, Any], name: Union[str, Path]) -> None:
    """Every annotated mask is a list of polygons or an RLE of its image's size.

    Args:
        annotations: of `load_annotations`.
        name: what to call the annotations in an error.

    Raises:
        DataError: an image has no size or a mask is malformed; names it.
    """
    sizes: dict[Any, tuple[int, int]] = {}
    for image in annotations["images"]:
        if not all(isinstance(image.get(side), int) for side in ("height", "width")):
            raise DataError(f"annotations {name}: image {image['id']} has no height and width")
        sizes[image["id"]] = image["height"], image["width"]
    for annotation in annotations["annotations"]:
        problem = _problem_of_mask(annotation.get("segmentation"), sizes[annotation["image_id"]])
        if problem:
            raise DataError(f"annotations {name}: mask of annotation {annotation['id']}: {problem}")


def _problem_of_mask(mask: Any, size: tuple[int, int]) -> str:
    """What is wrong with the mask of an annotation; empty if nothing is."""
    if isinstance(mask, list):
        if not mask or not all(isinstance(polygon, list) for polygon in mask):
            return "must be a list of polygons, each x, y, x, y, ..."
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
            return "a polygon has fewer than three corners, or a corner without y"
        return ""
    if not isinstance(mask, dict) or "counts" not in mask:
        return f"must be polygons or an RLE, found {type(mask).__name__}"
    if tuple(mask.get("size", ())) != size:
        return f"size is {mask.get('size')}, but height and width of the image are {[*size]}"
    if isinstance(mask["counts"], list):
        runs = sum(mask["counts"])
        area = size[0] * size[1]
        return "" if runs == area else f"counts cover {runs} pixels, not height x width = {area}"
    found = first_malformed([mask["counts"]], [size[0] * size[1]])
    return found[1] if found else ""


def _problem_of(entry: Any) -> str:
    """What is wrong with an entry of a results file; empty if nothing is."""
    if not isinstance(entry, dict):
        return f"must be an object, found {type(entry).__name__}"
    for key in ("image_id", "category_id", "score"):
        if key not in entry:
            return f"has no {key!r}"
    if not _is_number(entry["score"]):
        return f"score must be a finite number, found {entry['score']!r}"
    if "bbox" not in entry and "segmentation" not in entry:
        return "has neither 'bbox' nor 'segmentation'"
    if "bbox" in entry:
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return f"bbox must be four finite numbers x, y, width, height; found {box!r}"
        if box[2] < 0 or box[3] < 0:
            return f"bbox has a negative width or height: {box!r}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _some(values: Iterable[Any]) -> str:
    """The first few values, and how many more there are."""
    shown = sorted(values, key=str)
    more = len(shown) - NAMED_AT_MOST
    return ", ".join(map(repr, shown[:NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")


def _read_json(path: Union[str, Path], what: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"there is no {what} file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{what} {path} are not JSON: {error}") from error
