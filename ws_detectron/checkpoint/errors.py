"""The exception of everything that is wrong with a weight file."""

from ws_detectron.errors import UserError, shown


class WeightsError(UserError):
    """A weight file that cannot be read, is not allowed, or does not fit.

    The message names the file, what was found in it and what would be right.
    """


def list_some(items: list[str], limit: int = 6) -> str:
    """Joins the first `limit` items, cut to a line, for a message and counts the rest."""
    rest = len(items) - limit
    first = ", ".join(shown(item, 100) for item in items[:limit])
    return first + (f" and {rest} more" if rest > 0 else "")
