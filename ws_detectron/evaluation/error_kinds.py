"""What is wrong with predictions, sorted into kinds.

The kinds are those of D. Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020, arXiv:2008.08115, section 2.2, decided in the order of the authors' code
(github.com/dbolya/tide). TIDE weighs kinds by the AP that mending them would win; here they are
counted, among predictions above a score.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from .coco_eval import Numbers, coco_truth

FOREGROUND = 0.5  # IoU from which on a prediction has found an object; t_f in the paper
BACKGROUND = 0.1  # IoU up to which it has nothing to do with one; t_b
MAX_DETECTIONS = 100

CORRECT, IGNORED = "correct", "ignored"
MISSED, DUPLICATE, WRONG_CLASS = "missed", "duplicate", "wrong class"
LOCALIZATION, BOTH, ON_BACKGROUND = (
    "poor localization",
    "wrong class and localization",
    "background",
)
ERRORS = {
    MISSED: "objects that nothing found, not even in poor localization or as another class",
    DUPLICATE: f"IoU of at least {FOREGROUND} with an object that a higher score has found",
    WRONG_CLASS: f"IoU of at least {FOREGROUND} with an object of another class",
    LOCALIZATION: f"IoU of {BACKGROUND} to {FOREGROUND} with an object of the class",
    BOTH: f"IoU of {BACKGROUND} to {FOREGROUND} with an object of another class",
    ON_BACKGROUND: f"IoU of at most {BACKGROUND} with any object",
}


def sort_out(
    ious: np.ndarray, same_class: np.ndarray, on_crowd: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """The kind of each prediction for an image, and which objects were missed.

    A prediction is correct where it is on an object of its class that no higher score has found; of
    those it takes the one with the highest IoU. The others are, in this order: ignored, where they
    are on a crowd of their class; poor localization; wrong class; duplicate; background; both. An
    object is missed where nothing found it and no prediction of poor localization or wrong class
    has its highest IoU with it.

    Args:
        ious: (D, G) of predictions, highest score first, and objects that are no crowds.
        same_class: (D, G) bool.
        on_crowd: (D,) bool, whether a prediction lies on a crowd of its class.

    Returns:
        D kinds, and (G,) bool.
    """
    free = np.ones(ious.shape[1], dtype=bool)
    own, other = np.where(same_class, ious, 0.0), np.where(same_class, 0.0, ious)
    kinds = []
    for overlaps in own:
        candidates = np.where(free, overlaps, 0.0)
        hit = bool(candidates.size) and candidates.max() >= FOREGROUND
        if hit:
            free[candidates.argmax()] = False
        kinds.append(CORRECT if hit else "")
    touched = ~free
    for number, kind in enumerate(kinds):
        if kind:
            continue
        best_own = own[number].max(initial=0.0)
        best_other = other[number].max(initial=0.0)
        if on_crowd[number]:
            kinds[number] = IGNORED
        elif BACKGROUND <= best_own < FOREGROUND:
            kinds[number] = LOCALIZATION
            touched[own[number].argmax()] = True
        elif best_other >= FOREGROUND:
            kinds[number] = WRONG_CLASS
            touched[other[number].argmax()] = True
        elif best_own >= FOREGROUND:
            kinds[number] = DUPLICATE
        elif best_other <= BACKGROUND:
            kinds[number] = ON_BACKGROUND
        else:
            kinds[number] = BOTH
    return kinds, ~touched


def count_errors(
    annotations: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    task: str,
    score_threshold: float,
) -> dict[str, int]:
    """How many predictions are correct, and how many errors of each kind there are.

    Args:
        annotations: of `load_annotations`.
        predictions: of `load_predictions`, checked.
        task: whether IoU is that of boxes ("bbox") or of masks ("segm").
        score_threshold: predictions below it are left out, of the others the best
            `MAX_DETECTIONS` of an image are taken.

    Returns:
        `CORRECT`, then those of `ERRORS` in their order -> count.
    """
    numbers = Numbers.of(annotations)
    truth = coco_truth(COCO, annotations, numbers, masks=task == "segm")
    found: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in predictions:
        if entry["score"] >= score_threshold:
            found[numbers.images[entry["image_id"]]].append(numbers.apply(entry))

    counts: Counter[str] = Counter()
    for image in truth.dataset["images"]:
        best = sorted(found[image["id"]], key=lambda entry: -entry["score"])[:MAX_DETECTIONS]
        crowds = [a for a in truth.imgToAnns[image["id"]] if a.get("iscrowd")]
        single = [a for a in truth.imgToAnns[image["id"]] if not a.get("iscrowd")]
        on_crowd = (_ious(best, crowds, task) > FOREGROUND) & _same_class(best, crowds)
        kinds, missed = sort_out(
            _ious(best, single, task), _same_class(best, single), on_crowd.any(axis=1)
        )
        counts.update(kinds)
        counts[MISSED] += int(missed.sum())
    return {kind: counts[kind] for kind in (CORRECT, *ERRORS)}


def draw_errors(counts: dict[str, int], title: str) -> Figure:
    """A bar for each kind of error, and one for what is correct, with their counts."""
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
    """(D, G) of masks or boxes; of crowds, the share of the prediction that is on them."""
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
