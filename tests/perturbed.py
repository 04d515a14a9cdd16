"""Makes predictions from ground truth by adding typical errors of detectors.

They replace a detector's predictions in tests of evaluators: they contain every type of
match and mismatch, and a seed gives the same ones on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util


@dataclass(frozen=True)
class Perturbation:
    """How far predictions are from the ground truth.

    Args:
        miss: fraction of objects without a prediction.
        duplicate: fraction of objects that are predicted twice.
        wrong_class: fraction of predictions with another category.
        jitter: standard deviation of shift and log-scale, in box sizes.
        background: mean number of predictions per image that are on no object.
    """

    miss: float = 0.15
    duplicate: float = 0.3
    wrong_class: float = 0.1
    jitter: float = 0.08
    background: float = 2.0


def perturbed_predictions(
    annotations: dict[str, Any], seed: int, perturbation: Perturbation = Perturbation()
) -> list[dict[str, Any]]:
    """A results list with boxes and masks for the objects of a COCO set.

    Scores decrease with the distance from the ground truth, with noise; a tenth of them are
    rounded, so that there are ties. Each crowd gets two predictions.

    Args:
        annotations: COCO instances with polygons or RLEs.
        seed: seed of all random draws.
        perturbation: sizes and frequencies of the errors.
    """
    draw = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    categories = [category["id"] for category in annotations["categories"]]
    predictions: list[dict[str, Any]] = []

    def predict(
        image_id: int, category: int, box: list[float], polygons: list[list[float]], score: float
    ) -> None:
        size = sizes[image_id]
        rle = mask_util.merge(mask_util.frPyObjects(polygons, *size))
        mask = {"size": [*size], "counts": rle["counts"].decode()}
        entry = {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        predictions.append({**entry, "segmentation": mask})

    for annotation in annotations["annotations"]:
        copies = 2 if annotation.get("iscrowd") else 1 + (draw.random() < perturbation.duplicate)
        if draw.random() < perturbation.miss:
            copies = 0
        for copy in range(copies):
            shift = draw.normal(0, perturbation.jitter, 4) * (1 + copy)
            category = annotation["category_id"]
            if draw.random() < perturbation.wrong_class:
                category = int(draw.choice(categories))
            error = min(1.0, float(np.abs(shift).sum()))
            score = float(np.clip(draw.normal(0.9 - 0.6 * error, 0.15), 0.01, 1.0))
            image_id = annotation["image_id"]
            predict(image_id, category, *_moved(annotation, shift, sizes[image_id]), score)
    for image_id, size in sizes.items():
        for _ in range(draw.poisson(perturbation.background)):
            x, y = draw.random(2) * (size[1] - 4, size[0] - 4)
            width, height = 3 + draw.random(2) * (size[1] - x - 3, size[0] - y - 3) * 0.5
            box = [float(value) for value in (x, y, width, height)]
            category, score = int(draw.choice(categories)), float(0.01 + 0.7 * draw.random() ** 3)
            predict(image_id, category, box, [_rectangle(box)], score)
    for number in np.flatnonzero(draw.random(len(predictions)) < 0.1):
        predictions[number]["score"] = max(0.1, round(predictions[number]["score"], 1))
    return predictions


def _moved(
    annotation: dict[str, Any], shift: np.ndarray, size: tuple[int, int]
) -> tuple[list[float], list[list[float]]]:
    """Box and polygons, shifted and scaled about the corner of the box, clipped to the image.

    An RLE, as crowds have, is replaced by its box.
    """
    x, y, width, height = annotation["bbox"]
    width, height = max(width, 1.0), max(height, 1.0)
    origin, offset = np.array([x, y]), shift[:2] * (width, height)
    scale = np.exp(shift[2:])
    box = [float(v) for v in (*(origin + offset), width * scale[0], height * scale[1])]
    segmentation = annotation.get("segmentation")
    polygons = segmentation if isinstance(segmentation, list) else []
    moved = [
        ((np.reshape(polygon, (-1, 2)) - origin) * scale + origin + offset).clip(0, size[::-1])
        for polygon in polygons or [_rectangle([x, y, width, height])]
    ]
    return box, [polygon.ravel().tolist() for polygon in moved]


def _rectangle(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]
