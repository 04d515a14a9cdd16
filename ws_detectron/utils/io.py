"""Writes files atomically (a reader sees the old file or the new one), never over an input, and
by one process at a time."""

import csv
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Optional, Union

import portalocker

from ws_detectron.errors import UserError, find_disk_error, write_error

logger = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Union[str, Path], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file and moves it to `path` when the body succeeds.

    The temporary file is in the same folder, because `os.replace` is atomic only within one file
    system. If the body raises, `path` stays unchanged. Missing parent folders are created.

    Args:
        path: the file to write.
        mode: `"w"` for UTF-8 text, `"wb"` for bytes.

    Raises:
        ValueError: `mode` is neither of the two.
        WriteError: the file cannot be created, or the disk is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    path = Path(path)
    encoding = None if mode == "wb" else "utf-8"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = tempfile.NamedTemporaryFile(
            mode,
            encoding=encoding,
            dir=path.parent,
            prefix=f".{path.name[:40]}.",  # file systems limit the length of names
            delete=False,
        )
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with handle:
            # NamedTemporaryFile creates files for the user only; set the usual permissions.
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
    """Refuses outputs that would overwrite an input, also through links.

    Args:
        outputs: the file or files to be written.
        inputs: files that are read; paths that do not exist here are ignored.

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
    """Device and inode of an existing file, following links."""
    try:
        # realpath resolves `new/../a` even if the folder `new` does not exist yet
        status = os.stat(os.path.realpath(path))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return status.st_dev, status.st_ino


def check_folder(path: Union[str, Path]) -> None:
    """Checks that files can be written into a folder, which need not exist; creates nothing.

    Raises:
        UserError: it cannot be created or written to; gives the reason.
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
    """Turns OSErrors of the body, which writes to the file or folder `path`, into a `WriteError`.

    Raises:
        WriteError: the body raised an OSError; names `path` and the reason.
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


def write_json(path: Union[str, Path], content: Any, *, indent: Optional[int] = 1) -> None:
    """Writes JSON with a final line feed, atomically."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV with Unix line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class AlreadyLocked(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, busy: Optional[str]) -> Iterator[IO[Any]]:
    """Locks a file; the lock ends with the process, also if it is killed.

    Args:
        path: of the lock file, which is empty; it and its folders are created if missing.
        busy: message if another process holds the lock; None: wait for it.

    Yields:
        The open file. A child process that inherits it also holds the lock. On a file system
        without locks, as some network file systems, a warning is logged and nothing is locked.

    Raises:
        AlreadyLocked: with `busy` as its message.
        WriteError: the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise write_error(error, path) from error
    with file:
        try:
            portalocker.lock(
                file, portalocker.LOCK_EX | (portalocker.LOCK_NB if busy is not None else 0)
            )
        except portalocker.AlreadyLocked as error:
            raise AlreadyLocked(busy or str(path)) from error
        except portalocker.LockException as error:
            logger.warning(
                "%s cannot be locked (%s): a second process could write to the same files",
                path,
                error,
            )
        yield file
