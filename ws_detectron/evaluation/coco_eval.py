"""COCO metrics of a results file, computed by faster-coco-eval or pycocotools.

The metrics are defined at https://cocodataset.org/#detection-eval; here they are in %. This module
imports neither torch nor detectron2.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Optional, Union

from pycocotools import mask as mask_util

from ws_detectron.data.rle import check_masks
from ws_detectron.data.validate import as_rle, no_garbage_collection, validate
from ws_detectron.errors import DataError

from .coco_files import check_ids

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
# in the order of COCOeval.stats
COCO_METRICS = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split())
CATEGORY_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

# None: undefined, because there is no ground truth; COCO's own code returns -1
Metrics = dict[str, Optional[float]]


@dataclass(frozen=True)
class Category:
    """A category of the annotations with its number of objects, crowds excluded."""

    id: Union[int, str]
    name: str
    objects: int


@dataclass(frozen=True)
class CocoResult:
    """The result of `evaluate`.

    Args:
        backend: name and version of the library that computed it.
        images: number of images in the annotations.
        images_without_predictions: number of these images that have no prediction.
        predictions: number of predictions in the results file.
        categories: in the order of the annotation file.
        metrics: task -> the twelve `COCO_METRICS`.
        per_category: task -> category id -> `CATEGORY_METRICS`.
    """

    backend: str
    images: int
    images_without_predictions: int
    predictions: int
    categories: tuple[Category, ...]
    metrics: dict[str, Metrics]
    per_category: dict[str, dict[Any, Metrics]]


def evaluate(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    tasks: Optional[Sequence[str]] = None,
    *,
    reference: bool = False,
    annotations_name: str = "given",
    predictions_name: str = "given",
) -> CocoResult:
    """Computes the COCO metrics.

    Images, categories and annotations are renumbered from 1 before they are passed to the library,
    see `IdMap`: COCO's code treats an object with id 0 as unmatched, and faster-coco-eval confuses
    similar text ids and large numbers.

    Args:
        annotations: the content of a COCO file; validated as in `load_annotations`, not changed.
        predictions: as returned by `load_predictions`; not changed. An empty list has AP 0.
        tasks: some of `TASKS`; default: those that both annotations and predictions allow.
        reference: use pycocotools, which is slower, instead of faster-coco-eval. pycocotools is
            also used if faster-coco-eval is not installed.
        annotations_name: name of the annotations in error messages.
        predictions_name: name of the predictions in error messages.

    Raises:
        DataError: the predictions do not belong to the annotations, a task lacks boxes or masks,
            or a mask is malformed.
    """
    annotations = validate(annotations, annotations_name).usable(log=False)
    check_ids(predictions, annotations, predictions_name, annotations_name)
    tasks = choose_tasks(annotations, predictions, tasks, annotations_name, predictions_name)
    if "segm" in tasks:
        sizes = {i["id"]: (i.get("height"), i.get("width")) for i in annotations["images"]}
        check_masks(predictions, sizes, predictions_name)
    return compute(annotations, predictions, tasks, reference=reference)


def choose_tasks(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    wanted: Optional[Sequence[str]],
    annotations_name: str,
    predictions_name: str,
) -> tuple[str, ...]:
    """The tasks that can be evaluated, or `wanted`; see `evaluate` for the arguments.

    A task for which no entry has boxes or masks is skipped with a warning.

    Raises:
        DataError: some entries have no box or mask, or no task is left; names the first entry.
    """
    sized = {i["id"] for i in annotations["images"] if isinstance(i.get("height"), int)}
    truth = annotations["annotations"]
    groups = (
        ("bbox", f"predictions {predictions_name}", predictions, _has_box),
        ("segm", f"predictions {predictions_name}", predictions, _has_mask),
        ("segm", f"annotations {annotations_name}", truth, _has_mask),
        (
            "segm",
            f"annotations {annotations_name} (without height and width of the image)",
            truth,
            lambda entry: entry["image_id"] in sized,
        ),
    )
    lacking: dict[str, str] = {}
    for task, name, entries, has in groups:
        without = next((n for n, entry in enumerate(entries) if not has(entry)), None)
        if without is None or (wanted is not None and task not in wanted):
            continue
        what = "boxes" if task == "bbox" else "masks"
        if wanted is not None or any(map(has, entries)):
            other = "segm" if task == "bbox" else "bbox"
            raise DataError(
                f"task {task} needs {what} everywhere: entry {without} of {name} has none; "
                f"to evaluate the other task only: --task {other}"
            )
        lacking[task] = f"task {task} is skipped: {name} have no {what}"
    tasks = TASKS if wanted is None else wanted
    chosen = tuple(task for task in TASKS if task in tasks and task not in lacking)
    if not chosen:
        raise DataError("no task can be evaluated: " + "; ".join(lacking.values()))
    for sentence in lacking.values():
        logger.warning(sentence)
    return chosen


def _has_box(entry: dict[str, Any]) -> bool:
    return entry.get("bbox") is not None


def _has_mask(entry: dict[str, Any]) -> bool:
    return bool(entry.get("segmentation"))


@dataclass(frozen=True)
class IdMap:
    """Maps the ids of a file to 1, 2, ... in the order in which COCO's code sorts them.

    The order matters where predictions in different images have equal scores.

    Args:
        images: image id -> number.
        categories: category id -> number.
    """

    images: dict[Any, int]
    categories: dict[Any, int]

    @classmethod
    def from_annotations(cls, annotations: dict[str, Any]) -> "IdMap":
        """Integers are sorted before text."""
        images, categories = (
            sorted((e["id"] for e in annotations[key]), key=lambda i: (isinstance(i, str), i))
            for key in ("images", "categories")
        )
        return cls(*({i: n for n, i in enumerate(ids, start=1)} for ids in (images, categories)))

    def renumber(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A copy of an annotation or prediction with the mapped ids."""
        return {
            **entry,
            "image_id": self.images[entry["image_id"]],
            "category_id": self.categories[entry["category_id"]],
        }


