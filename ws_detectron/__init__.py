"""Weight Standardization and Group Normalization for Detectron2.

Importing this package registers its backbones and heads with detectron2.
"""

import os
import sys

__version__ = "0.1.0"

if not os.environ.get("HOME", "unset"):
    # An empty one would put the caches of torch, iopath and matplotlib into the root folder.
    # Without it they ask the system where the user's home is.
    del os.environ["HOME"]

_backend = os.environ.get("MPLBACKEND")
if _backend and "matplotlib" not in sys.modules:
    # What a notebook starts inherits the name of a backend that may exist in its kernel alone;
    # matplotlib cannot be imported with it then. Nothing here opens a window.
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import matplotlib

        matplotlib.rcParams["backend"] = _backend
        os.environ["MPLBACKEND"] = _backend
    except Exception:  # there is no such backend, or matplotlib is missing: what draws says so
        pass

from .checkpoint import register_weight_names
from .config import add_ws_config, name_forgotten_call
from .layers import WSConv2d, standardize_together, standardize_weight
from .modeling import convert_to_ws, fold_ws, with_ws
from .utils.compat import extend_key_errors

register_weight_names()
extend_key_errors(name_forgotten_call)

__all__ = [
    "WSConv2d",
    "add_ws_config",
    "convert_to_ws",
    "fold_ws",
    "standardize_together",
    "standardize_weight",
    "with_ws",
]
