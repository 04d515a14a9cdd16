"""File output: atomic (a reader sees the old file or the new one), and never over an input."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Optional, Union

from ws_detectron.errors import UserError, find_disk_error, write_error


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
            # long names would exceed what file systems allow
            mode,
            encoding=encoding,
            dir=path.parent,
            prefix=f".{path.name[:40]}.",
            delete=False,
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


def refuse_overwrite(
    outputs: Union[str, Path, Iterable[Union[str, Path]]],
    inputs: Iterable[Union[str, Path, None]],
) -> None:
    """Nothing is written over what is read, under whatever name or link it goes.

    Args:
        outputs: the file, or files, that will be written.
        inputs: files that are read; what is no file of this machine is ignored.

    Raises:
        UserError: an output is an input; names both.
    """
    read = {_identity(path): path for path in inputs if path}
    read.pop(None, None)
    for output in [outputs] if isinstance(outputs, (str, Path)) else outputs:
        if _identity(output) in read:
            source = read[_identity(output)]
            name = "" if str(source) == str(output) else f" ({source})"
            raise UserError(
                f"{output} is an input{name}, which the output would overwrite; choose "
                "another output"
            )


def _identity(path: Union[str, Path]) -> Optional[tuple[int, int]]:
    """What all names of an existing file have in common; links are followed."""
    try:
        # realpath: `new/../a` is `a`, which it will be once the folder `new` is made
        status = os.stat(os.path.realpath(path))
    except (OSError, ValueError):  # ValueError: no file has a NUL in its name
        return None
    return status.st_dev, status.st_ino


def check_folder(path: Union[str, Path]) -> None:
    """Files can be written into a folder, which need not be there; nothing is made.

    Raises:
        UserError: it cannot be made or written into; names it and the reason.
    """
    folder = Path(path).absolute()
    existing = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise UserError(
            f"cannot write into {path}: {existing} is not a folder; choose another output"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write into {path}: no permission to write to {existing}; choose another output"
        )


@contextmanager
def writing(path: Union[str, Path]) -> Iterator[None]:
    """A body whose only use of the file system is to write to `path`, or into it.

    Raises:
        WriteError: the system refused; names `path` and the reason.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


def write_text(path: Union[str, Path], text: str) -> None:
    """Writes a whole UTF-8 file, atomically."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(
    path: Union[str, Path], content: Any, *, indent: Optional[int] = 1, allow_nan: bool = True
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
