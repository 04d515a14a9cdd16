"""Draws predictions: beside ground truth on a data set, or on any images and videos."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ws_detectron.data.images import read_rgb
from ws_detectron.data.rle import check_masks
from ws_detectron.errors import ConfigError, DataError, UserError, shown
from ws_detectron.utils.io import (
    check_folder,
    csv_text,
    refuse_overwrite,
    write_json,
    write_text,
    writing,
)

from .coco_eval import check_predictions, load_annotations
from .coco_report import TITLES
from .curves import write_figure
from .drawing import (
    by_image_id,
    check_options,
    inputs_of,
    pair,
    predicted_objects,
    records_by_id,
    tile,
    write_png,
)
from .image_errors import ERRORS, count_errors, draw_errors, image_ap
from .inputs import find_inputs, is_video, open_video, output_names, read_frames

logger = logging.getLogger(__name__)

NAMED_AT_MOST = 10
SHEETS_AND_COUNTS = [
    *("first.png", "best.png", "worst.png", "image_ap.csv"),
    *("errors.png", "errors.json"),
]
LEAST_SIDE = 448  # pixels; smaller images are enlarged so that labels are readable

Predict = Callable[[np.ndarray], list[dict[str, Any]]]


def visualize_dataset(
    dataset_name: str,
    predictions: Sequence[dict[str, Any]],
    output: Path,
    *,
    score_threshold: float = 0.5,
    num_images: int = 8,
    each: bool = False,
    task: Optional[str] = None,
    predictions_name: str = "given",
) -> str:
    """Draws predictions beside ground truth and counts their errors.

    Writes to `output`: `first.png`, `best.png` and `worst.png`, sheets of the first images and of
    those with the highest and lowest AP (see `image_ap`); `image_ap.csv`; `errors.png` and
    `errors.json`, the number of errors of each type (see `error_types`); with `each`, a picture of
    every image in `images/`. Images that cannot be read, or whose size differs from their
    annotations, are skipped and named in the summary.

    Args:
        dataset_name: a registered data set in COCO format.
        predictions: as returned by `load_predictions`.
        output: folder.
        score_threshold: predictions below it are neither drawn nor counted as errors; AP includes
            them.
        num_images: number of images per sheet.
        each: also draw every image separately.
        task: "bbox" or "segm", for AP and errors; default: masks if there are any.
        predictions_name: name of the predictions in error messages.

    Returns:
        A summary to print.

    Raises:
        UserError: predictions and data do not belong together, nothing can be drawn, a file cannot
            be written, or an output would overwrite an input.
    """
    check_options(score_threshold, num_images)
    check_folder(output)
    records = records_by_id(dataset_name, output)
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("json_file"):
        raise ConfigError(f"data set {dataset_name} has no COCO annotation file")
    names = output_names([Path(r["file_name"]) for r in records.values()], lambda path: ".png")
    targets = [output / name for name in SHEETS_AND_COUNTS]
    targets += [output / "images" / name for name in names if each]
    refuse_overwrite(targets, inputs_of(dataset_name, records, predictions_name))
    # a later run would read drawings in an image folder as images
    folders = {Path(r["file_name"]).parent for r in records.values()}
    refuse_overwrite({target.parent for target in targets}, folders)
    path = PathManager.get_local_path(metadata.json_file)
    annotations = load_annotations(path)
    task = check_predictions(
        annotations,
        predictions,
        None if task is None else [task],
        annotations_name=path,
        predictions_name=predictions_name,
    )[-1]
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    check_masks(predictions, sizes, predictions_name)  # they are drawn whatever the task is

    kept = by_image_id(predictions, score_threshold)
    note = f"score ≥ {100 * score_threshold:g} %"
    scores = image_ap(annotations, predictions, task)

    skipped: dict[Any, str] = {}

    def draw(image_id: Any) -> Optional[np.ndarray]:
        if image_id in skipped:
            return None
        value = f", AP {scores[image_id]:.0f}" if image_id in scores else ""
        try:
            return pair(records[image_id], kept[image_id], metadata, note=note + value)
        except DataError as error:
            skipped[image_id] = records[image_id]["file_name"]
            logger.warning("skipped: %s", error)
            return None

    # with equal AP, images with more objects are more informative
    objects = {i: len(record.get("annotations", ())) for i, record in records.items()}
    scored = [image_id for image_id in records if image_id in scores]
    ranked = sorted(scored, key=lambda i: (-scores[i], -objects[i]))
    worst = sorted(scored, key=lambda i: (scores[i], -objects[i]))
    sheets = {"first": list(records), "best": ranked, "worst": worst}
    for name, image_ids in sheets.items():
        _write_sheet(output / f"{name}.png", image_ids, num_images, draw)
    rows = [(i, shown(records[i]["file_name"]), f"{scores[i]:.4f}") for i in ranked]
    write_text(output / "image_ap.csv", csv_text([("image_id", "file_name", "AP"), *rows]))

    counts = count_errors(annotations, predictions, task, score_threshold)
    title = f"{TITLES[task].capitalize()} predictions with {note}, {len(records)} images"
    with writing(output):
        write_figure(draw_errors(counts, title), output / "errors.png")
    about = {"task": task, "score_threshold": score_threshold, "types": ERRORS}
    write_json(output / "errors.json", {**about, "counts": counts}, indent=2)
    if each:
        for image_id, name in zip(records, names):
            picture = draw(image_id)
            if picture is not None:
                write_png(output / "images" / name, picture)
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    drawn = f"sheets, errors.png and image_ap.csv: {shown(output)}"
    return f"{title}: {listed}\n{drawn}{_skipped(list(skipped.values()))}"


def _skipped(files: Sequence[Any]) -> str:
    """The line of a summary on skipped files; empty if there are none."""
    if not files:
        return ""
    names = ", ".join(shown(file).replace("\n", r"\n") for file in files[:NAMED_AT_MOST])
    more = f" and {len(files) - NAMED_AT_MOST} more" if len(files) > NAMED_AT_MOST else ""
    return f"\n{len(files)} could not be read and were skipped: {names}{more}"


def _write_sheet(
    path: Path,
    image_ids: Sequence[Any],
    num_images: int,
    draw: Callable[[Any], Optional[np.ndarray]],
) -> None:
    """Writes a sheet of the first `num_images` that can be drawn."""
    pictures: list[np.ndarray] = []
    for image_id in image_ids:
        if len(pictures) == num_images:
            break
        picture = draw(image_id)
        if picture is not None:
            pictures.append(picture)
    if not pictures:
        raise UserError(
            f"{path.name}: none of {len(image_ids)} images can be drawn; see the warnings above"
            if image_ids
            else f"{path.name}: no image has an object"
        )
    write_png(path, tile(pictures, columns=2))


def visualize_inputs(
    arguments: Sequence[str],
    output: Path,
    predict: Predict,
    metadata: Metadata,
    *,
    score_threshold: float = 0.5,
) -> str:
    """Draws predictions on images and videos.

    Files that cannot be read are skipped and named in the summary.

    Args:
        arguments: see `find_inputs`.
        output: a folder for `<name>.png` and `<name>.mp4`; for a single video also a video file.
        predict: takes an image, (H, W, 3) uint8, RGB; returns entries of a COCO results file.
        metadata: of the data set with the model's classes.
        score_threshold: predictions below it are not drawn.

    Returns:
        A summary to print.

    Raises:
        UserError: no file can be read, or an output cannot be written or would overwrite an input.
    """
    check_options(score_threshold)
    paths = find_inputs(arguments, output)
    to_video = is_video(output) and not output.is_dir()
    if to_video and (len(paths) > 1 or not is_video(paths[0])):
        raise UserError(f"--output {output} is a video, so --input must be a single video")

    names = output_names(paths, lambda path: ".mp4" if is_video(path) else ".png")
    targets = [output] if to_video else [output / name for name in names]
    check_folder(output.parent if to_video else output)
    refuse_overwrite(targets, paths)

    def draw(image: np.ndarray) -> np.ndarray:
        entries = [entry for entry in predict(image) if entry["score"] >= score_threshold]
        side = max(LEAST_SIDE, *image.shape[:2])
        return predicted_objects(entries, metadata).draw(image, side)

    skipped = []
    for path, target in zip(paths, targets):
        try:
            if is_video(path):
                rate, frames = read_frames(path)
                with open_video(target, rate) as append:
                    for frame in frames:
                        append(draw(frame))
            else:
                write_png(target, draw(read_rgb(path)))
        except DataError as error:
            skipped.append(path)
            logger.warning("skipped %s: %s", shown(path), error)
    if len(skipped) == len(paths):
        raise UserError(f"none of the {len(paths)} files could be read{_skipped(skipped)}")
    drawn = len(paths) - len(skipped)
    return f"drawn {drawn} of {len(paths)} files: {shown(output)}{_skipped(skipped)}"
