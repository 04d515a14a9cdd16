"""AP and types of detection errors of single images.

The types are those of D. Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020, arXiv:2008.08115, section 2.2, assigned in the order of the authors' code
(github.com/dbolya/tide). TIDE weights a type by the AP gained by fixing it; this module counts the
errors among predictions above a score threshold.
"""

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .coco_eval import NumberedSet
from .figure_style import add_title

FOREGROUND = 0.5  # minimum IoU of a match; t_f in the paper
BACKGROUND = 0.1  # maximum IoU of a prediction on background; t_b
MAX_DETECTIONS = 100

CORRECT, IGNORED = "correct", "ignored"
FOUND, NOT_FOUND = "found", "not found"  # of objects; the others are `MISSED` or `IGNORED`
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


class ImageMatches(NamedTuple):
    """How predictions above a score threshold match the objects of an image.

    Attributes:
        predictions: an error type, `CORRECT` or `IGNORED` for each, in the order of the file.
        objects: `FOUND` if a correct prediction matches it, `MISSED`, `NOT_FOUND` (a prediction is
            poorly localized or of a wrong class there), or for crowds `IGNORED`, in the order of
            the file.
    """

    predictions: list[str]
    objects: list[str]


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
        predictions: checked by `check_predictions`.
        task: "bbox" or "segm".

    Returns:
        Image id -> AP in %; without the images that have no object except crowds.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        numbered = NumberedSet(annotations, masks=task == "segm", coco_class=COCO)
        evaluation = COCOeval(numbered.truth, numbered.results(predictions, task), task)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    by_image = defaultdict(list)
    for match in evaluation.evalImgs:
        if match is not None:
            by_image[match["image_id"]].append(match)
    ap = {}
    for number, image_id in enumerate(numbered.image_ids, start=1):
        matches = by_image[number]
        objects = sum(int(np.sum(~np.asarray(m["gtIgnore"], dtype=bool))) for m in matches)
        if objects:
            ap[image_id] = 100 * _average_precision(matches, objects, evaluation.params.recThrs)
    return ap


def _average_precision(matches: list[dict[str, Any]], objects: int, recalls: np.ndarray) -> float:
    """AP over all classes of an image, 0 to 1.

    Args:
        matches: from COCOeval, for each class: `dtScores` (D,), `dtMatches` and `dtIgnore` (T, D).
        objects: number of ground-truth objects.
        recalls: (R,) at which precision is interpolated.
    """
    order = np.argsort(-np.concatenate([m["dtScores"] for m in matches]), kind="mergesort")
    matched, ignored = (
        np.concatenate([match[key] for match in matches], axis=1)[:, order] > 0
        for key in ("dtMatches", "dtIgnore")
    )
    values = []
    for hit, skip in zip(matched, ignored):
        hits = np.cumsum(hit & ~skip)
        precision = hits / np.maximum(np.cumsum(~skip), 1)
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        index = np.searchsorted(hits / objects, recalls, side="left")
        values.append(float(np.append(best_from_here, 0.0)[index].mean()))
    return float(np.mean(values))


def greedy_matches(ious: np.ndarray) -> np.ndarray:
    """The object that each prediction matches; -1 for none.

    It is the free object with the highest IoU, if that is at least `FOREGROUND`.

    Args:
        ious: (D, G) IoU of the predictions, highest score first, and objects.

    Returns:
        (D,) numbers of objects.
    """
    free, matched = np.ones(ious.shape[1], dtype=bool), np.full(len(ious), -1)
    for number, overlaps in enumerate(ious):
        candidates = np.where(free, overlaps, 0.0)
        if candidates.max(initial=0.0) >= FOREGROUND:
            matched[number] = candidates.argmax()
            free[matched[number]] = False
    return matched


