"""WS backbones: detectron2's own ResNet and FPN builders, then one conversion pass."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from torch import nn

from ws_detectron.errors import ConfigError

from .group_norm import set_group_count, with_group_norm_to_fill_in
from .parts import check_norm, standardize_part
from .settings import WSSettings

_DEPTHS = (18, 34, 50, 101, 152)


@BACKBONE_REGISTRY.register()
def build_ws_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `build_resnet_backbone` with WS convs.

    Every MODEL.RESNETS and MODEL.BACKBONE key that detectron2 accepts works as it does there,
    but for deformable stages.

    Args:
        cfg: reads MODEL.WS besides the keys of the detectron2 builder.
        input_shape: shape of the input; its `channels` is the number of image channels.

    Raises:
        ConfigError: a key has a value that cannot work; names the key.
    """
    ws = WSSettings.from_config(cfg)
    resnet = _build(cfg, input_shape, build_resnet_backbone, ws)
    if ws.backbone:
        standardize_part(resnet, ws, part="backbone", norm_key="MODEL.RESNETS.NORM")
    return resnet


@BACKBONE_REGISTRY.register()
def build_ws_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `build_resnet_fpn_backbone` with WS convs; see `build_ws_resnet_backbone`."""
    return _build_ws_fpn(cfg, input_shape, build_resnet_fpn_backbone)


@BACKBONE_REGISTRY.register()
def build_ws_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `build_retinanet_resnet_fpn_backbone` with WS convs.

    The convs of the levels P6 and P7 have no norm layer and stay plain. See
    `build_ws_resnet_backbone`.
    """
    return _build_ws_fpn(cfg, input_shape, build_retinanet_resnet_fpn_backbone)


def _build_ws_fpn(
    cfg: CfgNode,
    input_shape: ShapeSpec,
    build_stock: Callable[[CfgNode, ShapeSpec], Backbone],
) -> Backbone:
    ws = WSSettings.from_config(cfg)
    backbone = _build(cfg, input_shape, build_stock, ws)
    if ws.backbone:
        part = "backbone.bottom_up"
        standardize_part(backbone.bottom_up, ws, part=part, norm_key="MODEL.RESNETS.NORM")
    if ws.fpn:
        own = nn.ModuleDict(
            {name: child for name, child in backbone.named_children() if name != "bottom_up"}
        )
        standardize_part(own, ws, part="backbone", norm_key="MODEL.FPN.NORM")
    return backbone


def _build(
    cfg: CfgNode,
    input_shape: ShapeSpec,
    build_stock: Callable[[CfgNode, ShapeSpec], Backbone],
    ws: WSSettings,
) -> Backbone:
    _check_resnet_keys(cfg)
    backbone = build_stock(with_group_norm_to_fill_in(cfg), input_shape)
    set_group_count(backbone, ws.gn_groups, "backbone")
    return backbone


def _check_resnet_keys(cfg: CfgNode) -> None:
    """Names the key where detectron2 would end with a bare KeyError or ignore the request."""
    resnets = cfg.MODEL.RESNETS
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(resnets.DEFORM_ON_PER_STAGE)}, but "
            "deformable convolutions cannot be standardized; allowed: all False"
        )
    if resnets.DEPTH not in _DEPTHS:
        raise ConfigError(f"MODEL.RESNETS.DEPTH must be one of {_DEPTHS}; got {resnets.DEPTH}")
    for key, norm in (("MODEL.RESNETS.NORM", resnets.NORM), ("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM)):
        check_norm(key, norm)
