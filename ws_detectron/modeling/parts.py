"""The model parts with WS: their registered names, and the last step of building one.

Only `REGISTRATIONS` lists the names; folding, checks and warnings read it.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.utils.registry import Registry
from torch import nn

from ws_detectron.config import WSSettings
from ws_detectron.errors import ConfigError
from ws_detectron.layers import WSConv2d

from .convert import convert_to_ws
from .norm import check_norm_layers


class Registration(NamedTuple):
    """A registered part with WS and the detectron2 part that it replaces.

    Attributes:
        registry: where both are registered.
        key: the config key for their names.
        name: of the part with WS.
        stock: name of detectron2's part, which has the same outputs with folded weights; empty if
            detectron2 has none.
        norms: switch in MODEL.WS -> key of the norm after the convs that it standardizes.
    """

    registry: Registry
    key: str
    name: str
    stock: str
    norms: Mapping[str, str]


_BACKBONE = BACKBONE_REGISTRY, "MODEL.BACKBONE.NAME"
_RESNET = {"BACKBONE": "MODEL.RESNETS.NORM"}
_FPN = {**_RESNET, "FPN": "MODEL.FPN.NORM"}

REGISTRATIONS = [
    Registration(*_BACKBONE, "build_ws_resnet_backbone", "build_resnet_backbone", _RESNET),
    Registration(*_BACKBONE, "build_ws_resnet_fpn_backbone", "build_resnet_fpn_backbone", _FPN),
    Registration(
        *_BACKBONE,
        "build_ws_retinanet_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone", _FPN,
    ),
    Registration(*_BACKBONE, "build_bit_resnet_backbone", "", _RESNET),
    Registration(*_BACKBONE, "build_bit_resnet_fpn_backbone", "", _FPN),
    Registration(*_BACKBONE, "build_bit_retinanet_resnet_fpn_backbone", "", _FPN),
    Registration(
        ROI_BOX_HEAD_REGISTRY, "MODEL.ROI_BOX_HEAD.NAME",
        "WSFastRCNNConvFCHead", "FastRCNNConvFCHead", {"BOX_HEAD": "MODEL.ROI_BOX_HEAD.NORM"},
    ),
    Registration(
        ROI_MASK_HEAD_REGISTRY, "MODEL.ROI_MASK_HEAD.NAME",
        "WSMaskRCNNConvUpsampleHead", "MaskRCNNConvUpsampleHead",
        {"MASK_HEAD": "MODEL.ROI_MASK_HEAD.NORM"},
    ),
    Registration(
        META_ARCH_REGISTRY, "MODEL.META_ARCHITECTURE",
        "WSRetinaNet", "RetinaNet", {"RETINANET_HEAD": "MODEL.RETINANET.NORM"},
    ),
    Registration(
        SEM_SEG_HEADS_REGISTRY, "MODEL.SEM_SEG_HEAD.NAME",
        "WSSemSegFPNHead", "SemSegFPNHead", {"SEM_SEG_HEAD": "MODEL.SEM_SEG_HEAD.NORM"},
    ),
]  # fmt: skip
"""Append a row for a WS part that your own project registers."""


def registrations_in(cfg: CfgNode) -> list[Registration]:
    """The rows of `REGISTRATIONS` whose names a config uses."""
    return [row for row in REGISTRATIONS if attrgetter(row.key)(cfg) == row.name]


def stock_name(key: str, name: str) -> str:
    """detectron2's name for the part that `key` names `name`; `name` itself if there is none."""
    stock = [row.stock for row in REGISTRATIONS if (row.key, row.name) == (key, name)]
    return (stock and stock[0]) or name


def finish_part(
    module: nn.Module, ws: WSSettings, *, switch: str, part: str, norm_key: str
) -> None:
    """Checks the norm layers of a part built by detectron2, and converts its convs to WS.

    Args:
        module: the part, built with norms from `get_norm`.
        ws: which parts are standardized, and how.
        switch: the key in MODEL.WS that turns WS on for this part.
        part: name of `module` in the model, for messages.
        norm_key: the config key of its norm, for messages.

    Raises:
        ConfigError: a norm layer does not fit its channels; or WS is on, but no conv of the part
            is followed by a norm layer.
    """
    check_norm_layers(module, part)
    if not getattr(ws, switch.lower()):
        return
    if not convert_to_ws(module, ws.eps, ws.mode).converted:
        raise ConfigError(
            f"WS needs convs followed by a norm layer, and {part} has none; check {norm_key} "
            f'(allowed: "GN", "BN", "SyncBN", "FrozenBN") or set MODEL.WS.{switch} False'
        )
    for conv in module.modules():
        if isinstance(conv, WSConv2d):
            # Weights fill them. Those of random filters would differ between processes, because
            # detectron2's DistributedDataParallel does not broadcast buffers.
            conv.reset_affine(ws.affine)
