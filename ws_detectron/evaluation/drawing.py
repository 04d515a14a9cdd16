"""Ground truth and predictions drawn side by side."""

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
from ws_detectron.errors import ConfigError, DataError, UserError, shown
from ws_detectron.utils.io import atomic_write, refuse_overwrite

from .coco_files import load_predictions

CROWD_COLOUR = (0.6, 0.6, 0.6)
CAPTION_HEIGHT = 30  # pixels above each picture
MARGIN = 6  # white pixels left of and below each picture
PAIR_MARGIN = 24  # white pixels right of each pair of ground truth and predictions


@dataclass
class Objects:
    """What there is to draw on an image, largest first; see `draw_objects` for the shapes."""

    boxes: list[Sequence[float]] = field(default_factory=list)
    masks: list[Optional[np.ndarray]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    colours: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, image: np.ndarray, longer_side: int) -> np.ndarray:
        """The image, scaled, with the objects on it; (H, W, 3) uint8, RGB, as `image`."""
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
        record: in detectron2's standard format; masks may be polygons or RLE.
        metadata: of its data set.
    """
    objects = Objects()
    size = record["height"], record["width"]
    for annotation in record.get("annotations", ()):
        category = annotation["category_id"]
        crowd = annotation.get("iscrowd", 0)
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        objects.boxes.append(box)
        objects.masks.append(_mask(annotation.get("segmentation"), *size))
        objects.labels.append(class_name(metadata, category) + (" (crowd)" if crowd else ""))
        objects.colours.append(CROWD_COLOUR if crowd else class_colour(category))
    return objects


def predicted_objects(predictions: Sequence[dict[str, Any]], metadata: Metadata) -> Objects:
    """Predictions for one image, labelled with class and score in per cent.

    Args:
        predictions: entries of a COCO results file.
        metadata: of the data set; maps its category ids to class numbers.

    Raises:
        DataError: a category id is not of the data set.
    """
    objects = Objects()
    numbers = metadata.get("thing_dataset_id_to_contiguous_id")  # None: they are the same
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
    """The name of a class number; the number where the data set has no names."""
    names = metadata.get("thing_classes") or ()
    return names[category] if category < len(names) else f"class {category}"


def class_colour(category: int) -> tuple[float, float, float]:
    """The colour of a class, the same on every picture; RGB from 0 to 1.

    Bright ones alone, as they lie on photographs. Hues are a golden ratio apart, which keeps the
    first few classes far from each other, however many there are.
    """
    hue = (0.33 + category * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, (0.95, 0.6)[category % 2], 1.0)


def captioned(picture: np.ndarray, text: str, width: int, height: int) -> np.ndarray:
    """A picture in the upper left of a white cell, under a line of text.

    Args:
        picture: (h, w, 3) uint8, RGB, not larger than the cell.
        text: cut, with an ellipsis, where it is too long.
        width: of the cell without margins, pixels.
        height: of the cell without margins and caption, pixels.

    Returns:
        (height + CAPTION_HEIGHT + MARGIN, width + MARGIN, 3) uint8.
    """
    shape = (height + CAPTION_HEIGHT + MARGIN, width + MARGIN, 3)
    text = " ".join(shown(text).split("\n"))  # Pillow measures single lines only
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
    """Cells of one width, row by row; each row is as high as its highest cell."""
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
        note: ends the caption of the predictions.
        longer_side: of each picture, pixels.

    Raises:
        DataError: the image cannot be read or has another size than the record says, or a
            prediction is of an unknown category.
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
    """Writes a contact sheet: images with their ground truth beside the predictions for them.

    Two images in a row, each in two pictures, with masks, boxes, classes and, for predictions,
    scores in per cent. A class has the same colour everywhere. Small images are enlarged.

    Args:
        dataset_name: a registered data set in COCO format.
        predictions_json: a COCO results file for it, as `COCOEvaluator` writes.
        output_png: the picture, ending in `.png`.
        score_threshold: predictions below it are not drawn.
        num_images: how many images from the start of the data set, where `image_ids` is None.
        image_ids: which images, in this order.

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
    """What is to be drawn can be.

    Raises:
        UserError: the threshold is no score, or no image is asked for.
    """
    if not 0 <= score_threshold <= 1:  # false for NaN, too
        raise UserError(f"the score threshold is {score_threshold}; allowed: 0 to 1")
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
    """Image id -> record of a registered data set, in its order, once its files are checked.

    Args:
        dataset_name: of the set.
        folder: for a copy of its file, where something has to be fixed; see `check_coco_set`.

    Raises:
        ConfigError: the data set is not registered.
        DataError: its files cannot be used.
    """
    if dataset_name not in DatasetCatalog:
        raise ConfigError(f"{dataset_name!r} is not a registered data set")
    check_files(dataset_name, folder)
    return {record["image_id"]: record for record in DatasetCatalog.get(dataset_name)}


def by_image_id(
    predictions: Sequence[dict[str, Any]], score_threshold: float = 0.0
) -> defaultdict[int, list[dict[str, Any]]]:
    """Image id -> its predictions of at least this score; empty for images without any."""
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in predictions:
        if entry["score"] >= score_threshold:
            grouped[entry["image_id"]].append(entry)
    return grouped


def _mask(segmentation: Any, height: int, width: int) -> Optional[np.ndarray]:
    """(height, width) uint8 from polygons or RLE; None where there is none."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation)


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
