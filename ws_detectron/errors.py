"""The exception whose message is meant for the person at the keyboard."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend.

    Its message stands alone: it names the config key or file, what was found there and what is
    allowed. The command-line tools print it without a traceback and end with `exit_status`.
    """

    exit_status = 2  # argparse's own for a wrong command line


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


def printable(text: object, keep: str = "") -> str:
    """The text with control characters as escapes, such as `\\x1b`, so that a terminal is safe.

    Args:
        text: such as a file name; what is not a string is converted to one.
        keep: control characters that stay.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with one message and a status when the body raises a `UserError`."""
    try:
        yield
    except UserError as error:
        message = printable(error, keep="\n")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_status)
