"""The exception whose message is meant for the person at the keyboard."""

import errno
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 5
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(text: object, limit: Optional[int] = None) -> str:
    """Text of a file as it can be shown: on a terminal, control characters could do anything.

    Args:
        text: is turned into a string; all but printable characters and line feeds are escaped.
        limit: of characters; None for none.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text)} characters)"
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class UserError(Exception):
    """A mistake that the user can fix.

    Its message stands alone: it names the config key or file, what was found there and what is
    allowed. The command-line tools print it without a traceback and end with `exit_status`. Text
    from files in it is escaped, see `shown`.
    """

    exit_status = 2  # argparse's own for a wrong command line

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(UserError, ValueError):
    """A config key whose value cannot work.

    Also a `ValueError`, which is what callers that know nothing of this package expect.
    """


class DivergedError(UserError):
    """A training whose loss became infinite or NaN, as it would again on any machine."""

    exit_status = 3


class DataError(UserError):
    """An image or annotation that cannot be read; names the file."""

    def __str__(self) -> str:
        # A data-loading worker hands its error over as text with the traceback before it.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def brief(value: Any) -> str:
    """A value that comes from a file, for a message: escaped and shortened."""
    return _SHORT.repr(value)


class WriteError(UserError, OSError):
    """A file that cannot be written, as on a full disk or in a read-only folder."""

    def __str__(self) -> str:
        return str(self.args[0])  # an OSError shows its number


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def find_user_error(error: BaseException) -> Optional[UserError]:
    """The user error behind an exception, if there is one.

    That is the exception itself, or a full or read-only disk in what led to it: torch raises a
    `RuntimeError` where its file takes no more bytes, and hooks that write at the end of a training
    raise errors of their own after the first.
    """
    if isinstance(error, UserError):
        return error
    found = find_disk_error(error)
    if found is None or isinstance(found, WriteError):
        return found
    return write_error(found, found.filename)


def find_disk_error(error: Optional[BaseException]) -> Optional[OSError]:
    """A full or read-only disk in an exception or in what led to it."""
    while error is not None:
        if isinstance(error, WriteError):
            return error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            return error
        error = error.__cause__ or error.__context__
    return None


def write_error(error: OSError, path: object) -> WriteError:
    """The error of a file that cannot be written, from that of the system."""
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
    """Ends the process with one message and a status when the body raises a `UserError`.

    A full or read-only disk is one, whatever the library that meets it.
    """
    try:
        yield
    except Exception as error:
        known = find_user_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        sys.exit(known.exit_status)


class WeightsError(UserError):
    """A weight file that cannot be read, is not allowed, or does not fit.

    The message names the file, what was found in it and what would be right.
    """


def list_some(items: list[str], limit: int = 6) -> str:
    """Joins the first `limit` items, cut to a line, for a message and counts the rest."""
    rest = len(items) - limit
    first = ", ".join(shown(item, 100) for item in items[:limit])
    return first + (f" and {rest} more" if rest > 0 else "")
