"""Draws ground truth and predictions side by side."""

import colorsys
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, Union

import cv2
import matplotlib.font_manager
import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util

from ws_detectron.data import check_files
from ws_detectron.data.images import read_annotated
from ws_detectron.data.rle import check_masks
from ws_detectron.data.validate import as_rle
from ws_detectron.errors import ConfigError, DataError, UserError, shown
from ws_detectron.utils.io import atomic_write, refuse_overwrite

from .coco_eval import load_predictions

CROWD_COLOUR = (0.6, 0.6, 0.6)
CAPTION_HEIGHT = 30  # pixels above each picture
MARGIN = 6  # pixels, left of and below each picture
PAIR_MARGIN = 24  # pixels, right of each pair of ground truth and predictions


@dataclass
class Objects:
    """Objects to draw on an image; see `draw_objects` for the shapes."""

    boxes: list[Sequence[float]] = field(default_factory=list)
    masks: list[Optional[np.ndarray]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    colours: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, image: np.ndarray, longer_side: int) -> np.ndarray:
        """Draws the objects, largest first, on the scaled image; (h, w, 3) uint8, RGB."""
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        order = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
        return draw_objects(
            image,
            longer_side,
            boxes=boxes[order],
            masks=[self.masks[i] for i in order],
            labels=[self.labels[i] for i in order],
            colours=[self.colours[i] for i in order],
        )


def annotated_objects(record: dict[str, Any], metadata: Metadata) -> Objects:
    """The ground truth of an image.

    Args:
        record: in detectron2's standard format; masks are polygons or RLE.
        metadata: of the data set.
    """
    objects = Objects()
    size = record["height"], record["width"]
    for annotation in record.get("annotations", ()):
        category = annotation["category_id"]
        crowd = annotation.get("iscrowd", 0)
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        objects.boxes.append(box)
        mask = annotation.get("segmentation")
        objects.masks.append(mask_util.decode(as_rle(mask, size)) if mask else None)
        objects.labels.append(class_name(metadata, category) + (" (crowd)" if crowd else ""))
        objects.colours.append(CROWD_COLOUR if crowd else class_colour(category))
    return objects


def predicted_objects(predictions: Sequence[dict[str, Any]], metadata: Metadata) -> Objects:
    """The predictions for an image, labelled with class and score in %.

    Args:
        predictions: entries of a COCO results file.
        metadata: of the data set; maps category ids to class numbers.

    Raises:
        DataError: the data set lacks a category id.
    """
    objects = Objects()
    numbers = metadata.get("thing_dataset_id_to_contiguous_id")  # None: ids are class numbers
    for entry in predictions:
        category = entry["category_id"]
        if numbers is not None:
            if category not in numbers:
                raise DataError(
                    f"predictions name category id {category}, which data set {metadata.name} "
                    f"does not have; allowed: {sorted(numbers)}"
                )
            category = numbers[category]
        rle = entry.get("segmentation")
        x, y, width, height = entry["bbox"] if "bbox" in entry else mask_util.toBbox(rle)
        objects.boxes.append((x, y, x + width, y + height))
        objects.masks.append(None if rle is None else mask_util.decode(rle))
        objects.labels.append(f"{class_name(metadata, category)} {100 * entry['score']:.0f}")
        objects.colours.append(class_colour(category))
    return objects


def class_name(metadata: Metadata, category: int) -> str:
    """The name of a class, or its number if the data set has no names."""
    names = metadata.get("thing_classes") or ()
    return names[category] if category < len(names) else f"class {category}"


def class_colour(category: int) -> tuple[float, float, float]:
    """The colour of a class, the same in every picture; RGB from 0 to 1.

    Colours are bright, to stand out on photographs. Hues are a golden ratio apart, which separates
    the first few classes well for any number of classes.
    """
    hue = (0.33 + category * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, (0.95, 0.6)[category % 2], 1.0)


