"""WS parts for detectron2 models; importing this package registers its backbones and heads."""

from ws_detectron.config import WSSettings

from .backbone import (
    build_ws_resnet_backbone,
    build_ws_resnet_fpn_backbone,
    build_ws_retinanet_resnet_fpn_backbone,
    check_depth,
)
from .bit import (
    build_bit_resnet_backbone,
    build_bit_resnet_fpn_backbone,
    build_bit_retinanet_resnet_fpn_backbone,
)
from .convert import ConversionReport, convert_to_ws, fold_ws, folded_copy, with_ws
from .heads import (
    WSFastRCNNConvFCHead,
    WSMaskRCNNConvUpsampleHead,
    WSRetinaNet,
    WSSemSegFPNHead,
)
from .norm import NORMS, is_stock_norm
from .parts import REGISTRATIONS, Registration, registrations_in, stock_name

__all__ = [
    "ConversionReport",
    "NORMS",
    "REGISTRATIONS",
    "Registration",
    "WSFastRCNNConvFCHead",
    "WSMaskRCNNConvUpsampleHead",
    "WSRetinaNet",
    "WSSemSegFPNHead",
    "WSSettings",
    "build_bit_resnet_backbone",
    "build_bit_resnet_fpn_backbone",
    "build_bit_retinanet_resnet_fpn_backbone",
    "build_ws_resnet_backbone",
    "build_ws_resnet_fpn_backbone",
    "build_ws_retinanet_resnet_fpn_backbone",
    "check_depth",
    "convert_to_ws",
    "fold_ws",
    "folded_copy",
    "is_stock_norm",
    "registrations_in",
    "stock_name",
    "with_ws",
]
