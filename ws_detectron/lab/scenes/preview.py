"""Contact sheets of annotated data sets."""

from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from pycocotools import mask as mask_util

from ws_detectron.data.images import read_rgb
from ws_detectron.evaluation.drawing import draw_objects


def contact_sheet(
    name: str, records: list[dict[str, Any]], columns: int = 4, cell: int = 384
) -> np.ndarray:
    """Draws images with their annotated masks, boxes and classes, side by side.

    Args:
        name: of the registered data set of the records.
        records: in detectron2's standard format.
        columns: images per row.
        cell: width and height of a picture, pixels; images are scaled to fit.

    Returns:
        (rows * cell, columns * cell, 3) uint8, RGB; empty cells are white.
    """
    rows = -(-len(records) // columns)
    sheet = np.full((rows * cell, columns * cell, 3), 255, dtype=np.uint8)
    for number, record in enumerate(records):
        picture = draw_annotations(name, record, cell)
        top, left = number // columns * cell, number % columns * cell
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def draw_annotations(name: str, record: dict[str, Any], longer_side: int) -> np.ndarray:
    """Draws an image with its annotated masks, boxes and classes; one colour per class.

    Image and masks are enlarged without smoothing, so that every pixel of a mask can be checked.
    detectron2's `draw_dataset_dict` would fill the holes of masks.

    Args:
        name: of the registered data set of the record; its masks must be RLE.
        record: in detectron2's standard format.
        longer_side: of the picture, pixels.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    metadata = MetadataCatalog.get(name)
    annotations = record["annotations"]
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in annotations
    ]
    return draw_objects(
        read_rgb(record["file_name"]),
        longer_side,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        masks=[mask_util.decode(annotation["segmentation"]) for annotation in annotations],
        labels=[metadata.thing_classes[annotation["category_id"]] for annotation in annotations],
        colours=[colormap(rgb=True, maximum=1)[a["category_id"]] for a in annotations],
    )
