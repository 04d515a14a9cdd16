"""WS heads: detectron2's own, then one conversion pass."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import nn

from ws_detectron.config import WSSettings
from ws_detectron.utils.compat import with_norms

from .norm import Norm, check_norm, get_norm
from .parts import finish_part


@ROI_BOX_HEAD_REGISTRY.register()
class WSFastRCNNConvFCHead(FastRCNNConvFCHead):
    """detectron2's `FastRCNNConvFCHead` with WS convs; its fully connected layers stay plain.

    Args:
        input_shape: shape of the pooled features (C, H, W).
        ws: which parts are standardized, and how.
        conv_norm: norm after each conv, a name or a function of the channel count.
        kwargs: the other arguments of `FastRCNNConvFCHead`.

    Raises:
        ConfigError: the head has no conv followed by a norm layer, or the group count does not
            divide its channels.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, ws: WSSettings, conv_norm: Norm = "", **kwargs: Any
    ) -> None:
        super().__init__(input_shape, conv_norm=get_norm(conv_norm, ws), **kwargs)
        norm_key = "MODEL.ROI_BOX_HEAD.NORM and .NUM_CONV"
        finish_part(self, ws, switch="BOX_HEAD", part="roi_heads.box_head", norm_key=norm_key)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments, read from MODEL.ROI_BOX_HEAD and MODEL.WS."""
        return {**super().from_config(cfg, input_shape), "ws": _settings(cfg, "ROI_BOX_HEAD")}


@ROI_MASK_HEAD_REGISTRY.register()
class WSMaskRCNNConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """detectron2's `MaskRCNNConvUpsampleHead` with WS convs; deconvolution and logits stay plain.

    Args, Raises:
        as for `WSFastRCNNConvFCHead`.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, ws: WSSettings, conv_norm: Norm = "", **kwargs: Any
    ) -> None:
        super().__init__(input_shape, conv_norm=get_norm(conv_norm, ws), **kwargs)
        norm_key = "MODEL.ROI_MASK_HEAD.NORM and .NUM_CONV"
        finish_part(self, ws, switch="MASK_HEAD", part="roi_heads.mask_head", norm_key=norm_key)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments, read from MODEL.ROI_MASK_HEAD and MODEL.WS."""
        return {**super().from_config(cfg, input_shape), "ws": _settings(cfg, "ROI_MASK_HEAD")}


@SEM_SEG_HEADS_REGISTRY.register()
class WSSemSegFPNHead(SemSegFPNHead):
    """detectron2's `SemSegFPNHead` (Panoptic FPN) with WS convs; its predictor stays plain.

    Args:
        input_shape: name -> shape (C, stride) of the FPN features.
        ws: which parts are standardized, and how.
        norm: norm after each conv, a name or a function of the channel count.
        kwargs: the other arguments of `SemSegFPNHead`.

    Raises:
        ConfigError: see `WSFastRCNNConvFCHead`.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        ws: WSSettings,
        norm: Norm = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, norm=get_norm(norm, ws), **kwargs)
        norm_key = "MODEL.SEM_SEG_HEAD.NORM"
        finish_part(self, ws, switch="SEM_SEG_HEAD", part="sem_seg_head", norm_key=norm_key)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments, read from MODEL.SEM_SEG_HEAD and MODEL.WS."""
        return {**super().from_config(cfg, input_shape), "ws": _settings(cfg, "SEM_SEG_HEAD")}


@META_ARCH_REGISTRY.register()
class WSRetinaNet(RetinaNet):
    """detectron2's `RetinaNet` with WS convs in the towers of its head; its predictors stay plain.

    This is a meta-architecture, because detectron2 has no registry for RetinaNet's heads.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments, read from MODEL.RETINANET, MODEL.WS and the backbone's keys.

        Raises:
            ConfigError: MODEL.RETINANET.NORM is none or unknown, or the group count does not divide
                the channels of the towers.
        """
        ws, norm_key = _settings(cfg, "RETINANET"), "MODEL.RETINANET.NORM"
        norm = get_norm(cfg.MODEL.RETINANET.NORM, ws)
        args = super().from_config(with_norms(cfg, {norm_key: norm}))
        head = args["head"]
        convs = _convs_before_norms(head) if ws.retinanet_head else []
        for conv, layer in convs:
            # convert_to_ws recognizes detectron2's Conv2d with a norm of its own
            conv.__class__ = Conv2d
            conv.__dict__.update(norm=layer, activation=None)
        finish_part(head, ws, switch="RETINANET_HEAD", part="head", norm_key=norm_key)
        for conv, _ in convs:
            conv.__dict__.update(norm=None)  # the tower applies it
        return args


def _convs_before_norms(head: RetinaNetHead) -> list[tuple[nn.Module, nn.Module]]:
    """The convs of both towers, each with the layer between it and its ReLU."""
    towers = [list(head.cls_subnet), list(head.bbox_subnet)]
    pairs = [pair for tower in towers for pair in zip(tower, tower[1:])]
    return [(a, b) for a, b in pairs if type(a) is nn.Conv2d and not isinstance(b, nn.ReLU)]


def _settings(cfg: CfgNode, node: str) -> WSSettings:
    check_norm(f"MODEL.{node}.NORM", cfg.MODEL[node].NORM)
    return WSSettings.from_config(cfg)
