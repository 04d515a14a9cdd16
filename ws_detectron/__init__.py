"""Weight Standardization and Group Normalization for Detectron2.

Importing this package registers its backbones, ROI heads and scenes with detectron2.
"""

import sys

__version__ = "0.1.0"

try:
    from .checkpoint import register_weight_names
    from .config import add_ws_config
    from .data import register_builtin_scenes
    from .layers import WSConv2d, standardize_once_per_forward, standardize_weight
    from .modeling import convert_to_ws, fold_ws

    register_builtin_scenes()
    register_weight_names()
except Exception:
    # `python -m ws_detectron.doctor` imports this file too, and must be able to say what is
    # missing or broken. While Python looks for the module to run, argv[0] is "-m".
    if sys.argv[:1] != ["-m"]:
        raise

__all__ = [
    "WSConv2d",
    "add_ws_config",
    "convert_to_ws",
    "fold_ws",
    "standardize_once_per_forward",
    "standardize_weight",
]
