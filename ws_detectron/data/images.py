"""Reads image files by the same rules for training, evaluation and drawing."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Union

import numpy as np
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, UnidentifiedImageError

from ws_detectron.errors import DataError, shown

from .validate import ERROR, Finding, Findings

_ORIENTATION = 0x0112  # the EXIF tag; Pillow names it from 9.4 on


def read_rgb(path: Union[str, Path]) -> np.ndarray:
    """Reads an image file as (H, W, 3) uint8, RGB, rotated by its EXIF orientation.

    Raises:
        DataError: the file is missing, cannot be decoded, or is refused by `check_image_file`.
    """
    check_image_file(path)
    with _named(path):
        return read_image(str(path), format="RGB")


def read_annotated(record: dict[str, Any]) -> np.ndarray:
    """Reads the image of a record in detectron2's standard format, as `read_rgb` does.

    Raises:
        DataError: `read_rgb` fails, or the size differs from the record's.
    """
    image = read_rgb(record["file_name"])
    try:
        check_image_size(dict(record), image)
    except SizeMismatchError as error:
        found = image.shape[1], image.shape[0]
        expected = record["width"], record["height"]
        rotated = " (do the annotations ignore its EXIF orientation?)"
        raise DataError(
            f"image {record['file_name']} has {found[0]} x {found[1]} pixels, EXIF orientation "
            f"applied, but its annotations say width {expected[0]} and height {expected[1]}"
            f"{rotated if found == expected[::-1] else ''}; correct the annotations or the image"
        ) from error
    return image


def image_findings(images: Iterable[dict[str, Any]], folder: Union[str, Path]) -> list[Finding]:
    """Checks the image files of a COCO file; reads their headers only.

    Args:
        images: as returned by `validate` with `load`; those without a file name are skipped.
        folder: of the image files.
    """
    found = Findings()
    for number, image in enumerate(images):
        name = image.get("file_name")
        if not isinstance(name, str):
            continue
        where = f"images[{number}] ({name!r:.60})"
        path = Path(folder, name)
        if not os.path.exists(path):
            found.add(ERROR, "images are not in the folder", where)
            continue
        try:
            size = _upright_size(path)
        except DataError as error:
            found.add(ERROR, "images cannot be read", f"{where}: {error}")
            continue
        given = [image.get("width"), image.get("height")]
        if [*size] != given:
            found.add(
                ERROR,
                "width and height differ between annotations and images, EXIF orientation applied "
                f"(images {size[0]} x {size[1]})",
                where,
                given,
            )
    return list(found.values())


def missing_images(images: Sequence[dict[str, Any]], folder: Union[str, Path]) -> list[str]:
    """File names of images that are not in a folder; lists each folder only once."""
    present: dict[str, set[str]] = {}
    missing = []
    for image in images:
        path, base = os.path.split(os.path.join(folder, image["file_name"]))
        if path not in present:
            present[path] = set()
            with suppress(OSError):
                present[path] = set(os.listdir(path))
        if base not in present[path]:
            missing.append(image["file_name"])
    return missing


def _upright_size(path: Path) -> tuple[int, int]:
    """Width and height with EXIF orientation applied; may read all of a PNG file."""
    check_image_file(path)
    with _named(path), Image.open(path) as image:
        rotated = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)  # by 90 or 270 degrees
        return image.size[::-1] if rotated else image.size


def check_image_file(path: Union[str, Path]) -> None:
    """Checks that a file is an image with at most 8 bits per channel; reads its header only.

    detectron2's `read_image` clips larger values, so a 16-bit image would be white. 16-bit colour
    images are allowed, because Pillow scales them to 8 bits (the high byte). If there are several
    frames or pages, the first is used.

    Raises:
        DataError: the file is not an image or has more than 8 bits per channel.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a named pipe would never be opened
        raise DataError(f"cannot read image {path}: it is not a regular file")
    with _named(path), PathManager.open(str(path), "rb") as file, Image.open(file) as image:
        mode, name = image.mode, image.format
        # phones store depth maps and the like as further frames of MPO
        frames = 1 if name == "MPO" else getattr(image, "n_frames", 1)
    if mode.partition(";")[0] in ("I", "F"):  # Pillow's modes of integers and floats
        raise DataError(
            f"cannot read image {path}: it is a {name} of mode {mode}, with more than 8 "
            "bits per channel; choose a scaling and convert it to 8 bits"
        )
    if frames > 1:
        message = f"{shown(path)} has {frames} frames or pages; the first of each file is used"
        log_first_n(logging.WARNING, message, name=__name__)


@contextmanager
def _named(path: Union[str, Path]) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise DataError(
            f"cannot read image {path}: it is empty or not an image that Pillow can read"
        ) from error
    except Exception as error:  # Pillow raises errors without a common base class on broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read image {path}: {reason}") from error
