"""COCO annotations and predictions of a few rectangles, to compute metrics by hand."""

from collections.abc import Sequence
from typing import Any

from pycocotools import mask as mask_util

HEIGHT, WIDTH = 100, 120


def rectangle(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def rle(box: Sequence[float], height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    found = mask_util.merge(mask_util.frPyObjects([rectangle(box)], height, width))
    return {"size": [height, width], "counts": found["counts"].decode()}


def annotations(
    objects: Sequence[tuple[int, int, Sequence[float]]],
    crowds: Sequence[tuple[int, int, Sequence[float]]] = (),
    images: int = 2,
    categories: int = 3,
) -> dict[str, Any]:
    """COCO annotations; objects and crowds are image id, category id, [x, y, width, height]."""
    entries = []
    for crowd, group in enumerate((objects, crowds)):
        for image_id, category_id, box in group:
            mask: Any = rle(box) if crowd else [rectangle(box)]
            entries.append(
                {
                    "id": len(entries) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                    "segmentation": mask,
                }
            )
    return {
        "images": [
            {"id": n, "height": HEIGHT, "width": WIDTH, "file_name": f"{n}.png"}
            for n in range(1, images + 1)
        ],
        "annotations": entries,
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, categories + 1)],
    }


def prediction(
    image_id: int, category_id: int, box: Sequence[float], score: float
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(value) for value in box],
        "score": score,
        "segmentation": rle(box),
    }
