"""Types of detection errors, counted.

The types are those of D. Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020, arXiv:2008.08115, section 2.2, assigned in the order of the authors' code
(github.com/dbolya/tide). TIDE weights a type by the AP gained by fixing it; this module counts the
errors among predictions above a score threshold.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from .coco_eval import IdMap, coco_truth

FOREGROUND = 0.5  # minimum IoU of a match; t_f in the paper
BACKGROUND = 0.1  # maximum IoU of a prediction on background; t_b
MAX_DETECTIONS = 100

CORRECT, IGNORED = "correct", "ignored"
MISSED, DUPLICATE, WRONG_CLASS = "missed", "duplicate", "wrong class"
LOCALIZATION, BOTH = "poor localization", "wrong class and localization"
ON_BACKGROUND = "background"
ERRORS = {
    MISSED: "objects without a correct, poorly localized or wrong-class prediction",
    DUPLICATE: f"IoU of at least {FOREGROUND} with an object that a higher score has matched",
    WRONG_CLASS: f"IoU of at least {FOREGROUND} with an object of another class",
    LOCALIZATION: f"IoU of {BACKGROUND} to {FOREGROUND} with an object of the class",
    BOTH: f"IoU of {BACKGROUND} to {FOREGROUND} with an object of another class",
    ON_BACKGROUND: f"IoU of at most {BACKGROUND} with any object",
}


def classify_predictions(
    ious: np.ndarray, same_class: np.ndarray, on_crowd: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """The error type of each prediction for an image, and the missed objects.

    A prediction is correct if it has an IoU of at least `FOREGROUND` with an object of its class
    that no higher score has matched; it matches the object with the highest IoU. The others are, in
    this order: ignored, if they are on a crowd of their class; poor localization; wrong class;
    duplicate; background; both. An object is missed if it is unmatched and no prediction of type
    poor localization or wrong class has its highest IoU with it.

    Args:
        ious: (D, G) IoU of the predictions, highest score first, and the objects except crowds.
        same_class: (D, G) bool.
        on_crowd: (D,) bool, whether a prediction is on a crowd of its class.

    Returns:
        D error types, `CORRECT` and `IGNORED` included, and (G,) bool, true for missed objects.
    """
    free = np.ones(ious.shape[1], dtype=bool)
    own, other = np.where(same_class, ious, 0.0), np.where(same_class, 0.0, ious)
    types = []
    for overlaps in own:
        candidates = np.where(free, overlaps, 0.0)
        hit = bool(candidates.size) and candidates.max() >= FOREGROUND
        if hit:
            free[candidates.argmax()] = False
        types.append(CORRECT if hit else "")
    touched = ~free
    for number, error_type in enumerate(types):
        if error_type:
            continue
        best_own = own[number].max(initial=0.0)
        best_other = other[number].max(initial=0.0)
        if on_crowd[number]:
            types[number] = IGNORED
        elif BACKGROUND <= best_own < FOREGROUND:
            types[number] = LOCALIZATION
            touched[own[number].argmax()] = True
        elif best_other >= FOREGROUND:
            types[number] = WRONG_CLASS
            touched[other[number].argmax()] = True
        elif best_own >= FOREGROUND:
            types[number] = DUPLICATE
        elif best_other <= BACKGROUND:
            types[number] = ON_BACKGROUND
        else:
            types[number] = BOTH
    return types, ~touched


def count_errors(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    task: str,
    score_threshold: float,
) -> dict[str, int]:
    """Counts correct predictions and the errors of each type.

    Args:
        annotations: as returned by `load_annotations`.
        predictions: as returned by `load_predictions`, with ids and masks checked.
        task: "bbox" for the IoU of boxes, "segm" for that of masks.
        score_threshold: predictions below it are skipped; of the others, the best
            `MAX_DETECTIONS` of an image are used.

    Returns:
        `CORRECT`, then each of `ERRORS` in order -> count.
    """
    ids = IdMap.from_annotations(annotations)
    truth = coco_truth(COCO, annotations, ids, masks=task == "segm")
    found: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in predictions:
        if entry["score"] >= score_threshold:
            found[ids.images[entry["image_id"]]].append(ids.renumber(entry))

    counts: Counter[str] = Counter()
    for image in truth.dataset["images"]:
        best = sorted(found[image["id"]], key=lambda entry: -entry["score"])[:MAX_DETECTIONS]
        crowds = [a for a in truth.imgToAnns[image["id"]] if a.get("iscrowd")]
        single = [a for a in truth.imgToAnns[image["id"]] if not a.get("iscrowd")]
        on_crowd = (_ious(best, crowds, task) > FOREGROUND) & _same_class(best, crowds)
        types, missed = classify_predictions(
            _ious(best, single, task), _same_class(best, single), on_crowd.any(axis=1)
        )
        counts.update(types)
        counts[MISSED] += int(missed.sum())
    return {name: counts[name] for name in (CORRECT, *ERRORS)}


def draw_errors(counts: dict[str, int], title: str) -> Figure:
    """A bar chart of the counts: correct predictions and each error type."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    names = list(counts)
    bars = axes.barh(
        names,
        [counts[name] for name in names],
        color=["white" if name == CORRECT else "0.6" for name in names],
        edgecolor="black",
        hatch=["//" if name == CORRECT else "" for name in names],
        height=0.7,
    )
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"predictions (for {MISSED!r}: objects)")
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ious(
    predictions: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]], task: str
) -> np.ndarray:
    """(D, G) IoU of masks or boxes; for crowds, the fraction of the prediction on the crowd."""
    if not predictions or not objects:
        return np.zeros((len(predictions), len(objects)))
    crowd = [int(bool(annotation.get("iscrowd"))) for annotation in objects]
    if task == "segm":
        masks = ([entry["segmentation"] for entry in group] for group in (predictions, objects))
        return np.asarray(mask_util.iou(*masks, crowd))
    boxes = (np.array([entry["bbox"] for entry in g], float) for g in (predictions, objects))
    return np.asarray(mask_util.iou(*boxes, crowd))


def _same_class(
    predictions: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]]
) -> np.ndarray:
    classes = [np.array([e["category_id"] for e in group], int) for group in (predictions, objects)]
    return classes[0][:, None] == classes[1][None, :]
