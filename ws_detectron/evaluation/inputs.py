"""Finds images and videos, names their drawings, and reads, writes and shows pictures."""

import glob
import logging
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Callable, Optional, Union

import cv2
import numpy as np
from PIL import Image

from ws_detectron.errors import DataError, UserError, shown
from ws_detectron.utils.io import atomic_write, writing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_CODES = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
VIDEO_SUFFIXES = (*VIDEO_CODES, ".webm", ".mpg", ".mpeg")
ANIMATED = ".gif"  # an image or, with several frames, a video
MEDIA = (*IMAGE_SUFFIXES, ANIMATED, *VIDEO_SUFFIXES)
DEFAULT_RATE = 25.0  # frames per second, if a video does not specify it


def find_inputs(arguments: Sequence[str], output: Optional[Path]) -> list[Path]:
    """The input files, each once, in the order of the arguments.

    Files in `output` are skipped, because they may be earlier drawings, unless an argument is the
    file itself, or a folder or pattern inside `output`.

    Args:
        arguments: files with any suffix; folders, which are searched for images and videos
            recursively; and patterns with `*`, `?` or `[...]` (`**` for folders at any depth).
        output: the folder or file that will be written, if any.

    Raises:
        UserError: an argument matches no file, or only files in `output`.
    """
    found: dict[str, Path] = {}
    folder = None if output is None else output.resolve()
    for argument in arguments:
        if not argument:
            raise UserError("--input is empty; allowed: files, folders and patterns")
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
                f"--input {argument} matches no file, or a folder without images and videos "
                f"({' '.join(MEDIA)})"
            )
        kept = files
        if folder and not path.is_file() and folder not in _start(argument).parents:
            kept = [f for f in files if not (f.parent.resolve() / f.name).is_relative_to(folder)]
        if not kept:
            raise UserError(
                f"--input {argument} matches only files in --output {output}, which may be earlier "
                "drawings; choose another output"
            )
        if len(kept) < len(files):
            logger.info("skipped %d files in the output %s", len(files) - len(kept), shown(output))
        for file in kept:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _start(argument: str) -> Path:
    """A folder, or for a pattern the last folder before the first wildcard; resolved."""
    path = Path(os.path.expanduser(argument))
    while not path.is_dir() and set("*?[") & set(str(path)):
        path = path.parent
    return path.resolve()


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in MEDIA and path.is_file()


def is_video(path: Union[str, Path]) -> bool:
    """Whether a file name has the suffix of a video, or the file is an animated GIF."""
    suffix = Path(path).suffix.lower()
    if suffix != ANIMATED:
        return suffix in VIDEO_SUFFIXES
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, ValueError):  # a broken one is reported as an image that cannot be read
        return False


def output_names(inputs: Sequence[Path], suffix_of: Callable[[Path], str]) -> list[str]:
    """A unique file name for each input: `a.png`, and `a_2.png` for `a` of another folder.

    Names are also unique on file systems that ignore case. The first input of a name keeps it.

    Args:
        inputs: paths.
        suffix_of: returns the suffix of the output of an input.
    """
    names = [f"{path.stem}{suffix_of(path)}" for path in inputs]
    taken, seen = set(map(_folded, names)), set()
    counts: Counter[str] = Counter()
    for number, path in enumerate(inputs):
        first = _folded(names[number])
        if first in seen:
            while _folded(names[number]) in taken:
                counts[first] += 1
                names[number] = f"{path.stem}_{counts[first] + 1}{suffix_of(path)}"
            taken.add(_folded(names[number]))
        seen.add(first)
    return names


