"""Where the package keeps what it makes or downloads."""

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "WS_DETECTRON_CACHE"


def cache_root() -> Path:
    """`$WS_DETECTRON_CACHE`, else `$XDG_CACHE_HOME/ws_detectron`, else `~/.cache/ws_detectron`.

    A variable that is set but empty counts as unset (XDG Base Directory Specification). A user
    without a home folder that can be written to, as in some containers, gets a folder among the
    temporary files.
    """
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(os.path.expanduser(own)).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        return (Path(os.path.expanduser(xdg)) / "ws_detectron").absolute()
    try:
        cache = Path.home() / ".cache" / "ws_detectron"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "ws_detectron"
    there = next(path for path in (cache, *cache.parents) if path.exists())
    if there != cache and not os.access(there, os.W_OK):
        return Path(tempfile.gettempdir()) / "ws_detectron"
    return cache
