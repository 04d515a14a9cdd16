"""The WS operation and the convolution built on it; knows torch and `detectron2.layers` only."""

from .group_norm import GroupNorm, split_group_norm, use_group_norm
from .standardize import (
    WS_MODES,
    affine_of,
    check_ws_arguments,
    standardize_weight,
    standardize_weights,
)
from .ws_conv import (
    DEFAULT_WS_EPS,
    DEFAULT_WS_MODE,
    WSConv2d,
    standardize_alone,
    standardize_together,
)

__all__ = [
    "DEFAULT_WS_EPS",
    "DEFAULT_WS_MODE",
    "GroupNorm",
    "WSConv2d",
    "WS_MODES",
    "affine_of",
    "check_ws_arguments",
    "split_group_norm",
    "standardize_alone",
    "standardize_together",
    "standardize_weight",
    "standardize_weights",
    "use_group_norm",
]