def _folded(name: str) -> str:
    """Equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", name.casefold())


def read_video(path: Union[Path, int]) -> tuple[float, int, Iterator[np.ndarray]]:
    """Frames per second of a video, the number of frames, and these as (H, W, 3) uint8, RGB.

    Frames of a phone are upright. Warns at the end if there are fewer than the file declares.

    Args:
        path: of a video, or the number of a camera, which has 0 frames: it does not end.

    Raises:
        DataError: it cannot be opened or no frame can be decoded.
    """
    what = f"camera {path}" if isinstance(path, int) else f"video {path}"
    video = cv2.VideoCapture(path if isinstance(path, int) else str(path))
    _, first = video.read() if video.isOpened() else (False, None)
    if first is None:
        raise DataError(f"cannot read {what}: OpenCV finds no frame in it")
    # some formats declare none, or an approximate number
    expected = 0 if isinstance(path, int) else max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))

    def frames() -> Iterator[np.ndarray]:
        count, frame = 0, first
        while frame is not None:
            yield frame[:, :, ::-1]
            count += 1
            _, frame = video.read()
        if count < 0.9 * expected:
            logger.warning(
                "video %s ends after %d of %d frames; is it complete?",
                *(shown(path), count, expected),
            )

    rate = video.get(cv2.CAP_PROP_FPS)
    return rate if rate > 0 else DEFAULT_RATE, expected, frames()


def write_video(path: Path, rate: float, frames: Iterable[np.ndarray]) -> None:
    """Writes a video, which appears under its name when it is complete.

    Args:
        path: its suffix is one of `VIDEO_CODES`.
        rate: frames per second.
        frames: (H, W, 3) uint8, RGB, all of one size; an odd last row or column is cut off, as
            codecs require.

    Raises:
        UserError: another suffix, frames of several sizes, or the video cannot be written.
    """
    if path.suffix.lower() not in VIDEO_CODES:
        raise UserError(f"cannot write {path}: allowed suffixes are {' '.join(VIDEO_CODES)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV can only write to a path and infers the format from its suffix
    partial = path.with_name(f".{path.stem[:40]}.{os.getpid()}.partial{path.suffix}")
    writer = cv2.VideoWriter()
    shape = None
    try:
        for frame in frames:
            height, width = (side - side % 2 for side in frame.shape[:2])
            if shape not in (None, frame.shape):  # OpenCV would leave it out
                raise DataError(
                    f"{path}: frames of {shape} and {frame.shape} (H, W, 3) in one video"
                )
            shape = frame.shape
            if not writer.isOpened():
                code = cv2.VideoWriter.fourcc(*VIDEO_CODES[path.suffix.lower()])
                if not writer.open(str(partial), code, rate, (width, height)):
                    raise UserError(f"cannot write {path}: OpenCV cannot open it for writing")
            writer.write(np.ascontiguousarray(frame[:height, :width, ::-1]))
        writer.release()
        if not partial.is_file():
            raise UserError(f"cannot write {path}: no frame reached the file")
        with writing(path):
            os.replace(partial, path)
    finally:
        writer.release()
        partial.unlink(missing_ok=True)


def write_image(path: Path, picture: np.ndarray) -> None:
    """Writes a picture of (H, W, 3) uint8, RGB, in the format of its suffix, atomically.

    Raises:
        UserError: the suffix is none of `IMAGE_SUFFIXES`, or the file cannot be written.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"cannot write {path}: allowed suffixes are {' '.join(IMAGE_SUFFIXES)}")
    packed = cv2.imencode(path.suffix, picture[:, :, ::-1])[1].tobytes()
    with atomic_write(path, "wb") as file:
        file.write(packed)


def check_display() -> None:
    """Checks that OpenCV can open a window; without a display some builds abort the process.

    Raises:
        UserError: it cannot; gives the reason.
    """
    remedy = "name a file or folder to write: --output"
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise UserError(f"there is no display to show pictures on; {remedy}")
    try:
        cv2.namedWindow("ws_detectron", cv2.WINDOW_NORMAL)
        cv2.destroyAllWindows()
    except cv2.error:
        raise UserError(
            f"this OpenCV has no windows, as opencv-python-headless; {remedy}"
        ) from None


def show(picture: np.ndarray, title: str, milliseconds: int = 0) -> bool:
    """Shows a picture of (H, W, 3) uint8, RGB, in the window of all pictures.

    Args:
        picture, title: what to show.
        milliseconds: to wait for a key; 0: until there is one.

    Returns:
        False if the user wants to stop: Esc, q, or the window was closed.
    """
    window = "ws_detectron"
    cv2.namedWindow(window, cv2.WINDOW_NORMAL)
    cv2.setWindowTitle(window, title)
    cv2.imshow(window, picture[:, :, ::-1])
    key = cv2.waitKey(milliseconds) & 0xFF
    return key not in (27, ord("q")) and cv2.getWindowProperty(window, cv2.WND_PROP_VISIBLE) >= 1
