"""Predictions made from ground truth by adding typical errors of detectors.

They contain every type of match and mismatch, and a seed gives the same ones on every machine.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from small_coco import rectangle


def perturbed_predictions(
    annotations: dict[str, Any],
    seed: int,
    *,
    miss: float = 0.15,
    duplicate: float = 0.3,
    wrong_class: float = 0.1,
    jitter: float = 0.08,
    background: float = 2.0,
) -> list[dict[str, Any]]:
    """A results list with boxes and masks for the objects of a COCO set.

    Scores decrease with the distance from the ground truth, with noise; a tenth of them are
    rounded, so that there are ties. Each crowd gets two predictions.

    Args:
        annotations: COCO instances with polygons or RLEs.
        seed: seed of all random draws.
        miss: fraction of objects without a prediction.
        duplicate: fraction of objects that are predicted twice.
        wrong_class: fraction of predictions with another category.
        jitter: standard deviation of shift and log-scale, in box sizes.
        background: mean number of predictions per image that are on no object.
    """
    draw = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    categories = [category["id"] for category in annotations["categories"]]
    predictions: list[dict[str, Any]] = []

    def predict(
        image_id: int, category: int, box: Sequence[float], polygons: list, score: float
    ) -> None:
        rle = mask_util.merge(mask_util.frPyObjects(polygons, *sizes[image_id]))
        mask = {"size": [*sizes[image_id]], "counts": rle["counts"].decode()}
        box = [float(value) for value in box]
        entry = {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        predictions.append({**entry, "segmentation": mask})

    for annotation in annotations["annotations"]:
        copies = 2 if annotation.get("iscrowd") else 1 + (draw.random() < duplicate)
        for copy in range(0 if draw.random() < miss else copies):
            shift = draw.normal(0, jitter, 4) * (1 + copy)
            category = annotation["category_id"]
            if draw.random() < wrong_class:
                category = int(draw.choice(categories))
            error = min(1.0, float(np.abs(shift).sum()))
            score = float(np.clip(draw.normal(0.9 - 0.6 * error, 0.15), 0.01, 1.0))
            box, polygons = moved(annotation, shift, sizes[annotation["image_id"]])
            predict(annotation["image_id"], category, box, polygons, score)
    for image_id, size in sizes.items():
        for _ in range(draw.poisson(background)):
            x, y = draw.random(2) * (size[1] - 4, size[0] - 4)
            width, height = 3 + draw.random(2) * (size[1] - x - 3, size[0] - y - 3) * 0.5
            box = (x, y, width, height)
            score = float(0.01 + 0.7 * draw.random() ** 3)
            predict(image_id, int(draw.choice(categories)), box, [rectangle(box)], score)
    for number in np.flatnonzero(draw.random(len(predictions)) < 0.1):
        predictions[number]["score"] = max(0.1, round(predictions[number]["score"], 1))
    return predictions


def moved(
    annotation: dict[str, Any], shift: np.ndarray, size: tuple[int, int]
) -> tuple[list, list]:
    """Box and polygons, shifted and scaled about the corner of the box, clipped to the image.

    An RLE, as crowds have, is replaced by its box.
    """
    x, y, width, height = annotation["bbox"]
    width, height = max(width, 1.0), max(height, 1.0)
    origin, offset, scale = np.array([x, y]), shift[:2] * (width, height), np.exp(shift[2:])
    mask = annotation.get("segmentation")
    polygons = mask if mask and isinstance(mask, list) else [rectangle((x, y, width, height))]
    placed = [
        ((np.reshape(polygon, (-1, 2)) - origin) * scale + origin + offset).clip(0, size[::-1])
        for polygon in polygons
    ]
    box = [*(origin + offset), width * scale[0], height * scale[1]]
    return box, [polygon.ravel().tolist() for polygon in placed]
