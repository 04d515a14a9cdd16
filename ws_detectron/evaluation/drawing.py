"""Draws objects on images, and contact sheets of ground truth beside predictions."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, Union

import cv2
import matplotlib.font_manager
import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import VisImage, Visualizer
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util

from ws_detectron.data.validate import as_rle
from ws_detectron.errors import UserError, shown
from ws_detectron.utils.io import atomic_write

from .figure_style import as_label

CROWD_COLOUR = (0.6, 0.6, 0.6)
SIDE = 448  # pixels, the longer side of a picture on a sheet
CAPTION_HEIGHT = 30  # pixels above each picture
MARGIN = 6  # pixels, left of and below each picture
PAIR_MARGIN = 24  # pixels, right of each pair of ground truth and predictions

Cell = tuple[np.ndarray, str]  # a picture, (h, w, 3) uint8, RGB, and its caption
Pair = tuple[Cell, Cell]


def draw_entries(
    image: np.ndarray,
    longer_side: int,
    entries: Sequence[dict[str, Any]],
    classes: Mapping[Any, str],
) -> np.ndarray:
    """Draws annotations, or predictions with their scores in %, on an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        longer_side: of the picture, pixels.
        entries: of this image in a COCO annotation or results file.
        classes: category id -> name; the order decides the colours.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    numbers = {category: number for number, category in enumerate(classes)}
    boxes, masks, labels, colours = [], [], [], []
    for entry in entries:
        category, mask, crowd = (
            entry["category_id"],
            entry.get("segmentation"),
            entry.get("iscrowd"),
        )
        rle = as_rle(mask, image.shape[:2]) if mask else None
        box = entry.get("bbox") or mask_util.toBbox(rle).tolist()
        boxes.append(BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        masks.append(mask_util.decode(rle) if mask else None)
        score = f" {100 * entry['score']:.0f}" if "score" in entry else ""
        name = classes.get(category, f"class {category}")
        labels.append(name + score + (" (crowd)" if crowd else ""))
        colours.append(CROWD_COLOUR if crowd else class_colour(numbers.get(category, category)))
    return draw_objects(
        image, longer_side, boxes=boxes, masks=masks, labels=labels, colours=colours
    )


def class_colour(category: int) -> tuple[float, float, float]:
    """The colour of a class, the same in every picture; RGB from 0 to 1.

    Colours are bright, to stand out on photographs. Hues are a golden ratio apart, which separates
    the first few classes well for any number of classes.
    """
    hue = (0.33 + category * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, (0.95, 0.6)[category % 2], 1.0)


def draw_objects(
    image: np.ndarray,
    longer_side: int,
    *,
    boxes: Any,
    masks: Sequence[Optional[np.ndarray]],
    labels: Sequence[str],
    colours: Sequence[Any],
) -> np.ndarray:
    """Scales an image and draws boxes, masks and labels on it, largest objects first.

    detectron2's `draw_instance_predictions` and `VideoVisualizer` would choose random colours,
    other ones for ground truth and predictions of a class, and draw labels over each other.

    Args:
        image: (H, W, 3) uint8, RGB.
        longer_side: of the picture, pixels.
        boxes: (N, 4) floats, x0, y0, x1, y1 in pixels of `image`.
        masks: N masks of (H, W), non-zero inside, or None.
        labels: N texts.
        colours: N matplotlib colours.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    scale = longer_side / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    artist = Visualizer(cv2.resize(image, (width, height), interpolation=smooth))
    boxes = scale * np.array(boxes, dtype=np.float64).reshape(-1, 4)
    for number in np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1)):
        mask = masks[number]
        if mask is not None:
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
            artist.draw_binary_mask(mask, colours[number], alpha=0.35)
    texts = [as_label(label) for label in labels]
    artist.overlay_instances(boxes=boxes, labels=texts, assigned_colors=colours, alpha=1.0)
    separate_labels(artist.output)
    return artist.output.get_image()[:height, :width]


def separate_labels(picture: VisImage) -> None:
    """Moves labels up or down until none overlaps another, and into the picture.

    Labels come in the order in which they were drawn. One that would have to move by more than
    five times its height is not drawn, as it would stand at another object.
    """
    renderer = picture.canvas.get_renderer()
    placed: list[Any] = []
    for text in picture.ax.texts:
        box = text.get_window_extent(renderer).padded(2)  # y points up here
        dx = min(max(-box.x0, 0), picture.width - box.x1)
        dy = max(min(picture.height - box.y1, 0), -box.y0)
        for step in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5):
            shift = dy + step * box.height
            moved = box.translated(dx, shift)
            inside = -1 < moved.y0 and moved.y1 < picture.height + 1
            if inside and not moved.count_overlaps(placed):
                x, y = text.get_position()
                text.set_position((x + dx, y - shift))
                placed.append(moved)
                break
        else:
            text.set_visible(False)


def write_png(path: Union[str, Path], picture: np.ndarray) -> None:
    """Writes an RGB picture as a PNG file, atomically.

    Args:
        path: ends in `.png`.
        picture: (H, W, 3) uint8.

    Raises:
        UserError: the path has another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: pictures are PNG files and must end in .png")
    packed = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
    with atomic_write(path, "wb") as file:
        file.write(packed)


def contact_sheet(pairs: Sequence[Pair]) -> np.ndarray:
    """Captioned pairs of pictures, two pairs in a row; (H, W, 3) uint8, RGB.

    Args:
        pairs: pictures at most `SIDE` wide, captions as for `captioned`.
    """
    margins = 0, PAIR_MARGIN
    cells = [captioned(*cell, margin) for pair in pairs for cell, margin in zip(pair, margins)]
    return tile(cells, columns=4)


def captioned(picture: np.ndarray, text: str, right: int) -> np.ndarray:
    """A picture on white, `SIDE` wide without its margins, below a line of text.

    Args:
        picture: (h, w, 3) uint8, RGB.
        text: ends in an ellipsis if it is too long.
        right: margin on the right, pixels.
    """
    size = MARGIN + SIDE + right, CAPTION_HEIGHT + picture.shape[0] + MARGIN
    cell, font = Image.new("RGB", size, "white"), _font(round(CAPTION_HEIGHT * 0.55))
    text = " ".join(shown(text).split("\n"))  # Pillow can measure single lines only
    while font.getlength(text) > SIDE:
        text = text.rstrip("…")[:-1] + "…"
    ImageDraw.Draw(cell).text((MARGIN, CAPTION_HEIGHT / 2), text, "black", font, anchor="lm")
    cell.paste(Image.fromarray(picture), (MARGIN, CAPTION_HEIGHT))
    return np.array(cell)


def tile(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures in rows, on white; a row is as high as its highest picture, the first the widest."""

    def padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
        margins = (0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)
        return np.pad(picture, margins, constant_values=255)

    rows = []
    for start in range(0, len(pictures), columns):
        row = pictures[start : start + columns]
        height = max(picture.shape[0] for picture in row)
        rows.append(np.concatenate([padded(p, height, p.shape[1]) for p in row], axis=1))
    return np.concatenate([padded(row, row.shape[0], rows[0].shape[1]) for row in rows])


@lru_cache(maxsize=1)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)
