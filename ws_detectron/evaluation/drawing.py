"""Draws objects on images, and contact sheets of ground truth beside predictions.

detectron2's Visualizer draws masks and text. Its boxes are thin and half transparent, its labels
lie over each other and shrink with the object, so boxes and the places of labels are from here.
"""

import colorsys
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import cv2
import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util

from ws_detectron.data.validate import as_rle
from ws_detectron.errors import shown

from .figure_style import as_label

SIDE = 448  # pixels, the longer side of a picture on a sheet
CAPTION_HEIGHT = 48  # pixels above each picture, for two lines
HEAD_HEIGHT = 72  # pixels above a sheet, for its title and the key
FONT_SIZE = 16  # pixels, of captions
MARGIN = 6  # pixels, left of and below each picture
PAIR_MARGIN = 24  # pixels, right of each pair of ground truth and predictions


class Mark(NamedTuple):
    """What a box means, by its colour and line style; "" is the colour of the class."""

    meaning: str
    colour: Any
    line_style: Any


TRUE = Mark("correct, found", "#35F074", "-")
FALSE = Mark("false", "#FF5B4D", (0, (5, 2)))
MISSED_OBJECT = Mark("not found", "#FFD028", (0, (1.5, 1.5)))
NOT_EVALUATED = Mark("crowd or on a crowd", "#C8C8C8", (0, (5, 1.5, 1, 1.5)))
MARKS = (TRUE, FALSE, MISSED_OBJECT, NOT_EVALUATED)

Cell = tuple[np.ndarray, str]  # a picture, (h, w, 3) uint8, RGB, and its caption
Pair = tuple[Cell, Cell]


