"""Images and videos that a user names: files, folders, patterns."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Union

import cv2
import numpy as np

from ws_detectron.errors import DataError, UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_CODES = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
VIDEO_ENDINGS = (*VIDEO_CODES, ".webm", ".mpg", ".mpeg")
DEFAULT_RATE = 25.0  # frames per second, where a video does not say


def find_inputs(arguments: Sequence[str]) -> list[Path]:
    """The files that arguments name, each once, in their order.

    Args:
        arguments: files, taken whatever their ending; folders, of which the images and videos are
            taken, those of folders in them included; and patterns with `*`, `?` or `[...]`
            (`**` for folders at any depth).

    Raises:
        UserError: an argument names nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if _is_media(p)]
        elif path.is_file():
            files = [path]
        else:
            matches = sorted(glob.glob(os.path.expanduser(argument), recursive=True))
            files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise UserError(
                f"--input {argument} names no file, or a folder without images and videos "
                f"({' '.join((*IMAGE_ENDINGS, *VIDEO_ENDINGS))})"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS) and path.is_file()


def is_video(path: Union[str, Path]) -> bool:
    """Whether a file name has the ending of a video."""
    return Path(path).suffix.lower() in VIDEO_ENDINGS


def output_names(inputs: Sequence[Path], ending: Callable[[Path], str]) -> list[str]:
    """A file name for each input, no two the same: `a.png`, and `a_2.png` for another folder's.

    Args:
        inputs: paths.
        ending: of the output for an input.
    """
    used: dict[str, int] = {}
    names = []
    for path in inputs:
        name = f"{path.stem}{ending(path)}"
        used[name] = count = used.get(name, 0) + 1
        names.append(name if count == 1 else f"{path.stem}_{count}{ending(path)}")
    return names


def read_frames(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    """Frames per second of a video, and its frames as (H, W, 3) uint8, RGB.

    Raises:
        DataError: it cannot be opened or has no frame that can be decoded.
    """
    video = cv2.VideoCapture(str(path))
    opened, frame = video.read() if video.isOpened() else (False, None)
    if not opened or frame is None:
        video.release()
        raise DataError(f"cannot read video {path}: OpenCV finds no frame in it")
    rate = video.get(cv2.CAP_PROP_FPS)

    def frames(frame: np.ndarray) -> Iterator[np.ndarray]:
        try:
            more = True
            while more:
                yield frame[:, :, ::-1]
                more, frame = video.read()
        finally:
            video.release()

    return rate if rate and rate > 0 else DEFAULT_RATE, frames(frame)


@contextmanager
def open_video(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a frame, (H, W, 3) uint8, RGB, to a new video.

    All frames must have the size of the first; an odd last row or column is cut off, as codecs
    want it. The file appears under its name when the body ends well.

    Raises:
        UserError: the ending is not one of `VIDEO_CODES`, or OpenCV cannot write the video.
    """
    if path.suffix.lower() not in VIDEO_CODES:
        raise UserError(f"cannot write {path}: allowed endings are {' '.join(VIDEO_CODES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV writes to a path only, and takes the format from its ending
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    code = cv2.VideoWriter.fourcc(*VIDEO_CODES[path.suffix.lower()])
    writers: list[cv2.VideoWriter] = []

    def append(frame: np.ndarray) -> None:
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
        os.replace(partial, path)
    finally:
        for writer in writers:
            writer.release()
        partial.unlink(missing_ok=True)
