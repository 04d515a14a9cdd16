"""Backbones of BiT: pre-activation ResNets in which every conv has WS.

Kolesnikov, Beyer, Zhai, Puigcerver, Yung, Gelly, Houlsby, "Big Transfer (BiT): General Visual
Representation Learning" (arXiv:1912.11370). Reference code: google-research/big_transfer,
bit_pytorch/models.py, and timm, models/resnetv2.py; `tools/check_parity.py` compares with timm.
"""

import logging
from collections.abc import Callable
from functools import partial

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn
from torch.nn import functional as F

from ws_detectron.config import WSSettings
from ws_detectron.errors import ConfigError
from ws_detectron.layers import WSConv2d, standardize_together

from .backbone import check_no_deformable_stage, finish_fpn
from .norm import Norm, check_norm, check_norm_layers
from .norm import get_norm as get_ws_norm

logger = logging.getLogger(__name__)

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

ConvType = Callable[..., Conv2d]
"""`detectron2.layers.Conv2d`, or a function with its arguments."""


@BACKBONE_REGISTRY.register()
def build_bit_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """BiT's pre-activation ResNet of depth 50, 101 or 152, in detectron2's `ResNet`.

    MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT work as for `build_ws_resnet_backbone`. A network of
    width factor w, as R-50x3, has STEM_OUT_CHANNELS 64w, WIDTH_PER_GROUP 64w and
    RES2_OUT_CHANNELS 256w. The published weights need NORM "GN", STRIDE_IN_1X1 False, MODEL.WS.MODE
    "bit" and the MODEL.WS.EPS of their file; configs/weights/bit_R_50x1.yaml sets them.

    All convs are standardized, also the stem, the last of a block and the projections, whose
    outputs are summed before a norm follows.

    **Outputs.** The norm and ReLU with which a stage starts in BiT are at the end of the stage
    before it (`res2.out`, in timm `stages.1.blocks.0.norm1`), the first ones in the stem, and the
    final norm before the classifier at the end of res5. This is the same network, as the first
    block of a stage, which has a projection, reads nothing but the normalized input. So an output
    is what the pretrained network itself reads there, with pretrained weights. The raw sums of the
    blocks, which nothing in BiT reads without a norm, grow with depth and have no bound; norms of
    their own would start from 1 and 0. Each norm is frozen with its stage.

    Raises:
        ConfigError: a key has a value that is not allowed; names the key.
    """
    return _build_resnet(cfg, input_shape, WSSettings.from_config(cfg), "backbone")


@BACKBONE_REGISTRY.register()
def build_bit_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `FPN`, with P6 by max pooling, on `build_bit_resnet_backbone`."""
    return _build_fpn(cfg, input_shape, lambda resnet: LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_bit_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's `FPN`, with P6 and P7 by convs on res5, on `build_bit_resnet_backbone`."""

    def convs_on_res5(resnet: Backbone) -> nn.Module:
        return LastLevelP6P7(resnet.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)

    return _build_fpn(cfg, input_shape, convs_on_res5)


