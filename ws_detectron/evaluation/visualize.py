"""Draws predictions: beside ground truth on a data set, or on any images and videos."""

import functools
import itertools
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ws_detectron.data.images import read_annotated, read_rgb
from ws_detectron.data.rle import check_masks
from ws_detectron.errors import ConfigError, DataError, UserError, shown
from ws_detectron.utils.command_line import progress
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
from .drawing import (
    FALSE,
    MISSED_OBJECT,
    NOT_EVALUATED,
    SIDE,
    TRUE,
    Pair,
    contact_sheet,
    draw_entries,
)
from .figure_style import write_figure
from .image_errors import (
    CORRECT,
    ERRORS,
    FOREGROUND,
    FOUND,
    IGNORED,
    count_errors,
    draw_errors,
    image_ap,
    match_images,
)
from .inputs import (
    IMAGE_SUFFIXES,
    MEDIA,
    VIDEO_CODES,
    check_display,
    find_inputs,
    is_video,
    output_names,
    read_video,
    show,
    write_image,
    write_video,
)

logger = logging.getLogger(__name__)

NAMED_AT_MOST = 10
SHEETS = {"first.png": "first images", "best.png": "highest AP", "worst.png": "lowest AP"}
OUTPUTS = (*SHEETS, "image_ap.csv", "errors.png", "errors.json")

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
    those with the highest and lowest AP (see `image_ap`), whose boxes are marked (see `MARKS` and
    `match_images`); `image_ap.csv`; `errors.png` and `errors.json`, the number of errors of each
    type (see `count_errors`); with `each`, a picture of every image in `images/`. Images that
    cannot be read, or whose size differs from their annotations, are skipped and named in the
    summary.

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
    check_folder(output)
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("json_file"):
        raise ConfigError(f"data set {dataset_name} has no COCO annotation file")
    root, loaded = metadata.get("image_root", ""), {}
    if not root or not PathManager.exists(metadata.json_file):  # own loader; scenes not yet made
        loaded = {r["image_id"]: r["file_name"] for r in DatasetCatalog.get(dataset_name)}
    path = PathManager.get_local_path(metadata.json_file)
    annotations = load_annotations(path, load=True)
    records = {
        i["id"]: {**i, "file_name": loaded.get(i["id"], os.path.join(root, i["file_name"]))}
        for i in annotations["images"]
    }
    files = [Path(record["file_name"]) for record in records.values()]
    pictures = dict(zip(records, output_names(files, lambda path: ".png"))) if each else {}
    targets = [output / name for name in OUTPUTS]
    targets += [output / "images" / name for name in pictures.values()]
    given = metadata.get("given_json_file")  # where `path` is a fixed copy
    refuse_overwrite(targets, [*files, path, given, predictions_name])
    # a later run would read drawings in an image folder as images
    refuse_overwrite({path.parent for path in targets}, {path.parent for path in files})
    task = check_predictions(
        annotations,
        predictions,
        None if task is None else [task],
        annotations_name=path,
        predictions_name=predictions_name,
    )[-1]
    sizes = {i: (record["height"], record["width"]) for i, record in records.items()}
    check_masks(predictions, sizes, predictions_name)  # they are drawn whatever the task is

    ap = image_ap(annotations, predictions, task)
    truth, found = by_image(annotations["annotations"]), by_image(predictions, score_threshold)
    # with equal AP, images with more objects are more informative
    objects = {image_id: len(truth[image_id]) for image_id in records}
    best = sorted((i for i in records if i in ap), key=lambda i: (-ap[i], -objects[i]))
    worst = sorted(best, key=lambda i: (ap[i], -objects[i]))
    rows = [(i, shown(records[i]["file_name"]), f"{ap[i]:.4f}") for i in best]
    write_text(output / "image_ap.csv", csv_text([("image_id", "file_name", "AP"), *rows]))
    matches = match_images(annotations, predictions, task, score_threshold)
    counts, every = count_errors(matches.values()), by_image(predictions)
    note = f"score ≥ {100 * score_threshold:g} %"
    title = f"{TITLES[task].capitalize()} predictions on {dataset_name}, {note}"
    with writing(output):
        write_figure(draw_errors(counts, f"{title}, {len(records)} images"), output / "errors.png")
    about = {"task": task, "score_threshold": score_threshold, "types": ERRORS}
    write_json(output / "errors.json", {**about, "counts": counts}, indent=2)

    categories = sorted(annotations["categories"], key=lambda c: c["id"])  # as detectron2 does
    classes = {category["id"]: category["name"] for category in categories}
    skipped: dict[Any, str] = {}

    def draw(image_id: Any) -> Optional[Pair]:
        """Ground truth and predictions; None for an image that cannot be read."""
        if image_id in skipped:
            return None
        name, entries = records[image_id]["file_name"], (truth[image_id], found[image_id])
        try:
            image = read_annotated(records[image_id])
        except DataError as error:
            skipped[image_id] = name
            logger.warning("skipped: %s", error)
            return None
        types, states = matches[image_id]
        found_marks = [{CORRECT: TRUE, IGNORED: NOT_EVALUATED}.get(t, FALSE) for t in types]
        true_marks = [{FOUND: TRUE, IGNORED: NOT_EVALUATED}.get(s, MISSED_OBJECT) for s in states]
        left, right = (
            draw_entries(image, SIDE, group, classes, marks)
            for group, marks in zip(entries, (true_marks, found_marks))
        )
        file_name = shown(Path(name).name).replace("\n", " ")
        crowds, objects = states.count(IGNORED), len(states) - states.count(IGNORED)
        missing = true_marks.count(MISSED_OBJECT)
        left_text = (
            f"{file_name}: {_number(objects, 'object')}\n"
            f"{true_marks.count(TRUE)} found, {missing} not found"
            + (f", {_number(crowds, 'crowd')}" if crowds else "")
        )
        right_text = (
            f"{len(types)} of {_number(len(every[image_id]), 'prediction')} drawn, {note}\n"
            f"{found_marks.count(TRUE)} correct, {found_marks.count(FALSE)} false"
            + (f"; AP of all {ap[image_id]:.0f}" if image_id in ap else "")
        )
        return (left, left_text), (right, right_text)

    plural = {"bbox": "boxes", "segm": "masks"}[task]
    of_sheet = f"{plural} matched at IoU ≥ {FOREGROUND:g}, {note}"
    for (name, what), image_ids in zip(SHEETS.items(), (list(records), best, worst)):
        pairs = list(itertools.islice(filter(None, map(draw, image_ids)), num_images))
        if not pairs:
            reason = "can be drawn; see the warnings above" if image_ids else "has an object"
            raise UserError(f"{name}: none of {len(records)} images {reason}")
        write_image(output / name, contact_sheet(pairs, f"{dataset_name}, {what}: {of_sheet}"))
    for image_id, name in progress(pictures.items(), "drawing", "image", len(pictures)):
        pair = draw(image_id)
        if pair is not None:
            sheet = contact_sheet([pair], f"{dataset_name}: {of_sheet}")
            write_image(output / "images" / name, sheet)
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    drawn = f"sheets, errors.png and image_ap.csv: {shown(output)}"
    return f"{title}, {len(records)} images: {listed}\n{drawn}{_skipped(list(skipped.values()))}"


