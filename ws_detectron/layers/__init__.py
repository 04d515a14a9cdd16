"""The WS operation and the convolution built on it; knows torch and `detectron2.layers` only."""

from .group_norm import GroupNorm, split_group_norm, use_group_norm
from .launch_group import LaunchGroup
from .reuse import standardize_once_per_forward
from .standardize import WS_MODES, check_ws_arguments, standardize_weight
from .ws_conv import DEFAULT_WS_EPS, DEFAULT_WS_MODE, WSConv2d

__all__ = [
    "DEFAULT_WS_EPS",
    "DEFAULT_WS_MODE",
    "GroupNorm",
    "LaunchGroup",
    "WSConv2d",
    "WS_MODES",
    "check_ws_arguments",
    "split_group_norm",
    "standardize_once_per_forward",
    "standardize_weight",
    "use_group_norm",
]
