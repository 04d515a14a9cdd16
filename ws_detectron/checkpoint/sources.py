"""The systems whose weight files are understood, and how their files are recognized."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Optional

from ws_detectron.errors import WeightsError, list_some, shown

from .layouts import KeyMap, caffe2_body_key, mmdet_key, torchvision_body_key
from .metadata import Preprocessing

TORCHVISION_PREPROCESSING = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""torchvision's, timm's, mmdetection's and the WS authors' ImageNet mean and std, times 255."""

WS_AUTHORS_DETECTION_PREPROCESSING = Preprocessing(
    "BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)
)
"""The WS authors' fork of maskrcnn-benchmark, for which their Caffe2-style files are."""


@dataclass(frozen=True)
class Source:
    """One kind of file.

    Attributes:
        name: as `--source` takes it.
        title: for messages.
        key_map: key of the file -> key in detectron2, None if unknown.
        whole_detector: whether the file holds more than a ResNet.
        ws: whether its convs were trained with WS; None where the keys do not tell.
        preprocessing: what the weights were trained with.
    """

    name: str
    title: str
    key_map: KeyMap
    whole_detector: bool
    ws: Optional[bool]
    preprocessing: Preprocessing


SOURCES = {
    source.name: source
    for source in (
        Source(
            "mmdet",
            "a mmdetection Faster or Mask R-CNN",
            mmdet_key,
            True,
            None,
            TORCHVISION_PREPROCESSING,
        ),
        Source(
            "mmdet-resnet",
            "a mmdetection ResNet or ResNeXt",
            torchvision_body_key,
            False,
            None,
            TORCHVISION_PREPROCESSING,
        ),
        Source(
            "ws-authors",
            "a GN+WS ResNet of the WS authors (.pth.tar)",
            torchvision_body_key,
            False,
            True,
            TORCHVISION_PREPROCESSING,
        ),
        Source(
            "ws-authors-caffe2",
            "a Caffe2-style GN+WS ResNet of the WS authors (.pkl)",
            caffe2_body_key,
            False,
            True,
            WS_AUTHORS_DETECTION_PREPROCESSING,
        ),
        Source(
            "torchvision",
            "a torchvision ResNet",
            torchvision_body_key,
            False,
            False,
            TORCHVISION_PREPROCESSING,
        ),
        Source(
            "timm",
            "a timm ResNet",
            torchvision_body_key,
            False,
            False,
            TORCHVISION_PREPROCESSING,
        ),
    )
}

_REFUSED = (
    (
        r"stem\.conv\.weight|root\.conv\.weight|(resnet/)?root_block/.*|block1\.unit01\..*"
        r"|stages\.0\.blocks\.0\.(norm1|pre_norm)\..*",
        "a pre-activation ResNetV2 (BiT, timm resnetv2): its norm layers stand before the convs, "
        "and no detectron2 ResNet computes the same",
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
    (r".*\.weight_gamma", "a model with ConvAWS (DetectoRS), another operation than WS"),
    (r".*conv2(\.conv)?_offset\..*", "a model with deformable convs, which have no WS form here"),
    (r".*\.(se|attn)\.(fc1|conv)\..*", "a ResNet with attention modules"),
)


# Some of their keys are detectron2's as well (`roi_heads.box_predictor.cls_score.weight`).
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
    """Raises WeightsError for whole detectors of which detectron2 would load a few layers only.

    Args:
        keys: without a common `module.` prefix, and without those that the model has.
        path: the file, for messages.
    """
    for pattern, title in _OTHER_DETECTORS:
        for key in keys:
            if re.fullmatch(pattern, key):
                raise WeightsError(
                    f"{path} is {title} (told from its key {shown(key, 100)}), which detectron2 "
                    "cannot use: its backbone would stay random. Take a detector of detectron2's "
                    "model zoo or of mmdetection, or a ResNet alone"
                )


def refuse_known_misfits(keys: Collection[str], path: str) -> None:
    """Raises WeightsError, with the reason, for models that no detectron2 ResNet can be."""
    refuse_other_detectors(keys, path)
    for pattern, reason in _REFUSED:
        for key in keys:
            if re.fullmatch(pattern, key):
                raise WeightsError(f"{path} is {reason} (told from its key {shown(key, 100)})")


def is_detectron2(keys: Collection[str]) -> bool:
    """Whether the keys are those of a detectron2 model."""
    return any(
        re.match(r"((backbone\.)?(bottom_up\.)?stem\.conv1|proposal_generator|roi_heads)\.", key)
        for key in keys
    )


def recognize(keys: Collection[str], path: str, wrapped: bool) -> Source:
    """Finds the kind of a file from its keys.

    Args:
        keys: without a common `module.` prefix.
        path: the file, for messages.
        wrapped: whether the tensors were in a `state_dict` entry and under `module.`, as training
            scripts for several GPUs save them.

    Raises:
        WeightsError: the kind is unknown, known but not convertible, or not to be told from the
            keys; the message says which.
    """
    refuse_known_misfits(keys, path)
    if any(re.match(r"(neck|roi_head)\.", key) for key in keys):
        return SOURCES["mmdet"]
    if "conv1_w" in keys:
        if "GN-WS" in path:
            return SOURCES["ws-authors-caffe2"]
        raise WeightsError(
            f"{path} has the blob names of Caffe2, which both plain ResNets and the GN+WS ones of "
            "the WS authors have. If it is one of the latter, say --source ws-authors-caffe2; "
            "plain ones need no conversion, as detectron2 reads them"
        )
    if {"conv1.weight", "gn1.weight"} <= set(keys):
        return SOURCES["mmdet-resnet"]
    if {"conv1.weight", "bn1.weight"} <= set(keys):
        if "bn1.running_mean" in keys:
            return SOURCES["torchvision"]
        if wrapped:
            return SOURCES["ws-authors"]
        raise WeightsError(
            f"{path} has GN under torchvision's names. The WS authors' GN+WS files and timm's "
            "resnet50_gn, without WS, look like this: say --source ws-authors or --source timm"
        )
    raise WeightsError(
        f"{path} is of no known kind; its keys are {list_some(sorted(keys))}. Known are "
        + "; ".join(f"{source.name}: {source.title}" for source in SOURCES.values())
    )
