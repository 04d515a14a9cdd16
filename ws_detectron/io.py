"""Atomic file output: a reader sees the old file or the new one, never a half-written one."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Union

from ws_detectron.errors import find_disk_error, write_error


@contextmanager
def atomic_write(path: Union[str, Path], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and moves it there when the body ends well.

    The temporary file lies in the same folder because `os.replace` is atomic only within one file
    system. When the body raises, `path` is left as it was. Missing parent folders are made.

    Args:
        path: the file to write.
        mode: `"w"` for UTF-8 text, `"wb"` for bytes.

    Raises:
        ValueError: `mode` is neither of the two.
        WriteError: the file cannot be made, or the disk is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    path = Path(path)
    encoding = None if mode == "wb" else "utf-8"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = tempfile.NamedTemporaryFile(
            mode, encoding=encoding, dir=path.parent, prefix=f".{path.name}.", delete=False
        )
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with handle:
            # NamedTemporaryFile makes files private to the user; give them the usual permissions.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(handle.name, 0o666 & ~umask)
            yield handle
        os.replace(handle.name, path)
    except BaseException as error:
        Path(handle.name).unlink(missing_ok=True)
        found = find_disk_error(error)
        if found is not None:
            raise write_error(found, path) from error
        raise


def write_text(path: Union[str, Path], text: str) -> None:
    """Writes a whole UTF-8 file, atomically."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(
    path: Union[str, Path], content: Any, *, indent: int = 1, allow_nan: bool = True
) -> None:
    """Writes JSON with a line feed at its end, atomically.

    Raises:
        ValueError: a value is NaN or infinite, and `allow_nan` is not set.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=allow_nan) + "\n")


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV, with the line ends that `git` and Unix tools expect."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