def classify_predictions(
    ious: np.ndarray, same_class: np.ndarray, on_crowd: np.ndarray
) -> tuple[list[str], list[str]]:
    """The error type of each prediction for an image, and the state of each object.

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
        D error types, `CORRECT` and `IGNORED` included, and G states: `FOUND`, `NOT_FOUND` or
        `MISSED`.
    """
    own, other = np.where(same_class, ious, 0.0), np.where(same_class, 0.0, ious)
    matched = greedy_matches(own)
    types = [CORRECT if match >= 0 else "" for match in matched]
    free = np.ones(ious.shape[1], dtype=bool)
    free[matched[matched >= 0]] = False
    missed = free.copy()
    for number, error_type in enumerate(types):
        if error_type:
            continue
        best_own = own[number].max(initial=0.0)
        best_other = other[number].max(initial=0.0)
        if on_crowd[number]:
            types[number] = IGNORED
        elif BACKGROUND <= best_own < FOREGROUND:
            types[number] = LOCALIZATION
            missed[own[number].argmax()] = False
        elif best_other >= FOREGROUND:
            types[number] = WRONG_CLASS
            missed[other[number].argmax()] = False
        elif best_own >= FOREGROUND:
            types[number] = DUPLICATE
        elif best_other <= BACKGROUND:
            types[number] = ON_BACKGROUND
        else:
            types[number] = BOTH
    states = [FOUND if not f else MISSED if m else NOT_FOUND for f, m in zip(free, missed)]
    return types, states


def match_images(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    task: str,
    score_threshold: float,
) -> dict[Any, ImageMatches]:
    """Classifies the predictions and objects of each image.

    Args:
        annotations: as returned by `load_annotations`.
        predictions: checked by `check_predictions`.
        task: "bbox" for the IoU of boxes, "segm" for that of masks.
        score_threshold: predictions below it are skipped; of the others, the best
            `MAX_DETECTIONS` of an image are used, and the rest is ignored.

    Returns:
        Image id -> matches.
    """
    numbered = NumberedSet(annotations, masks=task == "segm", coco_class=COCO)
    kept = [entry for entry in predictions if entry["score"] >= score_threshold]
    found, truth = numbered.results(kept, task).imgToAnns, numbered.truth.imgToAnns
    matches = {}
    for number, image_id in enumerate(numbered.image_ids, start=1):
        entries, objects = found[number], truth[number]
        best = sorted(range(len(entries)), key=lambda n: -entries[n]["score"])[:MAX_DETECTIONS]
        ranked = [entries[n] for n in best]
        crowds = [a for a in objects if a.get("iscrowd")]
        single = [n for n, a in enumerate(objects) if not a.get("iscrowd")]
        some = [objects[n] for n in single]
        on_crowd = (pair_ious(ranked, crowds, task) > FOREGROUND) & same_class(ranked, crowds)
        types, states = classify_predictions(
            pair_ious(ranked, some, task), same_class(ranked, some), on_crowd.any(axis=1)
        )
        type_of, state_of = dict(zip(best, types)), dict(zip(single, states))
        matches[image_id] = ImageMatches(
            [type_of.get(n, IGNORED) for n in range(len(entries))],
            [state_of.get(n, IGNORED) for n in range(len(objects))],
        )
    return matches


def count_errors(matches: Iterable[ImageMatches]) -> dict[str, int]:
    """`CORRECT`, then each of `ERRORS` in order -> number of predictions (`MISSED`: of objects)."""
    counts: Counter[str] = Counter()
    for image in matches:
        counts.update(image.predictions)
        counts[MISSED] += image.objects.count(MISSED)
    return {name: counts[name] for name in (CORRECT, *ERRORS)}


def pair_ious(
    predictions: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]], task: str
) -> np.ndarray:
    """(D, G) IoU of masks or boxes; for crowds, the fraction of the prediction on the crowd."""
    key = "segmentation" if task == "segm" else "bbox"
    groups = ([entry[key] for entry in group] for group in (predictions, objects))
    ious = mask_util.iou(*groups, [int(bool(entry.get("iscrowd"))) for entry in objects])
    return np.reshape(ious, (len(predictions), len(objects)))


def same_class(
    predictions: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]]
) -> np.ndarray:
    """(D, G) bool."""
    found, true = ([entry["category_id"] for entry in group] for group in (predictions, objects))
    return np.reshape(found, (-1, 1)) == np.reshape(true, (1, -1))


def draw_errors(counts: dict[str, int], title: str) -> Figure:
    """A bar chart of the counts: correct predictions and each error type."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        list(counts),
        list(counts.values()),
        color=[{CORRECT: "#009E73", MISSED: "#E6A700"}.get(name, "#D55E00") for name in counts],
        edgecolor="black",
        hatch=["//" if name == CORRECT else "" for name in counts],
        height=0.7,
    )
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"predictions (for {MISSED!r}: objects)")
    add_title(figure, title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