def compute(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    tasks: Sequence[str],
    *,
    reference: bool,
) -> CocoResult:
    """Computes the metrics without the checks of `evaluate`."""
    coco_class, eval_class, backend = _library(reference)
    ids = IdMap.from_annotations(annotations)
    metrics: dict[str, Metrics] = {}
    per_category: dict[str, dict[Any, Metrics]] = {}
    # both libraries may print progress
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():
        truth = coco_truth(coco_class, annotations, ids, masks="segm" in tasks)
        for task in tasks:
            results = coco_results(coco_class, truth, predictions, task, ids)
            evaluation = eval_class(truth, results, task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics[task] = {
                name: _percent(value) for name, value in zip(COCO_METRICS, evaluation.stats)
            }
            per_category[task] = _per_category(evaluation, list(ids.categories))
    counts = Counter(a["category_id"] for a in annotations["annotations"] if not a.get("iscrowd"))
    return CocoResult(
        backend=backend,
        images=len(annotations["images"]),
        images_without_predictions=len(
            {image["id"] for image in annotations["images"]}
            - {entry["image_id"] for entry in predictions}
        ),
        predictions=len(predictions),
        categories=tuple(
            Category(c["id"], str(c.get("name", c["id"])), counts[c["id"]])
            for c in annotations["categories"]
        ),
        metrics=metrics,
        per_category=per_category,
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


def coco_truth(coco_class: Any, annotations: dict[str, Any], ids: IdMap, *, masks: bool) -> Any:
    """Annotations as the library's COCO object, renumbered.

    They are copied, because COCOeval modifies them.

    Args:
        coco_class: the library's COCO class.
        annotations: as returned by `load_annotations`.
        ids: map of the same annotations.
        masks: convert all masks to RLE. pycocotools does this for both libraries, so that both
            evaluate the same pixels; it is also twice as fast at it as faster-coco-eval.
    """
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in annotations["images"]}
    numbered = []
    for n, annotation in enumerate(annotations["annotations"], start=1):
        entry = {**ids.renumber(annotation), "id": n}
        mask = entry.pop("segmentation", None)
        if masks:
            entry["segmentation"] = as_rle(mask, sizes[annotation["image_id"]])
        numbered.append(entry)
    truth = coco_class()
    truth.dataset = {
        "images": [{**i, "id": ids.images[i["id"]]} for i in annotations["images"]],
        "categories": [{**c, "id": ids.categories[c["id"]]} for c in annotations["categories"]],
        "annotations": numbered,
    }
    _index(truth)
    return truth


def coco_results(
    coco_class: Any,
    truth: Any,
    predictions: Sequence[dict[str, Any]],
    task: str,
    ids: IdMap,
) -> Any:
    """Predictions as the library's COCO object, with only what `task` needs.

    `COCO.loadRes` fails on an empty list in pycocotools, and it computes masks from boxes and
    boxes from masks one by one, which takes much of the fast library's time. As in detectron2, the
    area of a detection is the area of what is evaluated: box or mask.
    """
    if task == "bbox":
        key, areas = "bbox", [entry["bbox"][2] * entry["bbox"][3] for entry in predictions]
    else:
        key = "segmentation"
        areas = [mask_util.area(entry["segmentation"]) for entry in predictions]
    names = ("image_id", "category_id", "score", key)
    results = coco_class()
    results.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": [
            {
                **ids.renumber({name: entry[name] for name in names}),
                "id": n,
                "area": area,
                "iscrowd": 0,
            }
            for n, (entry, area) in enumerate(zip(predictions, areas), start=1)
        ],
    }
    _index(results)
    return results


def _index(coco: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints progress
        coco.createIndex()


def _per_category(evaluation: Any, category_ids: Sequence[Any]) -> dict[Any, Metrics]:
    """Category id -> metrics; `category_ids` are in the order of their numbers.

    Precision has axes (IoU thresholds, recall thresholds, categories, areas, max. detections),
    recall has no recall thresholds. For a category and an area, either all values are -1 or none.
    """
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    at = {round(100 * float(iou)): number for number, iou in enumerate(evaluation.params.iouThrs)}
    metrics = {}
    for k, category in enumerate(evaluation.params.catIds):
        own = precision[:, :, k, :, -1]
        values = [own[:, :, 0], own[at[50], :, 0], own[at[75], :, 0]]
        values += [own[:, :, 1], own[:, :, 2], own[:, :, 3], recall[:, k, 0, -1]]
        metrics[category_ids[int(category) - 1]] = {
            name: _percent(value.mean()) for name, value in zip(CATEGORY_METRICS, values)
        }
    return metrics


def _percent(value: float) -> Optional[float]:
    return None if value < 0 else 100 * float(value)
