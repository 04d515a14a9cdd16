"""WS box and mask heads: detectron2's own heads, then one conversion pass."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    MaskRCNNConvUpsampleHead,
)
from torch import nn

from .group_norm import Norm, group_norm_to_fill_in, set_group_count
from .parts import check_norm, standardize_part
from .settings import WSSettings


@ROI_BOX_HEAD_REGISTRY.register()
class WSFastRCNNConvFCHead(FastRCNNConvFCHead):
    """detectron2's `FastRCNNConvFCHead` with WS convs; its fully connected layers stay plain.

    Args:
        input_shape: shape of the pooled features (C, H, W).
        ws: which parts are standardized, and how.
        conv_norm: norm behind each conv, a name or a function of the channel count.
        kwargs: the other arguments of `FastRCNNConvFCHead`.

    Raises:
        ConfigError: the head has no conv with a norm layer behind it, or the group count does not
            divide its channels.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, ws: WSSettings, conv_norm: Norm = "", **kwargs: Any
    ) -> None:
        super().__init__(input_shape, conv_norm=group_norm_to_fill_in(conv_norm), **kwargs)
        _finish(self, ws, ws.box_head, "box_head")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments, read from MODEL.ROI_BOX_HEAD and MODEL.WS."""
        return {**super().from_config(cfg, input_shape), "ws": _settings(cfg, "ROI_BOX_HEAD")}


@ROI_MASK_HEAD_REGISTRY.register()
class WSMaskRCNNConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """detectron2's `MaskRCNNConvUpsampleHead` with WS convs; deconvolution and logits stay plain.

    Args:
        input_shape: shape of the pooled features (C, H, W).
        ws: which parts are standardized, and how.
        conv_norm: norm behind each conv, a name or a function of the channel count.
        kwargs: the other arguments of `MaskRCNNConvUpsampleHead`.

    Raises:
        ConfigError: the head has no conv with a norm layer behind it, or the group count does not
            divide its channels.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, ws: WSSettings, conv_norm: Norm = "", **kwargs: Any
    ) -> None:
        super().__init__(input_shape, conv_norm=group_norm_to_fill_in(conv_norm), **kwargs)
        _finish(self, ws, ws.mask_head, "mask_head")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments, read from MODEL.ROI_MASK_HEAD and MODEL.WS."""
        return {**super().from_config(cfg, input_shape), "ws": _settings(cfg, "ROI_MASK_HEAD")}


def _finish(head: nn.Module, ws: WSSettings, standardized: bool, name: str) -> None:
    """Group counts and WS, on a head that detectron2 has built."""
    part = f"roi_heads.{name}"
    set_group_count(head, ws.gn_groups, part)
    if standardized:
        norm_key = f"MODEL.ROI_{name.upper()}.NORM and .NUM_CONV"
        standardize_part(head, ws, part=part, norm_key=norm_key)


def _settings(cfg: CfgNode, node: str) -> WSSettings:
    check_norm(f"MODEL.{node}.NORM", cfg.MODEL[node].NORM)
    return WSSettings.from_config(cfg)
