"""Norm layers by name: those of this package, in addition to detectron2's."""

from collections.abc import Callable
from typing import Union

from detectron2.layers import get_norm as build_stock_norm
from torch import nn

from ws_detectron.config import WSSettings
from ws_detectron.errors import ConfigError
from ws_detectron.layers import GroupNorm

Norm = Union[str, Callable[[int], nn.Module]]
"""What detectron2's layers accept as `norm`: a name, or a function of the channel count."""


def group_norm(channels: int, ws: WSSettings) -> nn.Module:
    """Group Normalization (arXiv:1803.08494) with MODEL.WS.GN_GROUPS groups, 32 in detectron2.

    Raises:
        ConfigError: the number of groups does not divide `channels`.
    """
    if channels % ws.gn_groups:
        raise ConfigError(f"MODEL.WS.GN_GROUPS is {ws.gn_groups}; allowed: a divisor of {channels}")
    return GroupNorm(ws.gn_groups, channels)


NORMS: dict[str, Callable[[int, WSSettings], nn.Module]] = {"GN": group_norm}
"""Name in a config -> function of (channels, settings). A new norm is one function and one row.
The function raises `ValueError` for channel counts that it cannot normalize."""


def get_norm(norm: Norm, ws: WSSettings) -> Norm:
    """The `norm` argument for detectron2's builders.

    Where a norm layer cannot be built, the returned function builds a placeholder instead, which
    `check_norm_layers` refuses later. Raising at once would be wrong: the function does not know
    which layer the norm is for, and detectron2's RetinaNet head (0.6, main) builds one for 1 or 32
    channels only to look at its type.

    Args:
        norm: a name, or a function of the channel count.
        ws: passed to the function in `NORMS`.

    Returns:
        A function of the channel count for the names in `NORMS`, otherwise `norm` itself.
    """
    if not isinstance(norm, str) or norm not in NORMS:
        return norm
    build_norm = NORMS[norm]

    def build(channels: int) -> nn.Module:
        try:
            return build_norm(channels, ws)
        except ValueError as error:
            return _Unbuildable(channels, error)

    return build


def check_norm(key: str, norm: str) -> None:
    """Raises ConfigError if `norm` is neither in `NORMS` nor a name that detectron2 knows."""
    if norm not in NORMS and not is_stock_norm(norm):
        names = ", ".join(f'"{name}"' for name in ("", "BN", "SyncBN", "FrozenBN", *NORMS))
        raise ConfigError(
            f"{key} is {norm!r}; allowed: {names} and other names that detectron2.layers.get_norm "
            "of the installed version accepts"
        )


def is_stock_norm(norm: str) -> bool:
    """Whether the installed detectron2 knows a norm of this name."""
    try:
        build_stock_norm(norm, 32)
    except KeyError:
        return False
    return True


def check_norm_layers(module: nn.Module, part: str) -> None:
    """Raises ConfigError for the first norm layer of `module` that could not be built.

    Args:
        module: built with `get_norm`.
        part: name of `module` in the model, for the message.
    """
    for name, norm in module.named_modules():
        if isinstance(norm, _Unbuildable):
            raise ConfigError(
                f"{norm.error}, for the {norm.channels} channels of {part}.{name}"
            ) from norm.error


class _Unbuildable(nn.Module):
    def __init__(self, channels: int, error: ValueError) -> None:
        super().__init__()
        self.channels, self.error = channels, error
