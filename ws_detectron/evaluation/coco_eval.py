"""The COCO figures of a results file, through faster-coco-eval or through pycocotools.

Figures are defined at https://cocodataset.org/#detection-eval and given here in per cent.
Needs no torch and no detectron2.
"""

import contextlib
import gc
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Optional

from pycocotools import mask as mask_util

from ws_detectron.errors import DataError

from .coco_files import check_annotation_masks, check_ids
from .rle import check_masks

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
# in the order of COCOeval.stats
FIGURES = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split())
CATEGORY_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

# None: undefined, because there is no object to find; COCO's own code says -1
Figures = dict[str, Optional[float]]


@dataclass(frozen=True)
class Category:
    """A category of the annotations, and how many objects of it there are, crowds not counted."""

    id: int
    name: str
    objects: int


@dataclass(frozen=True)
class CocoResult:
    """What `evaluate` found.

    Args:
        backend: library and version that computed it.
        images: in the annotations.
        images_without_predictions: of these, how many nothing was predicted for.
        predictions: in the results file.
        categories: in the order of the annotation file.
        figures: task -> the twelve of `FIGURES`.
        per_category: task -> category id -> those of `CATEGORY_FIGURES`.
    """

    backend: str
    images: int
    images_without_predictions: int
    predictions: int
    categories: tuple[Category, ...]
    figures: dict[str, Figures]
    per_category: dict[str, dict[int, Figures]]


