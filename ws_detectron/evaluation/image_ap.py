"""AP of single images."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .coco_eval import IdMap, coco_results, coco_truth


def image_ap(
    annotations: dict[str, Any], predictions: Sequence[dict[str, Any]], task: str
) -> dict[Any, float]:
    """AP of each image.

    Predictions are matched to objects of their class by COCO's rules (pycocotools, at most 100 per
    class, crowds ignored). AP is the area under one precision-recall curve of all classes together,
    interpolated at 101 recalls as in COCO, averaged over the IoU thresholds 0.50, 0.55, ..., 0.95.
    COCO's mean over classes would ignore predictions of classes that are not in the image.

    Args:
        annotations: as returned by `load_annotations`.
        predictions: as returned by `load_predictions`, with ids and masks checked.
        task: "bbox" or "segm".

    Returns:
        Image id -> AP in %; without the images that have no object except crowds.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ids = IdMap.from_annotations(annotations)
        truth = coco_truth(COCO, annotations, ids, masks=task == "segm")
        evaluation = COCOeval(truth, coco_results(COCO, truth, predictions, task, ids), task)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    by_image = defaultdict(list)
    for match in evaluation.evalImgs:
        if match is not None:
            by_image[match["image_id"]].append(match)
    recalls = evaluation.params.recThrs
    ap = {}
    for image_id, number in ids.images.items():
        matches = by_image[number]
        objects = sum(int(np.sum(~np.asarray(m["gtIgnore"], dtype=bool))) for m in matches)
        if objects:
            ap[image_id] = 100 * _average_precision(matches, objects, recalls)
    return ap


def _average_precision(matches: list[dict[str, Any]], objects: int, recalls: np.ndarray) -> float:
    """AP over all classes of an image, 0 to 1.

    Args:
        matches: from COCOeval, for each class: `dtScores` (D,), `dtMatches` and `dtIgnore` (T, D).
        objects: number of ground-truth objects.
        recalls: (R,) at which precision is interpolated.
    """
    scores = np.concatenate([match["dtScores"] for match in matches])
    order = np.argsort(-scores, kind="mergesort")
    matched = np.concatenate([match["dtMatches"] for match in matches], axis=1)[:, order] > 0
    ignored = np.concatenate([match["dtIgnore"] for match in matches], axis=1)[:, order] > 0
    values = []
    for hit, skip in zip(matched, ignored):
        hits = np.cumsum(hit & ~skip)
        precision = hits / np.maximum(np.cumsum(~skip), 1)
        precision = np.maximum.accumulate(precision[::-1])[
            ::-1
        ]  # the best at this or a higher recall
        index = np.searchsorted(hits / objects, recalls, side="left")
        values.append(float(np.append(precision, 0.0)[index].mean()))
    return float(np.mean(values))
