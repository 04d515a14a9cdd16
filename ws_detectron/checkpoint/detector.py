"""Checks the tensors of a whole detector by their shapes."""

from collections.abc import Mapping

import torch

from ws_detectron.errors import WeightsError

from .architecture import ResNetArchitecture, infer_architecture
from .layouts import BODY_PREFIX, strip_prefix

_ANCHORS = 3
_RPN = "proposal_generator.rpn_head."
_BOX = "roi_heads.box_predictor."
_MASK = "roi_heads.mask_head.predictor.weight"


def check_detector(state: Mapping[str, torch.Tensor], path: str) -> ResNetArchitecture:
    """Checks a Faster or Mask R-CNN with FPN under detectron2's keys.

    Expected are four FPN levels with convs (the fifth is a max-pooling of the fourth), three
    anchors per position, K + 1 rows in `cls_score` (files with the background class first are
    refused by their keys), 4 K or 4 box outputs, RoI features of 7 x 7 before the first fully
    connected layer, and K masks.

    Returns:
        The architecture of its ResNet.

    Raises:
        WeightsError: a tensor is missing or has another shape; names it.
    """
    architecture = infer_architecture(strip_prefix(state, BODY_PREFIX), path)

    def rows(key: str) -> int:
        if key not in state:
            raise WeightsError(f"{path} is not a whole detector: it lacks {key}")
        return state[key].size(0)

    def require(what: str, found: object, expected: object) -> None:
        if found != expected:
            raise WeightsError(f"{path}: {what} is {found}, expected {expected}")

    bodies = architecture.conv_shapes()
    for level in range(2, 6):
        blocks = [name for name in bodies if name.startswith(f"res{level}.")]
        out = max(bodies[name][0] for name in blocks)
        channels = rows(f"backbone.fpn_lateral{level}.weight")
        for part, shape in (("lateral", (channels, out, 1, 1)), ("output", (channels,) * 2)):
            key = f"backbone.fpn_{part}{level}.weight"
            rows(key)
            require(f"the shape of {key}", tuple(state[key].shape)[: len(shape)], shape)
    for key in state:
        if key.startswith(("backbone.fpn_lateral6", "backbone.fpn_output6")):
            raise WeightsError(f"{path} has a further FPN level with weights ({key})")

    anchors = rows(_RPN + "objectness_logits.weight")
    require("the number of anchors per position", anchors, _ANCHORS)
    require("the number of RPN box outputs", rows(_RPN + "anchor_deltas.weight"), 4 * anchors)
    classes = rows(_BOX + "cls_score.weight") - 1
    boxes = rows(_BOX + "bbox_pred.weight")
    if boxes not in (4, 4 * classes):
        raise WeightsError(
            f"{path} has {boxes} box outputs, expected {4 * classes} (one box for each of the "
            f"{classes} classes) or 4 (class-agnostic)"
        )
    fc, conv = "roi_heads.box_head.fc1.weight", "roi_heads.box_head.conv1.weight"
    rows(fc)
    channels = rows(conv) if conv in state else rows("backbone.fpn_output2.weight")
    require(f"the number of inputs of {fc}", state[fc].size(1), channels * 7 * 7)
    if _MASK in state and rows(_MASK) not in (1, classes):
        raise WeightsError(f"{path}: {rows(_MASK)} mask outputs for {classes} classes")
    return architecture
