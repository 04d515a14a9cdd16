"""The supported formats of weight files, and how they are recognized by their keys."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Optional

from ws_detectron.errors import WeightsError, list_some

from .layouts import KeyMap, caffe2_body_key, mmdet_key, torchvision_body_key
from .metadata import Preprocessing

TORCHVISION_PREPROCESSING = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""torchvision's, timm's, mmdetection's and the WS authors' ImageNet mean and std, times 255."""

WS_AUTHORS_DETECTION_PREPROCESSING = Preprocessing(
    "BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)
)
"""Of the WS authors' fork of maskrcnn-benchmark, which reads their Caffe2-style files."""


@dataclass(frozen=True)
class Source:
    """One format of weight files.

    Attributes:
        name: as `--source` takes it.
        title: for messages.
        key_map: key in the file -> key in detectron2, None if unknown.
        ws: whether its convs were trained with WS; None if the keys do not tell.
        preprocessing: what the weights were trained with.
        whole_detector: whether the file contains more than a ResNet.
    """

    name: str
    title: str
    key_map: KeyMap
    ws: Optional[bool]
    preprocessing: Preprocessing = TORCHVISION_PREPROCESSING
    whole_detector: bool = False


SOURCES = {
    source.name: source
    for source in (
        Source("mmdet", "a mmdetection Faster or Mask R-CNN", mmdet_key, None, whole_detector=True),
        Source("mmdet-resnet", "a mmdetection ResNet or ResNeXt", torchvision_body_key, None),
        Source(
            "ws-authors", "a GN+WS ResNet of the WS authors (.pth.tar)", torchvision_body_key, True
        ),
        Source(
            "ws-authors-caffe2",
            "a Caffe2-style GN+WS ResNet of the WS authors (.pkl)",
            caffe2_body_key,
            True,
            WS_AUTHORS_DETECTION_PREPROCESSING,
        ),
        Source("torchvision", "a torchvision ResNet", torchvision_body_key, False),
        Source("timm", "a timm ResNet", torchvision_body_key, False),
    )
}

_REFUSED = (
    (
        r"stem\.conv\.weight|root\.conv\.weight|(resnet/)?root_block/.*|block1\.unit01\..*"
        r"|stages\.0\.blocks\.0\.(norm1|pre_norm)\..*",
        "a pre-activation ResNetV2 (BiT, timm resnetv2): its norm layers precede the convs, and "
        "detectron2 has no such ResNet",
    ),
    (
        r"(backbone\.)?(conv1\.0\.weight|stem\.0\.weight)",
        "a ResNet with three 3x3 convs as its stem (ResNet-C/D); detectron2's has one 7x7 conv",
    ),
    (
        r"bbox_head\.(shared_convs|shared_fcs|fc_cls)\..*",
        "a detector of mmdetection 1.x (background class first); upgrade it with mmdetection's "
        "tools/model_converters/upgrade_model_version.py",
    ),
    (r".*\.weight_gamma", "a model with ConvAWS (DetectoRS), which is not WS"),
    (r".*conv2(\.conv)?_offset\..*", "a model with deformable convs, which are not supported"),
    (r".*\.(se|attn)\.(fc1|conv)\..*", "a ResNet with attention, which detectron2 does not have"),
)

# Some of their keys are also detectron2's (`roi_heads.box_predictor.cls_score.weight`).
_OTHER_DETECTORS = (
    (
        r"backbone\.body\.(stem|res\d)\..*|backbone\.fpn\.fpn_(inner|layer)\d\..*"
        r"|roi_heads\.(box|mask|keypoint)\.(feature_extractor|predictor)\..*",
        "a maskrcnn-benchmark detector",
    ),
    (
        r"backbone\.body\..*|backbone\.fpn\.(inner|layer|extra)_blocks\..*"
        r"|roi_heads\.box_head\.fc[67]\..*|head\.(classification|regression)_head\..*",
        "a torchvision detector",
    ),
)


def refuse_other_detectors(keys: Collection[str], path: str) -> None:
    """Raises WeightsError for detectors of which detectron2 would load only a few layers.

    Args:
        keys: without a common `module.` prefix, and without those that the model has.
        path: the file, for messages.
    """
    for pattern, title in _OTHER_DETECTORS:
        for key in keys:
            if re.fullmatch(pattern, key):
                raise WeightsError(
                    f"{path} is {title} (recognized by its key {key!r:.100}), which "
                    "detectron2 cannot use: its backbone would stay random. Use a detector of "
                    "detectron2's model zoo or of mmdetection, or a ResNet"
                )


def refuse_known_misfits(keys: Collection[str], path: str) -> None:
    """Raises WeightsError for known models that detectron2 cannot compute, with the reason."""
    refuse_other_detectors(keys, path)
    for pattern, reason in _REFUSED:
        for key in keys:
            if re.fullmatch(pattern, key):
                raise WeightsError(f"{path} is {reason} (recognized by its key {key!r:.100})")


def is_detectron2(keys: Collection[str]) -> bool:
    """Whether the keys are those of a detectron2 model."""
    return any(
        re.match(r"((backbone\.)?(bottom_up\.)?stem\.conv1|proposal_generator|roi_heads)\.", key)
        for key in keys
    )


def recognize(keys: Collection[str], path: str, wrapped: bool) -> Source:
    """Recognizes the format of a file by its keys.

    Args:
        keys: without a common `module.` prefix.
        path: the file, for messages.
        wrapped: as in `RawState`; training scripts for several GPUs save files like this.

    Raises:
        WeightsError: the format is unknown, not convertible, or ambiguous; says which.
    """
    refuse_known_misfits(keys, path)
    if any(re.match(r"(neck|roi_head)\.", key) for key in keys):
        return SOURCES["mmdet"]
    if "conv1_w" in keys:
        if "GN-WS" in path:
            return SOURCES["ws-authors-caffe2"]
        raise WeightsError(
            f"{path} has Caffe2's blob names, as both plain ResNets and the WS authors' GN+WS "
            "ones. If it is one of the latter, pass --source ws-authors-caffe2; detectron2 reads "
            "plain ones without conversion"
        )
    if {"conv1.weight", "gn1.weight"} <= set(keys):
        return SOURCES["mmdet-resnet"]
    if {"conv1.weight", "bn1.weight"} <= set(keys):
        if "bn1.running_mean" in keys:
            return SOURCES["torchvision"]
        if wrapped:
            return SOURCES["ws-authors"]
        raise WeightsError(
            f"{path} has GN and torchvision's names, like the WS authors' GN+WS files and timm's "
            "resnet50_gn (without WS): pass --source ws-authors or --source timm"
        )
    raise WeightsError(
        f"{path} has an unknown format; its keys are {list_some(sorted(keys))}. Supported: "
        + "; ".join(f"{source.name}: {source.title}" for source in SOURCES.values())
    )
