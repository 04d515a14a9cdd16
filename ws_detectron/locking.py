"""Keeps two processes from working on the same files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import portalocker

from ws_detectron.errors import UserError


class AlreadyLocked(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, busy: str) -> Iterator[IO[Any]]:
    """Locks a file, without waiting for it; a killed process holds nothing.

    Args:
        path: of the lock, an empty file; made where there is none, with its folders.
        busy: what to tell the user where another process holds it.

    Yields:
        The open file. A process that inherits it keeps the lock until it ends, too.

    Raises:
        AlreadyLocked: with `busy` as its message.
        UserError: the file cannot be locked, as on some network file systems.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
        except portalocker.AlreadyLocked as error:
            raise AlreadyLocked(busy) from error
        except portalocker.LockException as error:
            raise UserError(f"cannot lock {path}: {error}") from error
        yield file
