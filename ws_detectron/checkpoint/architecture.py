"""Compares converted weights with the detectron2 model that they are for."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model

from ws_detectron.errors import WeightsError, list_some
from ws_detectron.model_zoo import get_config

from .sources import BODY_PREFIX

State = Mapping[str, torch.Tensor]

_DEPTHS = {"basic": (18, 34), "bottleneck": (50, 101, 152)}
_BOX, _MASK = "roi_heads.box_head.", "roi_heads.mask_head."


def check_architecture(state: State, detector: bool, path: str) -> str:
    """Builds the model that the weights are for on the meta device; compares all keys and shapes.

    Args:
        state: the tensors under detectron2's keys; of a ResNet only, relative to it
            (`stem.conv1.weight`).
        detector: whether they are of a Faster or Mask R-CNN with FPN instead: three anchors per
            position, RoI features of 7 x 7, K + 1 class scores, background last, and K or 1 boxes
            and masks.
        path: the file, for messages.

    Returns:
        The architecture of the ResNet, such as "R-50" or "X-101-32x4d".

    Raises:
        WeightsError: detectron2 has no such ResNet; or a key is missing, unexpected, or of the
            wrong shape.
    """
    cfg = get_config("Base-RCNN-FPN.yaml")
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    name = _set_resnet(cfg, state, BODY_PREFIX if detector else "", path)
    if detector:
        _set_detector(cfg, state)
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    try:
        with torch.device("meta"):
            model = build_model(cfg) if detector else build_backbone(cfg)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is not a {name} of detectron2: {error}") from None
    expected = {key: value.shape for key, value in model.named_parameters()}
    if any(key.endswith(".running_mean") for key in state):
        expected.update(
            (key, value.shape) for key, value in model.named_buffers() if ".norm.running_" in key
        )
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ],
    }
    if any(problems.values()):
        what = f"{'R-CNN with ' if detector else ''}{name}"
        raise WeightsError(
            f"{path} is not a whole {what}; "
            + "; ".join(f"{kind}: {list_some(keys)}" for kind, keys in problems.items() if keys)
        )
    return name


def _set_resnet(cfg: CfgNode, state: State, prefix: str, path: str) -> str:
    """Sets MODEL.RESNETS from the number of blocks and the first 3x3 conv; returns its name."""
    body = [key[len(prefix) :].split(".") for key in state if key.startswith(prefix)]
    blocks = {(key[0], key[1]) for key in body if key[0].startswith("res") and len(key) > 2}
    kind = "bottleneck" if any("conv3" in key for key in body) else "basic"
    depth = 2 + len(blocks) * (3 if kind == "bottleneck" else 2)
    if depth not in _DEPTHS[kind]:
        known = ", ".join(f"R-{depth}" for depths in _DEPTHS.values() for depth in depths)
        raise WeightsError(
            f"{path} has {len(blocks) or 'no'} {kind} blocks in its ResNet; supported: {known}"
        )
    groups, width = 1, 64
    second = state.get(f"{prefix}res2.0.conv2.weight")
    if kind == "bottleneck" and second is not None and second.dim() == 4 and second.size(1) > 0:
        groups = max(second.size(0) // second.size(1), 1)
        width = second.size(0) // groups
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = depth, groups, width
    resnets.RES2_OUT_CHANNELS = 64 if kind == "basic" else 256
    if groups > 1:
        return f"X-{depth}-{groups}x{width}d"
    return f"R-{depth}" if width == 64 else f"R-{depth}-width{width}"


def _set_detector(cfg: CfgNode, state: State) -> None:
    """Sets what may differ between detectors: norms, widths, numbers of layers and classes."""

    def rows(key: str, default: int) -> int:
        return state[key].size(0) if key in state and state[key].dim() else default

    def layers(prefix: str) -> int:
        return len({key.split(".")[2] for key in state if key.startswith(prefix)})

    def norm(conv: str) -> str:
        return "BN" if f"{conv}.norm.weight" in state else ""

    model, box, mask = cfg.MODEL, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    model.FPN.OUT_CHANNELS = rows("backbone.fpn_lateral2.weight", 256)
    model.FPN.NORM = norm("backbone.fpn_lateral2")
    box.NUM_CONV, box.NUM_FC = layers(f"{_BOX}conv"), layers(f"{_BOX}fc")
    box.CONV_DIM, box.FC_DIM = rows(f"{_BOX}conv1.weight", 256), rows(f"{_BOX}fc1.weight", 1024)
    box.NORM = norm(f"{_BOX}conv1")
    classes = rows("roi_heads.box_predictor.cls_score.weight", 81) - 1
    model.ROI_HEADS.NUM_CLASSES = classes
    box.CLS_AGNOSTIC_BBOX_REG = rows("roi_heads.box_predictor.bbox_pred.weight", 0) == 4
    model.MASK_ON = any(key.startswith(_MASK) for key in state)
    mask.NUM_CONV = layers(f"{_MASK}mask_fcn")
    mask.CONV_DIM = rows(f"{_MASK}deconv.weight", 256)
    mask.NORM = norm(f"{_MASK}mask_fcn1")
    mask.CLS_AGNOSTIC_MASK = rows(f"{_MASK}predictor.weight", 0) == 1
