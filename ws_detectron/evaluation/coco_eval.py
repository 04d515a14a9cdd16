"""COCO metrics: reads annotations and predictions, checks that they belong together, evaluates.

Formats: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results. Metrics
are defined at https://cocodataset.org/#detection-eval; here they are in %; faster-coco-eval or
pycocotools computes them. This module imports neither torch nor detectron2.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from pycocotools import mask as mask_util

from ws_detectron.data.rle import check_masks
from ws_detectron.data.validate import as_rle, finite, no_garbage_collection, read_json, validate
from ws_detectron.errors import DataError, list_some
from ws_detectron.utils.command_line import progress

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
# in the order of COCOeval.stats
COCO_METRICS = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split())
CATEGORY_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

# None: undefined, because there is no ground truth; COCO's own code returns -1
Metrics = dict[str, Optional[float]]

NAMED_AT_MOST = 5

Entry = dict[str, Any]  # an annotation or a prediction


def load_annotations(path: Union[str, Path], *, load: bool = False) -> dict[str, Any]:
    """Reads a COCO instances file, checked and fixed by `data.validate`.

    Args:
        path: the file.
        load: images need file names and sizes, categories need names.

    Raises:
        DataError: the file cannot be read or has errors; lists them.
    """
    return validate(read_json(path, "annotations"), str(path), load=load).usable()


def load_predictions(path: Union[str, Path]) -> list[Entry]:
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
    box = entry.get("bbox")
    if box is None:
        return "" if entry.get("segmentation") else "has neither 'bbox' nor 'segmentation'"
    if not isinstance(box, list) or len(box) != 4 or None in map(finite, box):
        return f"bbox must be four finite numbers x, y, width, height; found {box!r:.60}"
    return f"bbox has a negative width or height: {box!r:.60}" if min(box[2:]) < 0 else ""


def check_predictions(
    annotations: dict[str, Any],
    predictions: Sequence[Entry],
    wanted: Optional[Sequence[str]] = None,
    *,
    annotations_name: str = "given",
    predictions_name: str = "given",
) -> tuple[str, ...]:
    """Checks that predictions belong to annotations; returns the tasks that can be evaluated.

    A task for which no entry has boxes or masks is skipped with a warning.

    Args:
        annotations: as returned by `load_annotations`.
        predictions: as returned by `load_predictions`.
        wanted: some of `TASKS`; default: those that both annotations and predictions allow.
        annotations_name: name of the annotations in error messages.
        predictions_name: name of the predictions in error messages.

    Raises:
        DataError: ids of predictions are not in the annotations, a mask is malformed, only some
            entries have a box or a mask, or no task is left; names the first entry.
    """
    of_truth, of_found = f"annotations {annotations_name}", f"predictions {predictions_name}"
    _check_ids(annotations, predictions, of_truth, of_found)
    truth = annotations["annotations"]
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in annotations["images"]}
    needs: tuple[tuple[str, str, str, Sequence[Entry], Callable[[Entry], Any]], ...] = (
        ("bbox", "boxes", of_found, predictions, lambda e: e.get("bbox")),
        ("segm", "masks", of_found, predictions, lambda e: e.get("segmentation")),
        ("segm", "masks", of_truth, truth, lambda e: e.get("segmentation")),
        ("segm", "image sizes", of_truth, truth, lambda e: sizes[e["image_id"]][0]),
    )
    skipped: dict[str, str] = {}
    for task, what, name, entries, has in needs:
        present = [bool(has(entry)) for entry in entries]
        if all(present) or task not in (wanted or TASKS):
            continue
        if wanted or any(present):
            other = "segm" if task == "bbox" else "bbox"
            raise DataError(
                f"task {task} needs {what} everywhere: entry {present.index(False)} of {name} has "
                f"none; to evaluate the other task only: --task {other}"
            )
        skipped[task] = f"task {task} is skipped: {name} have no {what}"
    tasks = tuple(task for task in TASKS if task in (wanted or TASKS) and task not in skipped)
    if not tasks:
        raise DataError("no task can be evaluated: " + "; ".join(skipped.values()))
    for message in skipped.values():
        logger.warning(message)
    if "segm" in tasks:
        check_masks(predictions, sizes, predictions_name)
    return tasks


def _check_ids(
    annotations: dict[str, Any], predictions: Sequence[Entry], of_truth: str, of_found: str
) -> None:
    for key, entries, cause in (
        ("image_id", "images", "were they computed on another data set or split?"),
        (
            "category_id",
            "categories",
            "results files hold the data set's own ids, not the model's class numbers from 0",
        ),
    ):
        known = {entry["id"] for entry in annotations[entries]}
        unknown = {entry[key] for entry in predictions} - known
        if unknown:
            some, have = (
                list_some([repr(i) for i in sorted(ids, key=str)], NAMED_AT_MOST)
                for ids in (unknown, known)
            )
            raise DataError(
                f"{of_found} name {len(unknown)} {key.replace('_', ' ')}s that the {of_truth} do "
                f"not have: {some} (they have: {have}); {cause}"
            )


@dataclass(frozen=True)
class CategoryResult:
    """The result for one category.

    Args:
        id: in the annotations.
        name: in the annotations.
        objects: number of its objects, crowds excluded.
        metrics: task -> `CATEGORY_METRICS`.
    """

    id: Union[int, str]
    name: str
    objects: int
    metrics: dict[str, Metrics]


@dataclass(frozen=True)
class CocoResult:
    """The result of `evaluate`.

    Args:
        backend: name and version of the library that computed it.
        images: number of images in the annotations.
        images_without_predictions: number of these images that have no prediction.
        predictions: number of predictions in the results file.
        metrics: task -> the twelve `COCO_METRICS`.
        categories: in the order of their ids.
        precision: task -> COCO's precision, 0 to 1, of (IoU thresholds, recalls, categories), with
            all areas and 100 detections; -1 where a category has no object.
    """

    backend: str
    images: int
    images_without_predictions: int
    predictions: int
    metrics: dict[str, Metrics]
    categories: tuple[CategoryResult, ...]
    precision: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)


def evaluate(
    annotations: dict[str, Any],
    predictions: Sequence[Entry],
    tasks: Optional[Sequence[str]] = None,
    *,
    reference: bool = False,
    annotations_name: str = "given",
    predictions_name: str = "given",
) -> CocoResult:
    """Computes the COCO metrics.

    Args:
        annotations: as returned by `load_annotations`; not changed.
        predictions: as returned by `load_predictions`; not changed. An empty list has AP 0.
        tasks: some of `TASKS`; default: those that both annotations and predictions allow.
        reference: use pycocotools, which is slower, instead of faster-coco-eval. pycocotools is
            also used if faster-coco-eval is not installed.
        annotations_name: name of the annotations in error messages.
        predictions_name: name of the predictions in error messages.

    Raises:
        DataError: see `check_predictions`.
    """
    images = len(annotations["images"])
    logger.info("evaluating %d predictions on %d images", len(predictions), images)
    tasks = check_predictions(
        annotations,
        predictions,
        tasks,
        annotations_name=annotations_name,
        predictions_name=predictions_name,
    )
    return coco_metrics(annotations, predictions, tasks, reference=reference)


def coco_metrics(
    annotations: dict[str, Any],
    predictions: Sequence[Entry],
    tasks: Sequence[str],
    *,
    reference: bool = False,
) -> CocoResult:
    """As `evaluate`, of what `check_predictions` has checked."""
    coco_class, eval_class, backend = _library(reference)
    metrics: dict[str, Metrics] = {}
    by_category: dict[str, list[Metrics]] = {}
    precision: dict[str, np.ndarray] = {}
    # both libraries may print progress
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():
        numbered = NumberedSet(annotations, masks="segm" in tasks, coco_class=coco_class)
        for task in progress(tasks, "COCO metrics", "task"):
            evaluation = eval_class(numbered.truth, numbered.results(predictions, task), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics[task] = dict(zip(COCO_METRICS, map(_percent, evaluation.stats)))
            by_category[task] = _by_category(evaluation)
            precision[task] = evaluation.eval["precision"][:, :, :, 0, -1]
    images = {image["id"] for image in annotations["images"]}
    objects = Counter(a["category_id"] for a in annotations["annotations"] if not a.get("iscrowd"))
    names = {c["id"]: str(c.get("name", c["id"])) for c in annotations["categories"]}
    return CocoResult(
        backend=backend,
        images=len(images),
        images_without_predictions=len(images - {entry["image_id"] for entry in predictions}),
        predictions=len(predictions),
        metrics=metrics,
        categories=tuple(
            CategoryResult(id_, names[id_], objects[id_], {t: by_category[t][n] for t in tasks})
            for n, id_ in enumerate(numbered.category_ids)
        ),
        precision=precision,
    )


def _library(reference: bool) -> tuple[Any, Any, str]:
    """The library's COCO and COCOeval classes, and its name and version."""
    if not reference:
        try:
            from faster_coco_eval import COCO as FasterCOCO
            from faster_coco_eval import COCOeval_faster

            return FasterCOCO, COCOeval_faster, f"faster-coco-eval {version('faster-coco-eval')}"
        except ImportError:
            logger.warning(
                "faster-coco-eval is not installed; using pycocotools, which is several times "
                "slower: pip install faster-coco-eval"
            )
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval, f"pycocotools {version('pycocotools')}"


