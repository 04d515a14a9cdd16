"""AP of single images, to find the best and the worst."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .coco_eval import Numbers, coco_results, coco_truth


def image_ap(
    annotations: dict[str, Any], predictions: Sequence[dict[str, Any]], task: str
) -> dict[Any, float]:
    """AP of each image by itself.

    Predictions are matched to objects of their class by COCO's rules (pycocotools, at most 100 per
    class, crowds ignored). AP is then the area under one precision-recall curve of all classes
    together, interpolated at 101 recalls as COCO does, averaged over the IoU thresholds 0.50, 0.55,
    ..., 0.95. COCO's own mean over classes would not count predictions of classes that the image
    does not show.

    Args:
        annotations: of `load_annotations`.
        predictions: of `load_predictions`, checked.
        task: "bbox" or "segm".

    Returns:
        Image id -> AP in per cent; images without an object, crowds aside, have none.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        numbers = Numbers.of(annotations)
        truth = coco_truth(COCO, annotations, numbers, masks=task == "segm")
        evaluation = COCOeval(truth, coco_results(COCO, truth, predictions, task, numbers), task)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    by_image = defaultdict(list)
    for match in evaluation.evalImgs:
        if match is not None:
            by_image[match["image_id"]].append(match)
    recalls = evaluation.params.recThrs
    found = {}
    for image_id, number in numbers.images.items():
        matches = by_image[number]
        objects = sum(int(np.sum(~np.asarray(m["gtIgnore"], dtype=bool))) for m in matches)
        if objects:
            found[image_id] = 100 * _average_precision(matches, objects, recalls)
    return found


def _average_precision(matches: list[dict[str, Any]], objects: int, recalls: np.ndarray) -> float:
    """AP over all classes of an image.

    Args:
        matches: of COCOeval for each class: `dtScores` (D,), `dtMatches` and `dtIgnore` (T, D).
        objects: to be found.
        recalls: (R,) where precision is read.
    """
    scores = np.concatenate([match["dtScores"] for match in matches])
    order = np.argsort(-scores, kind="mergesort")
    matched = np.concatenate([match["dtMatches"] for match in matches], axis=1)[:, order] > 0
    ignored = np.concatenate([match["dtIgnore"] for match in matches], axis=1)[:, order] > 0
    total = []
    for hit, passed_over in zip(matched, ignored):
        hits = np.cumsum(hit & ~passed_over)
        precision = hits / np.maximum(np.cumsum(~passed_over), 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or more
        index = np.searchsorted(hits / objects, recalls, side="left")
        total.append(float(np.append(precision, 0.0)[index].mean()))
    return float(np.mean(total))
