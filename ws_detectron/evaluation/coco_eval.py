"""The COCO figures of a results file, through faster-coco-eval or through pycocotools.

Figures are defined at https://cocodataset.org/#detection-eval and given here in per cent.
Needs no torch and no detectron2.
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
FIGURES = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split())
CATEGORY_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

# None: undefined, because there is no object to find; COCO's own code says -1
Figures = dict[str, Optional[float]]


@dataclass(frozen=True)
class Category:
    """A category of the annotations, and how many objects of it there are, crowds not counted."""

    id: Union[int, str]
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
    per_category: dict[str, dict[Any, Figures]]


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

    Images, categories and annotations are numbered from 1 on their way to the library, see
    `Numbers`. To COCO's code an object with id 0 is one that nothing matched, and faster-coco-eval
    makes one of text ids that look alike, and of large numbers.

    Args:
        annotations: the content of a COCO file; checked as `load_annotations` does, not changed.
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

    A task that no entry has boxes or masks for is left out, and a line is logged.

    Raises:
        DataError: a task lacks boxes or masks of some entries; names the first.
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
                f"to evaluate the other task alone: --task {other}"
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
class Numbers:
    """Numbers from 1 for the ids of a file, in the order in which COCO's code sorts them.

    The order decides between equal scores in different images.

    Args:
        images: image id -> number.
        categories: category id -> number.
    """

    images: dict[Any, int]
    categories: dict[Any, int]

    @classmethod
    def of(cls, annotations: dict[str, Any]) -> "Numbers":
        """Whole numbers come before text."""
        images, categories = (
            sorted((e["id"] for e in annotations[key]), key=lambda i: (isinstance(i, str), i))
            for key in ("images", "categories")
        )
        return cls(*({i: n for n, i in enumerate(ids, start=1)} for ids in (images, categories)))

    def apply(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A copy of an annotation or prediction with numbers for its ids."""
        numbers = self.images[entry["image_id"]], self.categories[entry["category_id"]]
        return {**entry, "image_id": numbers[0], "category_id": numbers[1]}


def compute(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    tasks: Sequence[str],
    *,
    reference: bool,
) -> CocoResult:
    """`evaluate` without its checks."""
    coco_class, eval_class, backend = _library(reference)
    numbers = Numbers.of(annotations)
    figures: dict[str, Figures] = {}
    per_category: dict[str, dict[Any, Figures]] = {}
    # both libraries may report progress with print
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():
        truth = coco_truth(coco_class, annotations, numbers, masks="segm" in tasks)
        for task in tasks:
            results = coco_results(coco_class, truth, predictions, task, numbers)
            evaluation = eval_class(truth, results, task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures[task] = {
                name: _per_cent(value) for name, value in zip(FIGURES, evaluation.stats)
            }
            per_category[task] = _per_category(evaluation, list(numbers.categories))
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


def coco_truth(
    coco_class: Any, annotations: dict[str, Any], numbers: Numbers, *, masks: bool
) -> Any:
    """Annotations as the library's COCO object, with `numbers` for ids.

    They are copied, because COCOeval writes into them.

    Args:
        coco_class: the library's COCO.
        annotations: of `load_annotations`.
        numbers: of the same annotations.
        masks: make RLEs of all masks. Both libraries get them from pycocotools, so they evaluate
            the same pixels, and the fast one takes twice as long for it.
    """
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in annotations["images"]}
    numbered = []
    for n, annotation in enumerate(annotations["annotations"], start=1):
        entry = {**numbers.apply(annotation), "id": n}
        mask = entry.pop("segmentation", None)
        if masks:
            entry["segmentation"] = as_rle(mask, sizes[annotation["image_id"]])
        numbered.append(entry)
    truth = coco_class()
    truth.dataset = {
        "images": [{**i, "id": numbers.images[i["id"]]} for i in annotations["images"]],
        "categories": [{**c, "id": numbers.categories[c["id"]]} for c in annotations["categories"]],
        "annotations": numbered,
    }
    _index(truth)
    return truth


def coco_results(
    coco_class: Any,
    truth: Any,
    predictions: Sequence[dict[str, Any]],
    task: str,
    numbers: Numbers,
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
            {
                **numbers.apply({name: entry[name] for name in names}),
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
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports progress with print
        coco.createIndex()


def _per_category(evaluation: Any, ids: Sequence[Any]) -> dict[Any, Figures]:
    """Category id -> figures; `ids` are those of the categories from number 1 on.

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
        figures[ids[int(category) - 1]] = {
            name: _per_cent(part.mean()) for name, part in zip(CATEGORY_FIGURES, parts)
        }
    return figures


def _per_cent(value: float) -> Optional[float]:
    return None if value < 0 else 100 * float(value)