class NumberedSet:
    """Annotations as a library's COCO object, with the ids 1, 2, ... instead of those of the file.

    COCO's code treats an object with id 0 as unmatched, and faster-coco-eval confuses similar text
    ids and large numbers. Numbers are in the order in which COCO's code sorts ids, which matters
    where predictions in different images have equal scores; integers are sorted before text.

    Args:
        annotations: as returned by `load_annotations`; copied, because COCOeval modifies them.
        masks: convert all masks to RLE. pycocotools does this for both libraries, so that both
            evaluate the same pixels; it is also twice as fast at it as faster-coco-eval.
        coco_class: the library's COCO class.

    Attributes:
        image_ids: the id in the file of image n is `image_ids[n - 1]`.
        category_ids: the same for categories.
        truth: the COCO object.
    """

    def __init__(self, annotations: dict[str, Any], *, masks: bool, coco_class: Any) -> None:
        self.image_ids, self.category_ids = (
            sorted((e["id"] for e in annotations[key]), key=lambda i: (isinstance(i, str), i))
            for key in ("images", "categories")
        )
        self._images = {id_: n for n, id_ in enumerate(self.image_ids, start=1)}
        self._categories = {id_: n for n, id_ in enumerate(self.category_ids, start=1)}
        self._class = coco_class
        self._images_and_categories = {
            "images": [{**i, "id": self._images[i["id"]]} for i in annotations["images"]],
            "categories": [
                {**c, "id": self._categories[c["id"]]} for c in annotations["categories"]
            ],
        }
        sizes = {i["id"]: (i.get("height"), i.get("width")) for i in annotations["images"]}
        entries = []
        for annotation in annotations["annotations"]:
            entry = {key: value for key, value in annotation.items() if key != "segmentation"}
            if masks:
                size = sizes[annotation["image_id"]]
                entry["segmentation"] = as_rle(annotation["segmentation"], size)
            entries.append(entry)
        self.truth = self._coco(entries)

    def results(self, predictions: Sequence[Entry], task: str) -> Any:
        """Predictions as a COCO object, with only what a task needs.

        `COCO.loadRes` fails on an empty list in pycocotools, and it computes masks from boxes and
        boxes from masks one by one, which takes much of the fast library's time. As in detectron2,
        the area of a detection is the area of what is evaluated: box or mask.
        """
        entries = []
        for entry in predictions:
            if task == "bbox":
                key, area = "bbox", entry["bbox"][2] * entry["bbox"][3]
            else:
                key, area = "segmentation", mask_util.area(entry["segmentation"])
            kept = {name: entry[name] for name in ("image_id", "category_id", "score", key)}
            entries.append({**kept, "area": area, "iscrowd": 0})
        return self._coco(entries)

    def _coco(self, entries: Sequence[Entry]) -> Any:
        coco = self._class()
        coco.dataset = {
            **self._images_and_categories,
            "annotations": [
                {
                    **entry,
                    "id": n,
                    "image_id": self._images[entry["image_id"]],
                    "category_id": self._categories[entry["category_id"]],
                }
                for n, entry in enumerate(entries, start=1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints progress
            coco.createIndex()
        return coco


def _by_category(evaluation: Any) -> list[Metrics]:
    """`CATEGORY_METRICS` of each category.

    Precision has axes (IoU thresholds, recall thresholds, categories, areas, max. detections),
    recall has no recall thresholds. For a category and an area, either all values are -1 or none.
    """
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    at = {round(100 * float(iou)): number for number, iou in enumerate(evaluation.params.iouThrs)}
    metrics = []
    for k in range(precision.shape[2]):
        own = precision[:, :, k, :, -1]
        values = [own[:, :, 0], own[at[50], :, 0], own[at[75], :, 0]]
        values += [own[:, :, 1], own[:, :, 2], own[:, :, 3], recall[:, k, 0, -1]]
        metrics.append(dict(zip(CATEGORY_METRICS, (_percent(v.mean()) for v in values))))
    return metrics


def _percent(value: float) -> Optional[float]:
    return None if value < 0 else 100 * float(value)
