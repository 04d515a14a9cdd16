"""State dicts with full shapes that need little memory, and small models."""

from functools import partial
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ws_detectron import add_ws_config


def constant(value: float, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of one repeated value; saved, it takes four bytes."""
    return torch.full((), float(value)).expand(shape)


def torchvision_keys(name: str, letters: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a ResNet of torchvision, without its classifier.

    Args:
        name: of the function in torchvision.models.
        letters: "bn" for BN; "gn" for GN, whose layers are called so in mmdetection.
    """
    build = getattr(torchvision.models, name)
    with torch.device("meta"):
        model = build() if letters == "bn" else build(norm_layer=partial(nn.GroupNorm, 32))
    return {
        key.replace("bn", letters): tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }


def as_state(keys: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, each with a different value."""
    return {key: constant(1 + i, shape) for i, (key, shape) in enumerate(keys.items())}


def mmdet_keys(depth: int = 18, masks: bool = True, classes: int = 80) -> dict[str, Any]:
    """Key -> shape of a mmdetection gn_ws-all detector."""
    body = torchvision_keys(f"resnet{depth}", "gn")
    keys: dict[str, Any] = {f"backbone.{key}": shape for key, shape in body.items()}
    channels = (64, 128, 256, 512) if depth < 50 else (256, 512, 1024, 2048)

    def conv(name: str, shape: tuple[int, ...]) -> None:
        keys[f"{name}.conv.weight"] = shape
        keys[f"{name}.gn.weight"] = keys[f"{name}.gn.bias"] = (256,)

    def layer(name: str, shape: tuple[int, ...], outputs: int) -> None:
        keys[f"{name}.weight"], keys[f"{name}.bias"] = shape, (outputs,)

    for i, width in enumerate(channels):
        conv(f"neck.lateral_convs.{i}", (256, width, 1, 1))
        conv(f"neck.fpn_convs.{i}", (256, 256, 3, 3))
        conv(f"roi_head.bbox_head.shared_convs.{i}", (256, 256, 3, 3))
        if masks:
            conv(f"roi_head.mask_head.convs.{i}", (256, 256, 3, 3))
    layer("rpn_head.rpn_conv", (256, 256, 3, 3), 256)
    layer("rpn_head.rpn_cls", (3, 256, 1, 1), 3)
    layer("rpn_head.rpn_reg", (12, 256, 1, 1), 12)
    layer("roi_head.bbox_head.shared_fcs.0", (1024, 256 * 7 * 7), 1024)
    layer("roi_head.bbox_head.fc_cls", (classes + 1, 1024), classes + 1)
    layer("roi_head.bbox_head.fc_reg", (4 * classes, 1024), 4 * classes)
    if masks:
        layer("roi_head.mask_head.upsample", (256, 256, 2, 2), 256)
        layer("roi_head.mask_head.conv_logits", (classes, 256, 1, 1), classes)
    return keys


def small_config(*, ws: bool, norm: str = "GN", depth: int = 18) -> CfgNode:
    """An R-18-FPN Faster R-CNN with narrow heads."""
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.BACKBONE.NAME = f"build_{'ws_' if ws else ''}resnet_fpn_backbone"
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.STRIDE_IN_1X1 = depth, norm, False
    resnets.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    resnets.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS = norm, 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    box = cfg.MODEL.ROI_BOX_HEAD
    box.NAME = "WSFastRCNNConvFCHead" if ws else "FastRCNNConvFCHead"
    box.NUM_CONV, box.CONV_DIM, box.NUM_FC, box.FC_DIM, box.NORM = 1, 32, 1, 32, norm
    box.POOLER_RESOLUTION = 7
    return cfg


def small_model(**kwargs: Any) -> nn.Module:
    """A model of `small_config`."""
    return build_model(small_config(**kwargs)).eval()


def other_detector(library: str) -> dict[str, torch.Tensor]:
    """Some keys of detectors whose box predictor has detectron2's names, with shapes that fit.

    Args:
        library: "torchvision" (models/detection/faster_rcnn.py and mask_rcnn.py, 0.26),
            "torchvision retinanet" or "maskrcnn-benchmark" (modeling/).
    """
    names = {
        "torchvision": (
            "backbone.body.conv1",
            "backbone.body.layer1.0.conv1",
            "backbone.fpn.inner_blocks.0.0",
            "backbone.fpn.layer_blocks.0.0",
            "rpn.head.conv.0.0",
            "rpn.head.cls_logits",
            "roi_heads.box_head.fc6",
            "roi_heads.box_head.fc7",
            "roi_heads.mask_head.0.0",
            "roi_heads.mask_predictor.mask_fcn_logits",
        ),
        "torchvision retinanet": ("backbone.body.conv1", "head.classification_head.conv.0.0"),
        "maskrcnn-benchmark": (
            "backbone.body.stem.conv1",
            "backbone.body.layer1.0.conv1",
            "backbone.fpn.fpn_inner1",
            "rpn.head.conv",
            "roi_heads.box.feature_extractor.fc6",
            "roi_heads.box.predictor.cls_score",
        ),
    }[library]
    state = {f"{name}.weight": torch.ones(4, 4) for name in names}
    if library == "torchvision":
        for key, shape in (("cls_score", (81, 32)), ("bbox_pred", (320, 32))):
            state[f"roi_heads.box_predictor.{key}.weight"] = torch.zeros(shape)
            state[f"roi_heads.box_predictor.{key}.bias"] = torch.zeros(shape[0])
    return state
