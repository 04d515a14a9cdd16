"""GroupNorm with a group count from the config, which detectron2 fixes at 32."""

from collections.abc import Callable
from typing import Union

from detectron2.config import CfgNode
from torch import nn

from ws_detectron.errors import ConfigError
from ws_detectron.layers import GroupNorm

Norm = Union[str, Callable[[int], nn.Module]]
"""What detectron2's layers take as `norm`: a name, or a function of the channel count."""


def group_norm_to_fill_in(norm: Norm) -> Norm:
    """Replaces the norm name "GN" by a layer factory whose group count is set later.

    One group divides every channel count, so building never fails; `set_group_count` then sets
    the real count where the layer's name is known and an error can say it.
    """
    return _one_group if norm == "GN" else norm


def with_group_norm_to_fill_in(cfg: CfgNode) -> CfgNode:
    """A copy of `cfg` with `group_norm_to_fill_in` applied to the norms of ResNet and FPN.

    detectron2's builders hand these two keys to layers that accept a function as well as a name,
    but a config node refuses functions as attributes; items are not checked.
    """
    cfg = cfg.clone()
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN):
        node["NORM"] = group_norm_to_fill_in(node.NORM)
    return cfg


def set_group_count(module: nn.Module, groups: int, prefix: str) -> None:
    """Sets the number of groups of every `nn.GroupNorm` in `module` that a factory left open.

    Args:
        module: built with `group_norm_to_fill_in`.
        groups: number of groups G.
        prefix: where `module` sits in the model, for the error message.

    Raises:
        ConfigError: G does not divide the channels of a layer; names layer, channels and groups.
    """
    for name, norm in module.named_modules():
        if not isinstance(norm, _GroupNormToFillIn):
            continue
        if norm.num_channels % groups:
            raise ConfigError(
                f"MODEL.WS.GN_GROUPS is {groups}, which does not divide the "
                f"{norm.num_channels} channels of {prefix}.{name}; allowed: a divisor of "
                f"{norm.num_channels}"
            )
        norm.num_groups = groups
        norm.__class__ = GroupNorm  # type: ignore[assignment]


class _GroupNormToFillIn(nn.GroupNorm):
    """Marks the layers whose group count is still open."""


def _one_group(channels: int) -> nn.Module:
    return _GroupNormToFillIn(1, channels)
