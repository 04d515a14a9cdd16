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
    """Locks a file; a killed process holds nothing.

    Args:
        path: of the lock, an empty file; made where there is none, with its folders.
        busy: what to tell the user where another process holds it; None: wait for it.

    Yields:
        The open file. A process that inherits it keeps the lock until it ends, too. Where the file
        system has no locks, as some network file systems, it is not locked, and a warning says so.

    Raises:
        AlreadyLocked: with `busy` as its message.
        WriteError: the file cannot be made.
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
                "%s cannot be locked (%s): nothing stops a second process from working there",
                path,
                error,
            )
        yield file
