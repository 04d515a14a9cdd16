"""Exceptions with one clear message for the user, and how tools and libraries turn into them."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional


def shown(text: object, limit: Optional[int] = None) -> str:
    """Text from a file, safe to print: control characters could do anything to a terminal.

    Args:
        text: converted to a string; all but printable characters and line feeds are escaped. Pass
            `repr(value)` for a value whose type matters to the reader.
        limit: maximum number of characters to show; None for no limit.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text)} characters)"
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class UserError(Exception):
    """A mistake that the user can fix.

    The message is complete: it names the config key or file, what was found there and what is
    allowed. The command-line tools print it without a traceback and exit with `exit_status`.
    Control characters in it are escaped, see `shown`.
    """

    exit_status = 2  # as argparse for a wrong command line

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(UserError, ValueError):
    """A config key has a value that is not allowed.

    Also a `ValueError`, for callers that do not know this package.
    """


class DivergedError(UserError):
    """The loss of a training became infinite or NaN; running it again would not help."""

    exit_status = 3


class DataError(UserError):
    """An image or annotation cannot be read; names the file."""

    def __str__(self) -> str:
        # A data-loading worker passes its error on as text, after the traceback.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class WeightsError(UserError):
    """A weight file cannot be read, is refused, or does not fit the model."""


class WriteError(UserError, OSError):
    """A file cannot be written, for example on a full disk or in a read-only folder."""

    def __str__(self) -> str:
        return str(self.args[0])  # without the errno that OSError prepends


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def find_user_error(error: BaseException) -> Optional[UserError]:
    """The user error that explains an exception, or None.

    It is the exception itself, or a full or read-only disk among its causes: torch raises a
    `RuntimeError` on a full disk, and hooks that write at the end of a training raise further
    errors after the first.
    """
    if isinstance(error, UserError):
        return error
    found = find_disk_error(error)
    if found is None or isinstance(found, WriteError):
        return found
    return write_error(found, found.filename)


def find_disk_error(error: Optional[BaseException]) -> Optional[OSError]:
    """The error of a full or read-only disk among an exception and its causes, or None."""
    while error is not None:
        if isinstance(error, WriteError):
            return error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            return error
        error = error.__cause__ or error.__context__
    return None


def write_error(error: OSError, path: object) -> WriteError:
    """Converts the system's error on writing `path`, empty if unknown, into a `WriteError`."""
    if isinstance(error, WriteError):
        return error
    reason = error.strerror or str(error)
    if error.errno not in _NOT_WRITABLE:
        message = f"cannot write {path}: {reason}"
    else:
        message = f"{reason.lower()} while writing {path}" if path else reason.lower()
    known = WriteError(message)
    known.errno, known.strerror = error.errno, error.strerror
    return known


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exits with one message and a status when the body raises a `UserError`.

    A full or read-only disk counts as one, whichever library reports it.
    """
    try:
        yield
    except Exception as error:
        known = find_user_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        sys.exit(known.exit_status)


def list_some(items: list[str], limit: int = 6) -> str:
    """For a message: the first `limit` items, each shortened, and the number of the others."""
    rest = len(items) - limit
    first = ", ".join(shown(item, 100) for item in items[:limit])
    return first + (f" and {rest} more" if rest > 0 else "")
