"""COCO images for the comparison."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from ws_detectron.errors import UserError


def load_images(count: int, short_side: int) -> list[torch.Tensor]:
    """The first images of COCO val2017, resized.

    Args:
        count: how many.
        short_side: in pixels; the longer side may be up to 1333 / 800 of it.

    Returns:
        RGB images (3, H, W), 0 to 255, uint8.
    """
    resize = ResizeShortestEdge(short_side, int(short_side * 1333 / 800))
    images = [resize.get_transform(image).apply_image(image) for image in _read(count)]
    return [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]


def resizing_difference(count: int) -> dict[str, float]:
    """Compares the resized test images of mmdetection and detectron2.

    mmdetection resizes with OpenCV's bilinear interpolation, detectron2 with Pillow's, which
    averages when it shrinks an image.

    Returns:
        Mean and largest absolute difference in grey levels at 800 / 1333 pixels, and the number
        of images whose sizes differ.
    """
    import mmcv

    means, largest, other_size = [], 0.0, 0
    for image in _read(count):
        ours = ResizeShortestEdge(800, 1333).get_transform(image).apply_image(image)
        theirs = mmcv.imrescale(image, (1333, 800), interpolation="bilinear")
        other_size += ours.shape != theirs.shape
        if ours.shape != theirs.shape:
            theirs = cv2.resize(image, ours.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        difference = np.abs(ours.astype(float) - theirs.astype(float))
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    return {
        "images": float(len(means)),
        "mean_grey_levels": float(np.mean(means)),
        "largest_grey_levels": largest,
        "images_of_other_size": float(other_size),
    }


def _read(count: int) -> list[np.ndarray]:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
    annotations = root / "annotations" / "instances_val2017.json"
    if not annotations.is_file():
        raise UserError(
            f"there is no {annotations}; set DETECTRON2_DATASETS to the folder that holds coco/"
        )
    names = sorted(image["file_name"] for image in json.loads(annotations.read_text())["images"])
    return [
        np.asarray(Image.open(root / "val2017" / name).convert("RGB")) for name in names[:count]
    ]
