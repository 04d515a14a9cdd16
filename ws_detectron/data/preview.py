"""Contact sheets of annotated data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_util

from ws_detectron.errors import UserError, shown
from ws_detectron.io import atomic_write

from .images import read_rgb


def contact_sheet(
    name: str, records: list[dict[str, Any]], columns: int = 4, cell: int = 384
) -> np.ndarray:
    """Draws images with their annotated masks, boxes and classes, side by side.

    Args:
        name: the registered data set that the records are from.
        records: in detectron2's standard format.
        columns: images per row.
        cell: width and height of a picture, pixels; images are scaled to fit.

    Returns:
        (rows * cell, columns * cell, 3) uint8, RGB; white where there is no picture.
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
    detectron2's `draw_dataset_dict` is not used: it fills the holes of masks.

    Args:
        name: the registered data set that the record is from; its masks must be RLE.
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


def draw_objects(
    image: np.ndarray,
    longer_side: int,
    *,
    boxes: np.ndarray,
    masks: Sequence[Optional[np.ndarray]],
    labels: Sequence[str],
    colours: Sequence[Any],
) -> np.ndarray:
    """Draws boxes, masks and labels on an image that is scaled first, so that they stay readable.

    Args:
        image: (H, W, 3) uint8, RGB.
        longer_side: of the picture, pixels.
        boxes: (N, 4) float, x0, y0, x1, y1 in pixels of `image`.
        masks: N masks of (H, W), non-zero inside; None where an object has none.
        labels: N texts.
        colours: N colours that matplotlib knows.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    scale = longer_side / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    artist = Visualizer(cv2.resize(image, (width, height), interpolation=smooth))
    for mask, colour in zip(masks, colours):
        if mask is not None:
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
            artist.draw_binary_mask(mask, colour, alpha=0.35, area_threshold=0)
    texts = [as_label(label) for label in labels]
    artist.overlay_instances(boxes=boxes * scale, labels=texts, assigned_colors=colours, alpha=1.0)
    return artist.output.get_image()[:height, :width]


def as_label(text: str) -> str:
    """The text for matplotlib, which would take what is between dollar signs for a formula."""
    return shown(text).replace("$", r"\$")


def write_png(path: Union[str, Path], picture: np.ndarray) -> None:
    """Writes an RGB picture as a PNG file, atomically.

    Args:
        path: ends in `.png`.
        picture: (H, W, 3) uint8.

    Raises:
        UserError: the ending is another one, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG files, so {path} must end in .png")
    packed = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
    with atomic_write(path, "wb") as file:
        file.write(packed)