def draw_entries(
    image: np.ndarray,
    longer_side: int,
    entries: Sequence[dict[str, Any]],
    classes: Mapping[Any, str],
    marks: Optional[Sequence[Mark]] = None,
) -> np.ndarray:
    """Draws annotations, or predictions with their scores, on an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        longer_side: of the picture, pixels.
        entries: of this image in a COCO annotation or results file.
        classes: category id -> name; the order decides the colours.
        marks: of the box of each entry; default: solid, in the colour of its class.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    numbers = {category: number for number, category in enumerate(classes)}
    masks = [entry.get("segmentation") for entry in entries]
    rles = [as_rle(mask, image.shape[:2]) if mask else None for mask in masks]
    boxes = [e.get("bbox") or mask_util.toBbox(rle).tolist() for e, rle in zip(entries, rles)]
    colours = [
        NOT_EVALUATED.colour
        if entry.get("iscrowd")
        else class_colour(numbers.get(entry["category_id"], entry["category_id"]))
        for entry in entries
    ]
    marks = [Mark("", colour, "-") for colour in colours] if marks is None else marks
    scale = longer_side / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    artist = Visualizer(cv2.resize(image, (width, height), interpolation=smooth))
    points = 72 / artist.output.dpi
    font_size = points * max(12, longer_side / 60)
    line_width = points * max(2.0, longer_side / 320)
    places = scale * np.array(boxes, dtype=np.float64).reshape(-1, 4)
    places[:, 2:] += places[:, :2]
    largest_first = np.argsort(-(places[:, 2:] - places[:, :2]).prod(axis=1), kind="stable")
    for number in largest_first:
        if rles[number] is not None:
            mask = mask_util.decode(rles[number])
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
            artist.draw_binary_mask(mask, colours[number], alpha=0.35)
    for number in largest_first:
        _draw_box(artist.output, places[number], marks[number], line_width)
        artist.draw_text(
            as_label(label_of(entries[number], classes)), (0, 0), font_size=font_size,
            color=0.6 + 0.4 * np.array(to_rgb(marks[number].colour)),
            horizontal_alignment="left",
        )  # fmt: skip
    place_labels(artist.output, places[largest_first])
    return artist.output.get_image()[:height, :width]


def label_of(entry: Mapping[str, Any], classes: Mapping[Any, str]) -> str:
    """Class of an annotation or prediction, and its score: "cat 98 %"."""
    score = f" {100 * entry['score']:.0f} %" if "score" in entry else ""
    name = classes.get(entry["category_id"], f"class {entry['category_id']}")
    return name + score + (" (crowd)" if entry.get("iscrowd") else "")


def class_colour(category: int) -> tuple[float, float, float]:
    """The colour of a class, the same in every picture; RGB from 0 to 1.

    Colours are bright, to stand out on photographs. Hues are a golden ratio apart, which separates
    the first few classes well for any number of classes.
    """
    hue = (0.33 + category * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, (0.95, 0.6)[category % 2], 1.0)


def _draw_box(picture: VisImage, box: np.ndarray, mark: Mark, line_width: float) -> None:
    (x0, y0), (width, height) = box[:2], box[2:] - box[:2]
    for colour, style, wider in (("black", "-", 1.8), (mark.colour, mark.line_style, 1.0)):
        edge: dict[str, Any] = {"edgecolor": colour, "linestyle": style}
        edge["linewidth"] = wider * line_width
        picture.ax.add_patch(Rectangle((x0, y0), width, height, fill=False, **edge))


def place_labels(picture: VisImage, boxes: np.ndarray) -> None:
    """Moves each label to a corner of its box, into the picture, and not over another label.

    Of these places it takes the one that covers the smallest shares of boxes. Small objects come
    first, as their corners are close together. A label for which there is no room at its object is
    not drawn.

    Args:
        picture: its texts are the labels, aligned left and top.
        boxes: (N, 4) x0, y0, x1, y1 in pixels of the picture, in the order of the texts.
    """
    renderer = picture.canvas.get_renderer()
    areas = np.maximum(1, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    placed: list[Bbox] = []
    for text, (x0, y0, x1, y1) in [*zip(picture.ax.texts, boxes)][::-1]:
        extent = text.get_window_extent(renderer).padded(2)
        width, height = extent.width, extent.height
        rows = y0 - height, y1, y0, y1 - height
        corners = [(x, y) for y in rows for x in (x0, x1 - width)]
        corners += [(x0, y0 + step * height) for step in (1, 2, 3)]
        free = []
        for left, top in corners:
            left = max(0.0, min(left, picture.width - width))
            top = max(0.0, min(top, picture.height - height))
            moved = Bbox.from_bounds(left, top, width, height)
            if not moved.count_overlaps(placed):
                sides = np.minimum(moved.max, boxes[:, 2:]) - np.maximum(moved.min, boxes[:, :2])
                covered = float((sides.clip(0).prod(axis=1) / areas).sum())
                free.append((covered, moved))
        text.set_visible(bool(free))
        if free:
            _, best = min(free, key=lambda found: found[0])
            text.set_position((best.x0 + 2, best.y0 + 2))
            placed.append(best)


def contact_sheet(pairs: Sequence[Pair], title: str) -> np.ndarray:
    """Captioned pairs of pictures, two in a row or below each other, with a title and the key.

    Args:
        pairs: pictures at most `SIDE` wide; captions of one or two lines, which end in an ellipsis
            where they are too long. More than two are in two columns.
        title: a line.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    columns, width = 2 if len(pairs) > 2 else 1, 2 * (SIDE + MARGIN) + PAIR_MARGIN
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(len(picture) for pair in row for picture, _ in pair) for row in rows]
    tops = HEAD_HEIGHT + np.cumsum([0, *(CAPTION_HEIGHT + height + MARGIN for height in heights)])
    sheet, font = Image.new("RGB", (columns * width, int(tops[-1])), "white"), _font(FONT_SIZE)
    sheet.paste(Image.fromarray(_head(title, sheet.width)))
    for number, pair in enumerate(pairs):
        for side, (picture, text) in enumerate(pair):
            left = number % columns * width + side * (SIDE + MARGIN) + MARGIN
            top = int(tops[number // columns])
            for line, part in enumerate(text.split("\n")[:2]):
                place = left, top + CAPTION_HEIGHT * (0.28 + 0.44 * line)
                short = _shortened(part, SIDE, font)
                ImageDraw.Draw(sheet).text(place, short, "black", font, anchor="lm")
            sheet.paste(Image.fromarray(picture), (left, top + CAPTION_HEIGHT))
    return np.array(sheet)


def _head(title: str, width: int) -> np.ndarray:
    """A title, and what the boxes mean; (`HEAD_HEIGHT`, width, 3) uint8."""
    head = VisImage(np.full((HEAD_HEIGHT, width, 3), 255, np.uint8))
    points, renderer = 72 / head.dpi, head.canvas.get_renderer()
    upper, lower = HEAD_HEIGHT * 0.28, HEAD_HEIGHT * 0.72
    style = {"size": points * FONT_SIZE, "va": "center", "family": "sans-serif"}
    title = _shortened(title, width - 2 * MARGIN, _font(FONT_SIZE, "bold"))
    head.ax.text(MARGIN, upper, as_label(title), weight="bold", **style)
    left = float(MARGIN)
    for mark in MARKS:
        size = FONT_SIZE
        box = np.array([left, lower - size / 2, left + 2.5 * size, lower + size / 2])
        _draw_box(head, box, mark, points * 2)
        text = head.ax.text(left + 3 * size, lower, mark.meaning, **style)
        left = text.get_window_extent(renderer).x1 + 2 * size
    return head.get_image()[:HEAD_HEIGHT, :width]


def _shortened(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """A line of text that is at most `width` pixels long."""
    line = shown(line).replace("\n", " ")  # Pillow can measure single lines only
    while font.getlength(line) > width:
        line = line.rstrip("…")[:-1] + "…"
    return line


@lru_cache
def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    properties = FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(findfont(properties), size)
