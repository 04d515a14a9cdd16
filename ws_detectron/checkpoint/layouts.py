"""Translates tensor names of other frameworks to detectron2's, and mmdetection's back.

Body keys are detectron2's keys relative to the ResNet (`stem.conv1.weight`). Detector keys are
those of a detectron2 model with an FPN (`backbone.bottom_up.stem.conv1.weight`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Optional

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

BODY_PREFIX = "backbone.bottom_up."

KeyMap = Callable[[str], Optional[str]]
"""Key in a file -> detectron2's key, None if unknown."""

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_TORCHVISION_BODY = (
    (r"conv1\.weight", r"stem.conv1.weight"),
    (rf"(?:bn|gn)1\.{_NORM}", r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", r"res{\1}.\2.conv\3.weight"),
    (rf"layer(\d)\.(\d+)\.(?:bn|gn)(\d)\.{_NORM}", r"res{\1}.\2.conv\3.norm.\4"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", r"res{\1}.\2.shortcut.weight"),
    (rf"layer(\d)\.(\d+)\.downsample\.1\.{_NORM}", r"res{\1}.\2.shortcut.norm.\3"),
)
_MMDET_PARTS = (
    (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"backbone.fpn_lateral{{\1}}.\2"),
    (rf"neck\.lateral_convs\.(\d)\.(?:gn|bn)\.{_NORM}", r"backbone.fpn_lateral{{\1}}.norm.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)", r"backbone.fpn_output{{\1}}.\2"),
    (rf"neck\.fpn_convs\.(\d)\.(?:gn|bn)\.{_NORM}", r"backbone.fpn_output{{\1}}.norm.\2"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (
        r"roi_head\.bbox_head\.shared_convs\.(\d+)\.conv\.(weight|bias)",
        r"roi_heads.box_head.conv{\1}.\2",
    ),
    (
        rf"roi_head\.bbox_head\.shared_convs\.(\d+)\.(?:gn|bn)\.{_NORM}",
        r"roi_heads.box_head.conv{\1}.norm.\2",
    ),
    (
        r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(weight|bias)",
        r"roi_heads.box_head.fc{\1}.\2",
    ),
    (r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (
        r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(weight|bias)",
        r"roi_heads.mask_head.mask_fcn{\1}.\2",
    ),
    (
        rf"roi_head\.mask_head\.convs\.(\d+)\.(?:gn|bn)\.{_NORM}",
        r"roi_heads.mask_head.mask_fcn{\1}.norm.\2",
    ),
    (r"roi_head\.mask_head\.upsample\.(weight|bias)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(weight|bias)", r"roi_heads.mask_head.predictor.\1"),
)


def torchvision_body_key(key: str) -> Optional[str]:
    """The body key for a key of torchvision's, timm's, mmdetection's or the WS authors' ResNet."""
    return _translate(key, _TORCHVISION_BODY)


def mmdet_key(key: str) -> Optional[str]:
    """The detector key for a key of mmdetection's Faster or Mask R-CNN (2.0 to 3.x)."""
    if key.startswith("backbone."):
        body = torchvision_body_key(key[len("backbone.") :])
        return body and BODY_PREFIX + body
    return _translate(key, _MMDET_PARTS)


def caffe2_body_key(key: str) -> Optional[str]:
    """The body key for a blob name of a Caffe2 ResNet (`res2_0_branch2a_w`)."""
    body = convert_basic_c2_names([key])[0]
    is_body = re.fullmatch(
        r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))(\.norm)?\.(weight|bias|running_\w+)",
        body,
    )
    return body if is_body else None


def to_mmdet_key(key: str, norm: str) -> Optional[str]:
    """The inverse of `mmdet_key`.

    Args:
        key: a detector key.
        norm: mmdetection's name of the norm layers, "gn" or "bn".
    """
    if key.startswith(BODY_PREFIX):
        body = _body_to_torchvision(key[len(BODY_PREFIX) :], norm)
        return body and "backbone." + body
    match = re.fullmatch(rf"backbone\.fpn_(lateral|output)(\d)\.(norm\.)?{_NORM}", key)
    if match:
        kind = "lateral_convs" if match[1] == "lateral" else "fpn_convs"
        return f"neck.{kind}.{int(match[2]) - 2}.{norm if match[3] else 'conv'}.{match[4]}"
    match = re.fullmatch(
        rf"roi_heads\.(box_head\.conv|mask_head\.mask_fcn)(\d+)\.(norm\.)?{_NORM}", key
    )
    if match:
        part = "bbox_head.shared_convs" if match[1].startswith("box") else "mask_head.convs"
        layer = norm if match[3] else "conv"
        return f"roi_head.{part}.{int(match[2]) - 1}.{layer}.{match[4]}"
    match = re.fullmatch(r"roi_heads\.box_head\.fc(\d+)\.(weight|bias)", key)
    if match:
        return f"roi_head.bbox_head.shared_fcs.{int(match[1]) - 1}.{match[2]}"
    module, _, tensor = key.rpartition(".")
    return f"{_SINGLE_MODULES[module]}.{tensor}" if module in _SINGLE_MODULES else None


def strip_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose keys start with `prefix`, under the rest of their keys."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


_SINGLE_MODULES = {
    "proposal_generator.rpn_head.conv": "rpn_head.rpn_conv",
    "proposal_generator.rpn_head.objectness_logits": "rpn_head.rpn_cls",
    "proposal_generator.rpn_head.anchor_deltas": "rpn_head.rpn_reg",
    "roi_heads.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
    "roi_heads.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
    "roi_heads.mask_head.deconv": "roi_head.mask_head.upsample",
    "roi_heads.mask_head.predictor": "roi_head.mask_head.conv_logits",
}


def _body_to_torchvision(key: str, norm: str) -> Optional[str]:
    match = re.fullmatch(rf"stem\.conv1\.(norm\.)?{_NORM}", key)
    if match:
        return f"{norm if match[1] else 'conv'}1.{match[2]}"
    match = re.fullmatch(rf"res(\d)\.(\d+)\.(?:conv(\d)|(shortcut))\.(norm\.)?{_NORM}", key)
    if not match:
        return None
    block = f"layer{int(match[1]) - 1}.{match[2]}"
    if match[4]:
        return f"{block}.downsample.{1 if match[5] else 0}.{match[6]}"
    return f"{block}.{norm if match[5] else 'conv'}{match[3]}.{match[6]}"


def _translate(key: str, patterns: tuple[tuple[str, str], ...]) -> Optional[str]:
    """Applies the first pattern that matches the whole key.

    `{3}` in the result stands for 3 + 1, and `{{3}}` for 3 + 2: detectron2 numbers stages as in the
    ResNet paper and layers from 1, others number both from 0 or 1.
    """
    for pattern, template in patterns:
        match = re.fullmatch(pattern, key)
        if match:
            raised = match.expand(template)
            raised = re.sub(r"\{\{(\d+)\}\}", lambda found: str(int(found[1]) + 2), raised)
            return re.sub(r"\{(\d+)\}", lambda found: str(int(found[1]) + 1), raised)
    return None