def _build_fpn(
    cfg: CfgNode, input_shape: ShapeSpec, build_top: Callable[[Backbone], nn.Module]
) -> Backbone:
    ws = WSSettings.from_config(cfg)
    check_norm("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM)
    resnet = _build_resnet(cfg, input_shape, ws, "backbone.bottom_up")
    backbone = FPN(
        bottom_up=resnet,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=get_ws_norm(cfg.MODEL.FPN.NORM, ws),
        top_block=build_top(resnet),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    finish_fpn(backbone, ws)
    return backbone


def _build_resnet(cfg: CfgNode, input_shape: ShapeSpec, ws: WSSettings, part: str) -> Backbone:
    keys = cfg.MODEL.RESNETS
    check_no_deformable_stage(cfg)
    if keys.DEPTH not in _BLOCKS:
        raise ConfigError(
            f"MODEL.RESNETS.DEPTH is {keys.DEPTH}; BiT has {', '.join(map(str, _BLOCKS))}"
        )
    check_norm("MODEL.RESNETS.NORM", keys.NORM)
    if not keys.NORM:
        raise ConfigError(
            'MODEL.RESNETS.NORM is "", but the blocks of BiT start with a norm layer; allowed: '
            '"GN", "BN", "SyncBN", "FrozenBN"'
        )
    norm = get_ws_norm(keys.NORM, ws)
    conv: ConvType = Conv2d
    if ws.backbone:
        conv = partial(WSConv2d, ws_eps=ws.eps, ws_mode=ws.mode)
    stem = BiTStem(input_shape.channels, keys.STEM_OUT_CHANNELS, norm=norm, conv=conv)
    stages, channels = [], stem.out_channels
    for index, blocks in enumerate(_BLOCKS[keys.DEPTH]):
        dilation = keys.RES5_DILATION if index == 3 else 1
        stride = 1 if index == 0 or dilation > 1 else 2
        stage = ResNet.make_stage(
            PreActBottleneck,
            blocks,
            in_channels=channels,
            out_channels=keys.RES2_OUT_CHANNELS * 2**index,
            bottleneck_channels=keys.NUM_GROUPS * keys.WIDTH_PER_GROUP * 2**index,
            stride_per_block=[stride] + [1] * (blocks - 1),
            project_per_block=[True] + [False] * (blocks - 1),
            num_groups=keys.NUM_GROUPS,
            stride_in_1x1=keys.STRIDE_IN_1X1,
            dilation=dilation,
            norm=norm,
            conv=conv,
        )
        stages.append(stage)
        channels = stage[-1].out_channels
    resnet = ResNet(stem, stages, out_features=keys.OUT_FEATURES)
    for stage in resnet.stages:
        stage.add_module("out", NormReLU(stage[-1].out_channels, norm))
    check_norm_layers(resnet, part)
    resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    if ws.backbone:
        standardize_together(resnet)
        convs = sum(isinstance(module, WSConv2d) for module in resnet.modules())
        logger.info("WS (%s, eps %g) in %s: all %d convolutions", ws.mode, ws.eps, part, convs)
    return resnet


class NormReLU(CNNBlockBase):
    """A norm layer and ReLU: the start of a block, or the end of the stem or of a stage.

    Args:
        channels: of input and output.
        norm: as `detectron2.layers.get_norm` takes it.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__(channels, channels, stride=1)
        self.norm = get_norm(norm, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.norm(x))


class BiTStem(CNNBlockBase):
    """7x7 conv of stride 2, max pooling of stride 2 over a border of zeros, norm, ReLU.

    The conv outputs are not activated and may be negative, so the zeros can be the maximum; pooling
    that pads with -infinity, as detectron2's stem has it, computes something else.

    Args:
        in_channels: of the image.
        out_channels: of the output, which has a fourth of the image's height and width.
        norm: as `detectron2.layers.get_norm` takes it.
        conv: builds the conv.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm, conv: ConvType) -> None:
        super().__init__(in_channels, out_channels, stride=4)
        self.conv1 = conv(in_channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.out = NormReLU(out_channels, norm)
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(self.conv1(x), [1, 1, 1, 1])
        return self.out(F.max_pool2d(x, kernel_size=3, stride=2))


class PreActBottleneck(CNNBlockBase):
    """Bottleneck block whose norms precede its convs (arXiv:1603.05027, figure 4e).

    With a = `preact`(x), or a = x in a block with a projection, which gets a normalized and
    activated input, the output is conv3(conv2(conv1(a))) + shortcut: the projection of a, or x.

    Args:
        in_channels: of the input.
        out_channels: of the output; equal to `in_channels` without a projection.
        bottleneck_channels: of the 3x3 conv.
        stride: of the 3x3 conv and the projection; 1 without one.
        project: whether the shortcut is a 1x1 conv, as in the first block of a stage.
        num_groups: of the 3x3 conv.
        stride_in_1x1: whether the first 1x1 conv has the stride instead of the 3x3 conv.
        dilation: of the 3x3 conv.
        norm: as `detectron2.layers.get_norm` takes it.
        conv: builds the convs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int,
        project: bool,
        num_groups: int,
        stride_in_1x1: bool,
        dilation: int,
        norm: Norm,
        conv: ConvType,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.preact = None if project else NormReLU(in_channels, norm)
        self.shortcut = None
        if project:
            self.shortcut = conv(in_channels, out_channels, 1, stride=stride, bias=False)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        # The norms of conv2 and conv3 follow the conv before; conv3 has none after it.
        self.conv1 = conv(
            in_channels,
            bottleneck_channels,
            kernel_size=1,
            stride=stride_1x1,
            bias=False,
            norm=get_norm(norm, bottleneck_channels),
        )
        self.conv2 = conv(
            bottleneck_channels,
            bottleneck_channels,
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
            groups=num_groups,
            bias=False,
            norm=get_norm(norm, bottleneck_channels),
        )
        self.conv3 = conv(bottleneck_channels, out_channels, kernel_size=1, bias=False)
        for layer in (self.conv1, self.conv2, self.conv3, self.shortcut):
            if layer is not None:
                weight_init.c2_msra_fill(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = x if self.preact is None else self.preact(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu_(self.conv1(activated))
        x = F.relu_(self.conv2(x))
        return self.conv3(x) + shortcut