def captioned(picture: np.ndarray, text: str, width: int, height: int) -> np.ndarray:
    """A picture at the top left of a white cell, below a line of text.

    Args:
        picture: (h, w, 3) uint8, RGB, not larger than the cell.
        text: shortened with an ellipsis if it is too long.
        width: of the cell without margins, pixels.
        height: of the cell without margins and caption, pixels.

    Returns:
        (height + CAPTION_HEIGHT + MARGIN, width + MARGIN, 3) uint8.
    """
    shape = (height + CAPTION_HEIGHT + MARGIN, width + MARGIN, 3)
    text = " ".join(shown(text).split("\n"))  # Pillow can measure single lines only
    canvas = Image.fromarray(np.full(shape, 255, np.uint8))
    font = _font(round(CAPTION_HEIGHT * 0.55))
    while text and font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    ImageDraw.Draw(canvas).text((MARGIN, CAPTION_HEIGHT / 2), text, "black", font, anchor="lm")
    cell = np.array(canvas)
    cell[CAPTION_HEIGHT : CAPTION_HEIGHT + picture.shape[0], MARGIN : MARGIN + picture.shape[1]] = (
        picture
    )
    return cell


def tile(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Cells of equal width in rows; each row is as high as its highest cell."""
    rows = []
    for start in range(0, len(cells), columns):
        row = list(cells[start : start + columns])
        if len(cells) > columns:
            row += [np.full_like(row[0], 255)] * (columns - len(row))
        height = max(cell.shape[0] for cell in row)
        filled = [
            np.pad(c, ((0, height - c.shape[0]), (0, 0), (0, 0)), constant_values=255) for c in row
        ]
        rows.append(np.concatenate(filled, axis=1))
    return np.concatenate(rows, axis=0)


def pair(
    record: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    metadata: Metadata,
    *,
    note: str,
    longer_side: int = 448,
) -> np.ndarray:
    """Ground truth (left) and predictions (right) of an image.

    Args:
        record: in detectron2's standard format.
        predictions: entries of a COCO results file for this image.
        metadata: of the data set.
        note: end of the caption of the predictions.
        longer_side: of each picture, pixels.

    Raises:
        DataError: the image cannot be read or its size differs from the record, or the category of
            a prediction is unknown.
    """
    image = read_annotated(record)
    truth, found = annotated_objects(record, metadata), predicted_objects(predictions, metadata)
    left, right = truth.draw(image, longer_side), found.draw(image, longer_side)
    name = Path(record["file_name"]).name
    size = longer_side, left.shape[0]
    return np.concatenate(
        [
            captioned(left, f"{name}: {len(truth)} annotated", *size),
            captioned(right, f"{len(found)} predicted, {note}", *size),
            np.full((size[1] + CAPTION_HEIGHT + MARGIN, PAIR_MARGIN, 3), 255, np.uint8),
        ],
        axis=1,
    )


def draw_sheet(
    dataset_name: str,
    predictions_json: str,
    output_png: str,
    *,
    score_threshold: float = 0.5,
    num_images: int = 8,
    image_ids: Optional[Sequence[int]] = None,
) -> None:
    """Writes a contact sheet: ground truth beside predictions, two images per row.

    Pictures show masks, boxes, classes and the scores of predictions in %. Small images are
    enlarged.

    Args:
        dataset_name: a registered data set in COCO format.
        predictions_json: a COCO results file for it, as written by `COCOEvaluator`.
        output_png: path of the picture, ending in `.png`.
        score_threshold: predictions below it are not drawn.
        num_images: number of images from the start of the data set, if `image_ids` is None.
        image_ids: the images to draw, in this order.

    Raises:
        ConfigError: the data set is not registered.
        UserError: the predictions or images cannot be read or do not belong to the data set, an
            option is not allowed, or the picture cannot be written or would overwrite an input.
    """
    check_options(score_threshold, num_images)
    predictions = load_predictions(predictions_json)
    records = records_by_id(dataset_name, Path(output_png).parent)
    refuse_overwrite(output_png, inputs_of(dataset_name, records, predictions_json))
    chosen = list(records)[:num_images] if image_ids is None else list(image_ids)
    unknown = [image_id for image_id in chosen if image_id not in records]
    if unknown or not chosen:
        raise UserError(
            f"data set {dataset_name} has no image ids {unknown}" if unknown else "no image to draw"
        )
    by_image = by_image_id(predictions, score_threshold)
    drawn = [entry for image_id in chosen for entry in by_image[image_id]]
    sizes = {i: (records[i]["height"], records[i]["width"]) for i in chosen}
    check_masks(drawn, sizes, predictions_json)
    metadata = MetadataCatalog.get(dataset_name)
    pairs = [
        pair(records[i], by_image[i], metadata, note=f"score ≥ {100 * score_threshold:g} %")
        for i in chosen
    ]
    write_png(output_png, tile(pairs, columns=2))


def check_options(score_threshold: float, num_images: int = 1) -> None:
    """Checks the options of a drawing.

    Raises:
        UserError: an option is outside its range.
    """
    if not 0 <= score_threshold <= 1:  # also false for NaN
        raise UserError(f"the confidence threshold is {score_threshold}; allowed: 0 to 1")
    if num_images < 1:
        raise UserError(f"the number of images is {num_images}; allowed: 1 or more")


def inputs_of(
    dataset_name: str, records: dict[int, dict[str, Any]], predictions_json: str
) -> list[str]:
    """The files that drawing a data set reads."""
    images = [record["file_name"] for record in records.values()]
    metadata = MetadataCatalog.get(dataset_name)
    files = [metadata.get(key, "") for key in ("json_file", "given_json_file")]
    return [*images, *files, predictions_json]


def records_by_id(dataset_name: str, folder: Path) -> dict[Any, dict[str, Any]]:
    """Checks the files of a registered data set; returns image id -> record, in its order.

    Args:
        dataset_name: name of the data set.
        folder: for a copy of the annotations, if they need fixes; see `check_coco_set`.

    Raises:
        ConfigError: the data set is not registered.
        DataError: the files have errors.
    """
    if dataset_name not in DatasetCatalog:
        raise ConfigError(f"{dataset_name!r} is not a registered data set")
    check_files(dataset_name, folder)
    return {record["image_id"]: record for record in DatasetCatalog.get(dataset_name)}


def by_image_id(
    predictions: Sequence[dict[str, Any]], score_threshold: float = 0.0
) -> defaultdict[int, list[dict[str, Any]]]:
    """Image id -> predictions with at least this score; an empty list for other images."""
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in predictions:
        if entry["score"] >= score_threshold:
            grouped[entry["image_id"]].append(entry)
    return grouped


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)


def draw_objects(
    image: np.ndarray,
    longer_side: int,
    *,
    boxes: np.ndarray,
    masks: Sequence[Optional[np.ndarray]],
    labels: Sequence[str],
    colours: Sequence[Any],
) -> np.ndarray:
    """Scales an image and draws boxes, masks and labels on it.

    Args:
        image: (H, W, 3) uint8, RGB.
        longer_side: of the picture, pixels.
        boxes: (N, 4) float, x0, y0, x1, y1 in pixels of `image`.
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
    for mask, colour in zip(masks, colours):
        if mask is not None:
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
            artist.draw_binary_mask(mask, colour, alpha=0.35, area_threshold=0)
    texts = [as_label(label) for label in labels]
    artist.overlay_instances(boxes=boxes * scale, labels=texts, assigned_colors=colours, alpha=1.0)
    return artist.output.get_image()[:height, :width]


def as_label(text: str) -> str:
    """Escapes a text for matplotlib, which would read text between dollar signs as a formula."""
    return shown(text).replace("$", r"\$")


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
