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

from ws_detectron.config import WSSettings
from ws_detectron.errors import ConfigError
from ws_detectron.layers import standardize_alone, standardize_together
from ws_detectron.utils.compat import with_norms

from .norm import check_norm, get_norm
from .parts import finish_part

_DEPTHS = (18, 34, 50, 101, 152)


@BACKBONE_REGISTRY.register()
def build_ws_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `build_resnet_backbone` with WS convs.

    All MODEL.RESNETS and MODEL.BACKBONE keys work as in detectron2, except for deformable stages.

    Args:
        cfg: MODEL.WS is read in addition to the keys of the detectron2 builder.
        input_shape: its `channels` is the number of image channels.

    Raises:
        ConfigError: a key has a value that is not allowed; names the key.
    """
    ws = WSSettings.from_config(cfg)
    resnet = _build_stock(cfg, input_shape, build_resnet_backbone, ws)
    _finish_resnet(resnet, ws, "backbone")
    return resnet


@BACKBONE_REGISTRY.register()
def build_ws_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `build_resnet_fpn_backbone` with WS convs; see `build_ws_resnet_backbone`."""
    return _build_ws_fpn(cfg, input_shape, build_resnet_fpn_backbone)


@BACKBONE_REGISTRY.register()
def build_ws_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `build_retinanet_resnet_fpn_backbone` with WS convs.

    The convs of P6 and P7 have no norm layer and stay plain. See `build_ws_resnet_backbone`.
    """
    return _build_ws_fpn(cfg, input_shape, build_retinanet_resnet_fpn_backbone)


def _build_ws_fpn(
    cfg: CfgNode,
    input_shape: ShapeSpec,
    build_stock: Callable[[CfgNode, ShapeSpec], Backbone],
) -> Backbone:
    ws = WSSettings.from_config(cfg)
    backbone = _build_stock(cfg, input_shape, build_stock, ws)
    _finish_resnet(backbone.bottom_up, ws, "backbone.bottom_up")
    finish_fpn(backbone, ws)
    return backbone


def finish_fpn(backbone: Backbone, ws: WSSettings) -> None:
    """Checks the norms of a built `FPN`, converts its convs and joins them with its `bottom_up`.

    Args:
        backbone: built with norms from `get_norm`; its `bottom_up` is finished.
        ws: which parts are standardized, and how.

    Raises:
        ConfigError: see `finish_part`.
    """
    fpn = nn.ModuleDict(
        {name: child for name, child in backbone.named_children() if name != "bottom_up"}
    )
    finish_part(fpn, ws, switch="FPN", part="backbone", norm_key="MODEL.FPN.NORM")
    if ws.backbone or ws.fpn:  # one part, so that all filters share launches
        standardize_together(backbone)
        standardize_alone(backbone.bottom_up)


def _build_stock(
    cfg: CfgNode,
    input_shape: ShapeSpec,
    build_stock: Callable[[CfgNode, ShapeSpec], Backbone],
    ws: WSSettings,
) -> Backbone:
    check_no_deformable_stage(cfg)
    check_depth(cfg)
    names = {"MODEL.RESNETS.NORM": cfg.MODEL.RESNETS.NORM, "MODEL.FPN.NORM": cfg.MODEL.FPN.NORM}
    for key, name in names.items():
        check_norm(key, name)
    norms = {key: get_norm(name, ws) for key, name in names.items()}
    return build_stock(with_norms(cfg, norms), input_shape)


def _finish_resnet(resnet: nn.Module, ws: WSSettings, part: str) -> None:
    finish_part(resnet, ws, switch="BACKBONE", part=part, norm_key="MODEL.RESNETS.NORM")


def check_no_deformable_stage(cfg: CfgNode) -> None:
    """Raises ConfigError if MODEL.RESNETS.DEFORM_ON_PER_STAGE has a True."""
    stages = list(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
    if any(stages):
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {stages}, but deformable convolutions cannot "
            "be standardized; allowed: all False"
        )


def check_depth(cfg: CfgNode) -> None:
    """Raises ConfigError if MODEL.RESNETS.DEPTH is none that detectron2's builders know."""
    if cfg.MODEL.RESNETS.DEPTH not in _DEPTHS:
        allowed = ", ".join(map(str, _DEPTHS))
        raise ConfigError(f"MODEL.RESNETS.DEPTH is {cfg.MODEL.RESNETS.DEPTH}; allowed: {allowed}")