def evaluate(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    tasks: Optional[Sequence[str]] = None,
    *,
    reference: bool = False,
    annotations_name: str = "given",
    predictions_name: str = "given",
) -> CocoResult:
    """Computes the COCO figures.

    Annotations are renumbered from 1 on their way to the library: to COCO's code an object with id
    0 is one that nothing matched.

    Args:
        annotations: of `load_annotations`; not changed.
        predictions: of `load_predictions`; not changed. None at all means AP 0.
        tasks: of `TASKS`; by default those that annotations and predictions have boxes and masks
            for.
        reference: use pycocotools instead of faster-coco-eval; slower, the same figures. It is
            used anyway where the other is not installed.
        annotations_name: what to call the annotations in errors.
        predictions_name: what to call the predictions in errors.

    Raises:
        DataError: the two do not belong together, lack what a task needs, or hold broken masks.
    """
    check_ids(predictions, annotations, predictions_name, annotations_name)
    tasks = choose_tasks(annotations, predictions, tasks, annotations_name, predictions_name)
    if "segm" in tasks:
        check_annotation_masks(annotations, annotations_name)
        sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
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

    Raises:
        DataError: a wanted task lacks boxes or masks; names the first entry without.
    """
    lacking: dict[str, str] = {}
    for task, key in (("bbox", "bbox"), ("segm", "segmentation")):
        for number, entry in enumerate(predictions):
            if entry.get(key) is None:
                lacking[task] = f"entry {number} of predictions {predictions_name} has no {key!r}"
                break
    without_mask = (a["id"] for a in annotations["annotations"] if not a.get("segmentation"))
    first = next(without_mask, None)
    if first is not None:
        lacking["segm"] = f"annotation {first} of {annotations_name} has no 'segmentation'"
    tasks = [task for task in TASKS if task not in lacking] if wanted is None else list(wanted)
    for task in tasks:
        if task in lacking:
            raise DataError(f"task {task} cannot be evaluated: {lacking[task]}")
    if not tasks:
        raise DataError("no task can be evaluated: " + "; ".join(lacking.values()))
    return tuple(task for task in TASKS if task in tasks)


def compute(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    tasks: Sequence[str],
    *,
    reference: bool,
) -> CocoResult:
    """`evaluate` without its checks."""
    coco_class, eval_class, backend = _library(reference)
    figures: dict[str, Figures] = {}
    per_category: dict[str, dict[int, Figures]] = {}
    # both libraries may report progress with print
    with contextlib.redirect_stdout(io.StringIO()), _no_garbage_collection():
        truth = coco_truth(coco_class, annotations, masks="segm" in tasks)
        for task in tasks:
            results = coco_results(coco_class, truth, predictions, task)
            evaluation = eval_class(truth, results, task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures[task] = {
                name: _per_cent(value) for name, value in zip(FIGURES, evaluation.stats)
            }
            per_category[task] = _per_category(evaluation)
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
        figures=figures,
        per_category=per_category,
    )


def _library(reference: bool) -> tuple[Any, Any, str]:
    """The classes COCO and COCOeval of one of the libraries, and its name and version."""
    if not reference:
        try:
            from faster_coco_eval import COCO as FasterCOCO
            from faster_coco_eval import COCOeval_faster

            return FasterCOCO, COCOeval_faster, f"faster-coco-eval {version('faster-coco-eval')}"
        except ImportError:
            logger.warning(
                "faster-coco-eval is not installed, so pycocotools is used, which is several "
                "times slower: pip install faster-coco-eval"
            )
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval, f"pycocotools {version('pycocotools')}"


def coco_truth(coco_class: Any, annotations: dict[str, Any], *, masks: bool) -> Any:
    """Annotations as the library's COCO object, numbered from 1.

    They are copied, because COCOeval writes into them.

    Args:
        coco_class: the library's COCO.
        annotations: of `load_annotations`, checked.
        masks: make RLEs of all masks. Both libraries get them from pycocotools, so they evaluate
            the same pixels, and the fast one takes twice as long for it.
    """
    truth = coco_class()
    numbered = [{**a, "id": n} for n, a in enumerate(annotations["annotations"], start=1)]
    if masks:
        sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
        for annotation in numbered:
            size = sizes[annotation["image_id"]]
            annotation["segmentation"] = _as_rle(annotation["segmentation"], size)
    truth.dataset = {**annotations, "annotations": numbered}
    _index(truth)
    return truth


def _as_rle(mask: Any, size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(mask, list):
        return mask_util.merge(mask_util.frPyObjects(mask, *size))
    return mask_util.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Spares the time in which Python would look through millions of objects for cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def coco_results(
    coco_class: Any, truth: Any, predictions: Sequence[dict[str, Any]], task: str
) -> Any:
    """Predictions as the library's COCO object, with nothing but what `task` needs.

    `loadRes` would do it, but fails on an empty list in pycocotools, and gives boxes masks and
    masks boxes one by one, which takes a large part of the fast library's time. The area of a
    detection is that of what is evaluated, as detectron2 has it.
    """
    if task == "bbox":
        key, areas = "bbox", [entry["bbox"][2] * entry["bbox"][3] for entry in predictions]
    else:
        key, areas = (
            "segmentation",
            [mask_util.area(entry["segmentation"]) for entry in predictions],
        )
    names = ("image_id", "category_id", "score", key)
    results = coco_class()
    results.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": [
            {**{name: entry[name] for name in names}, "id": n, "area": area, "iscrowd": 0}
            for n, (entry, area) in enumerate(zip(predictions, areas), start=1)
        ],
    }
    _index(results)
    return results


def _index(coco: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports progress with print
        coco.createIndex()


def _per_category(evaluation: Any) -> dict[int, Figures]:
    """Category id -> figures.

    Precision is (IoU thresholds, recall thresholds, categories, areas, max. detections), recall the
    same without the second. Of a category and an area, all are -1 or none is.
    """
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    at = {round(100 * float(iou)): number for number, iou in enumerate(evaluation.params.iouThrs)}
    figures = {}
    for k, category in enumerate(evaluation.params.catIds):
        found = precision[:, :, k, :, -1]
        parts = [found[:, :, 0], found[at[50], :, 0], found[at[75], :, 0]]
        parts += [found[:, :, 1], found[:, :, 2], found[:, :, 3], recall[:, k, 0, -1]]
        figures[int(category)] = {
            name: _per_cent(part.mean()) for name, part in zip(CATEGORY_FIGURES, parts)
        }
    return figures


def _per_cent(value: float) -> Optional[float]:
    return None if value < 0 else 100 * float(value)