def by_image(
    entries: Sequence[dict[str, Any]], score_threshold: float = -math.inf
) -> defaultdict[Any, list[dict[str, Any]]]:
    """Image id -> entries, predictions with at least this score; an empty list for other images."""
    grouped: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry.get("score", 0.0) >= score_threshold:
            grouped[entry["image_id"]].append(entry)
    return grouped


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _skipped(files: Sequence[Any]) -> str:
    """The line of a summary on skipped files; empty if there are none."""
    if not files:
        return ""
    names = ", ".join(shown(file).replace("\n", r"\n") for file in files[:NAMED_AT_MOST])
    more = f" and {len(files) - NAMED_AT_MOST} more" if len(files) > NAMED_AT_MOST else ""
    return f"\n{len(files)} could not be read and were skipped: {names}{more}"


class Drawing:
    """Predicts on images and draws the predictions, and counts them.

    Args:
        build: returns the model; called for the first image, when inputs and output are checked.
        classes: class number -> name.
        score_threshold: predictions below it are not drawn.
        longer_side: of a drawing, pixels; default: that of the image.
    """

    def __init__(
        self,
        build: Callable[[], Predict],
        classes: Mapping[int, str],
        score_threshold: float = 0.5,
        longer_side: Optional[int] = None,
    ) -> None:
        self._predict = functools.cache(build)
        self._classes, self._threshold, self._longer_side = classes, score_threshold, longer_side
        self._images, self._detections, self._small, self._seconds = 0, 0, 0, 0.0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The drawing of an image, both (H, W, 3) uint8, RGB.

        Raises:
            ConfigError: the model predicts a class that is not in `classes`.
        """
        predict, classes, start = self._predict(), self._classes, time.perf_counter()
        found = predict(image)
        self._seconds += time.perf_counter() - start
        entries = [entry for entry in found if entry["score"] >= self._threshold]
        beyond = [e["category_id"] for e in entries if classes and e["category_id"] not in classes]
        if beyond:
            raise ConfigError(
                f"the model predicts class number {beyond[0]}, and the data set has {len(classes)} "
                "classes; set MODEL.ROI_HEADS.NUM_CLASSES (MODEL.RETINANET.NUM_CLASSES), or name "
                "weights that were trained on these classes"
            )
        self._images, self._detections = self._images + 1, self._detections + len(entries)
        side = self._longer_side or max(image.shape[:2])
        self._small += self._longer_side is None and side < SIDE
        return draw_entries(image, side, entries, classes)

    def summary(self) -> str:
        """Numbers of detections and images, time of the model, and how many images are small."""
        milliseconds = 1000 * self._seconds / max(1, self._images)
        numbers = _number(self._detections, "detection"), _number(self._images, "image")
        limit = f"score ≥ {100 * self._threshold:g} %"
        small = (
            f"\n{_number(self._small, 'image')} of less than {SIDE} pixels, of which labels cover "
            f"much; --longer-side {SIDE} enlarges the drawings"
        )
        text = f"{' in '.join(numbers)} ({limit}), {milliseconds:.0f} ms per image"
        return text + (small if self._small else "")


def visualize_inputs(arguments: Sequence[str], output: Optional[Path], draw: Drawing) -> str:
    """Draws predictions on images and videos.

    Files that cannot be read are skipped and named in the summary.

    Args:
        arguments: see `find_inputs`.
        output: a folder for `<name>.png` and `<name>.mp4`; for a single image or video also a file;
            None: a window.
        draw: draws on an image.

    Returns:
        A summary to print.

    Raises:
        UserError: no file can be read, an output cannot be written or would overwrite an input, or
            there is no display.
        ConfigError: the model predicts a class that is not in `classes`.
    """
    paths = find_inputs(arguments, output)
    targets = _targets(paths, output)
    skipped, ended = [], False
    pairs = list(zip(paths, targets))
    for path, target in progress(pairs, "drawing", "file"):
        title = shown(path.name)
        try:
            if is_video(path):
                rate, count, frames = read_video(path)
                pictures = map(draw, progress(frames, title, "frame", count))
                if target is None:
                    ended = not all(show(picture, title, 1) for picture in pictures)
                else:
                    write_video(target, rate, pictures)
            elif target is None:
                ended = not show(draw(read_rgb(path)), title)
            else:
                write_image(target, draw(read_rgb(path)))
        except DataError as error:
            skipped.append(path)
            logger.warning("skipped %s: %s", shown(path), error)
        if ended:
            return draw.summary()
    if len(skipped) == len(paths):
        raise UserError(f"none of the {len(paths)} files could be read{_skipped(skipped)}")
    where = "on the screen" if output is None else shown(output)
    drawn = f"drawn {len(paths) - len(skipped)} of {len(paths)} files: {where}"
    return f"{drawn}\n{draw.summary()}{_skipped(skipped)}"


def visualize_webcam(camera: int, output: Optional[Path], draw: Drawing) -> str:
    """Draws predictions on the pictures of a camera, until Esc, q or Ctrl-C.

    Args:
        camera: its number, from 0.
        output: a video; None: a window.
        draw: draws on an image.

    Returns:
        A summary to print.

    Raises:
        UserError: there is no such camera, the output is not a video, or there is no display.
        ConfigError: the model predicts a class that is not in `classes`.
    """
    if output is None:
        check_display()
    elif output.suffix.lower() not in VIDEO_CODES:
        raise UserError(f"--output {output} of --webcam must end in {' '.join(VIDEO_CODES)}")
    else:
        check_folder(output.parent)
    rate, _, frames = read_video(camera)
    if output is not None:
        logger.info("recording; Ctrl-C ends it")
        write_video(output, rate, _until_interrupted(map(draw, frames), rate))
        return f"drawn: {shown(output)}\n{draw.summary()}"
    with suppress(KeyboardInterrupt):
        all(show(picture, "Esc or q ends", 1) for picture in map(draw, frames))
    return draw.summary()


def _until_interrupted(pictures: Iterable[np.ndarray], rate: float) -> Iterator[np.ndarray]:
    """Pictures until Ctrl-C, each as often as makes the video as long as the recording."""
    start, written = time.monotonic(), 0
    with suppress(KeyboardInterrupt):
        for picture in pictures:
            repeats = max(1, round(rate * (time.monotonic() - start)) - written)
            written += repeats
            yield from itertools.repeat(picture, repeats)


def _targets(paths: Sequence[Path], output: Optional[Path]) -> Sequence[Optional[Path]]:
    """Where each drawing goes, None for a window; checks that it can be written."""
    if output is None:
        check_display()
        return [None] * len(paths)
    suffix = output.suffix.lower()
    if suffix not in MEDIA or output.is_dir():
        names = output_names(paths, lambda path: ".mp4" if is_video(path) else ".png")
        targets = [output / name for name in names]
        check_folder(output)
    else:
        what, video = ("an image", False) if suffix in IMAGE_SUFFIXES else ("a video", True)
        if suffix not in (*IMAGE_SUFFIXES, *VIDEO_CODES):
            allowed = " ".join((*IMAGE_SUFFIXES, *VIDEO_CODES))
            raise UserError(f"cannot write {output}: allowed suffixes are {allowed}")
        if len(paths) > 1 or is_video(paths[0]) != video:
            raise UserError(
                f"--output {output} is {what}, so --input must be a single {what.split()[1]}"
            )
        targets = [output]
        check_folder(output.parent)
    refuse_overwrite(targets, paths)
    return targets
