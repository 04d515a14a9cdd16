"""Finds, reads and writes images and videos."""

import glob
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Optional, Union

import cv2
import numpy as np

from ws_detectron.errors import DataError, UserError, shown
from ws_detectron.utils.io import writing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_CODES = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
VIDEO_SUFFIXES = (*VIDEO_CODES, ".webm", ".mpg", ".mpeg")
DEFAULT_RATE = 25.0  # frames per second, if a video does not specify it


def find_inputs(arguments: Sequence[str], output: Optional[Path] = None) -> list[Path]:
    """The input files, each once, in the order of the arguments.

    Files in `output` are skipped, because they may be earlier drawings, unless an argument is the
    file itself, or a folder or pattern inside `output`.

    Args:
        arguments: files with any suffix; folders, which are searched for images and videos
            recursively; and patterns with `*`, `?` or `[...]` (`**` for folders at any depth).
        output: the folder (or video) that will be written.

    Raises:
        UserError: an argument matches no file, or only files in `output`.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        path = Path(argument)
        if not argument:
            raise UserError("--input is empty; allowed: files, folders and patterns")
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if _is_media(p)]
        elif path.is_file():
            files = [path]
        else:
            matches = sorted(glob.glob(os.path.expanduser(argument), recursive=True))
            files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise UserError(
                f"--input {argument} matches no file, or a folder without images and videos "
                f"({' '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))})"
            )
        if output is not None and not path.is_file():
            files = _outside(output, files, argument)
        for file in files:
            found.setdefault(Path(os.path.abspath(file)), file)
    return list(found.values())


def _outside(output: Path, files: Sequence[Path], argument: str) -> list[Path]:
    """The files of a folder or pattern, except those in `output`."""
    named = Path(os.path.expanduser(argument))
    # for a pattern, the last folder before the first wildcard
    start = next(p for p in (named, *named.parents) if p.is_dir() or not set("*?[") & set(str(p)))
    folder = output.resolve()
    if folder in start.resolve().parents:
        return list(files)
    kept = [f for f in files if not (f.parent.resolve() / f.name).is_relative_to(folder)]
    if not kept:
        raise UserError(
            f"--input {argument} matches only files in --output {output}, which may be earlier "
            "drawings; choose another output"
        )
    if len(kept) < len(files):
        logger.info("skipped %d files in the output %s", len(files) - len(kept), shown(output))
    return kept


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and path.is_file()


def is_video(path: Union[str, Path]) -> bool:
    """Whether a file name has the suffix of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def output_names(inputs: Sequence[Path], suffix_of: Callable[[Path], str]) -> list[str]:
    """A unique file name for each input: `a.png`, and `a_2.png` for `a` of another folder.

    Names are also unique on file systems that ignore case. The first input of a name keeps it.

    Args:
        inputs: paths.
        suffix_of: returns the suffix of the output of an input.
    """
    names = [f"{path.stem}{suffix_of(path)}" for path in inputs]
    taken: set[str] = set()
    again = []
    for number, name in enumerate(names):
        again += [number] if _folded(name) in taken else []
        taken.add(_folded(name))
    counts: Counter[str] = Counter()
    for number in again:
        path, first = inputs[number], _folded(names[number])
        while _folded(names[number]) in taken:
            counts[first] += 1
            names[number] = f"{path.stem}_{counts[first] + 1}{suffix_of(path)}"
        taken.add(_folded(names[number]))
    return names


def _folded(name: str) -> str:
    """Equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", name.casefold())


def read_frames(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    """Frames per second of a video, and its frames as (H, W, 3) uint8, RGB.

    Warns at the end if the video has fewer frames than it declares.

    Raises:
        DataError: the video cannot be opened or no frame can be decoded.
    """
    video = cv2.VideoCapture(str(path))
    opened, frame = video.read() if video.isOpened() else (False, None)
    if not opened or frame is None:
        video.release()
        raise DataError(f"cannot read video {path}: OpenCV finds no frame in it")
    rate = video.get(cv2.CAP_PROP_FPS)
    expected = video.get(cv2.CAP_PROP_FRAME_COUNT)

    def frames(frame: np.ndarray) -> Iterator[np.ndarray]:
        count = 0
        try:
            more = True
            while more:
                yield frame[:, :, ::-1]
                count += 1
                more, frame = video.read()
            # some formats declare an approximate number
            if count < 0.9 * expected:
                logger.warning(
                    "video %s ends after %d of %d frames; is it complete?",
                    shown(path),
                    count,
                    expected,
                )
        finally:
            video.release()

    return rate if rate and rate > 0 else DEFAULT_RATE, frames(frame)


@contextmanager
def open_video(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends a frame, (H, W, 3) uint8, RGB, to a new video.

    All frames must have the size of the first; an odd last row or column is cut off, as codecs
    require. The file is renamed to `path` when the body ends without an error.

    Raises:
        UserError: the suffix is not in `VIDEO_CODES`, or the video cannot be written.
        DataError: a frame differs in size from the first; OpenCV would drop it silently.
    """
    if path.suffix.lower() not in VIDEO_CODES:
        raise UserError(f"cannot write {path}: allowed suffixes are {' '.join(VIDEO_CODES)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV can only write to a path and infers the format from its suffix
    partial = path.with_name(f".{path.stem[:40]}.{os.getpid()}.partial{path.suffix}")
    code = cv2.VideoWriter.fourcc(*VIDEO_CODES[path.suffix.lower()])
    writers: list[cv2.VideoWriter] = []
    shapes: list[tuple[int, ...]] = []

    def append(frame: np.ndarray) -> None:
        shapes.append(frame.shape)
        if frame.shape != shapes[0]:
            raise DataError(
                f"cannot write {path}: frame {len(shapes)} has {frame.shape[1]} x "
                f"{frame.shape[0]} pixels, the first {shapes[0][1]} x {shapes[0][0]}"
            )
        height, width = (side - side % 2 for side in frame.shape[:2])
        if not writers:
            writers.append(cv2.VideoWriter(str(partial), code, rate, (width, height)))
            if not writers[0].isOpened():
                raise UserError(f"cannot write {path}: OpenCV cannot open it for writing")
        writers[0].write(np.ascontiguousarray(frame[:height, :width, ::-1]))

    try:
        yield append
        for writer in writers:
            writer.release()
        if not partial.is_file():
            raise UserError(f"cannot write {path}: no frame reached the file")
        with writing(path):
            os.replace(partial, path)
    finally:
        for writer in writers:
            writer.release()
        partial.unlink(missing_ok=True)
