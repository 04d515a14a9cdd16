"""Keeps two processes from working on the same files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Optional

import portalocker

from ws_detectron.errors import UserError, write_error

logger = logging.getLogger(__name__)


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
