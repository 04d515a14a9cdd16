"""Compares mmdetection's detectors with ours, layer by layer and at the end."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torchvision import ops

from ws_detectron.checkpoint import (
    WSCheckpointer,
    convert_file,
    read_weight_file,
    write_detectron2,
    write_mmdet,
)
from ws_detectron.model_zoo import get_config

from . import Measure, compare, perturb


def _nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int
) -> torch.Tensor:
    if offset != 0:
        raise NotImplementedError(f"nms with offset {offset}")
    return ops.nms(boxes, scores, iou_threshold)


def _roi_align_forward(
    features: torch.Tensor, rois: torch.Tensor, output: torch.Tensor, *argmax: Any, **how: Any
) -> None:
    if how["pool_mode"] != 1:
        raise NotImplementedError("RoIAlign with max pooling")
    names = ("spatial_scale", "sampling_ratio", "aligned")
    size = (how["aligned_height"], how["aligned_width"])
    output.copy_(ops.roi_align(features, rois, size, *(how[name] for name in names)))


# mmcv-lite has mmcv's Python code, including `RoIAlign`, `nms` and `batched_nms`, but not the
# compiled module. Its two kernels that are needed are torchvision's, as on our side; their
# arguments, the class offsets of batched NMS and everything else are mmcv's. Other ops are None.
kernels: Any = ModuleType("mmcv._ext")
kernels.nms, kernels.roi_align_forward = _nms, _roi_align_forward
kernels.__getattr__ = lambda name: None
sys.modules["mmcv._ext"] = kernels

import mmdet  # noqa: E402  (needs the kernels)
import mmdet.models  # noqa: E402, F401
from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

DETECTORS = {
    f"{model}-rcnn_{body}_fpn_gn-ws-all_{schedule}_coco": f"{folder}/mmdet/"
    f"{model}_rcnn_{body.replace('-', '_')}_fpn_gn_ws-all_{schedule}_coco.yaml"
    for model, schedule, folder in (
        ("mask", "2x", "COCO-InstanceSegmentation"),
        ("faster", "1x", "COCO-Detection"),
    )
    for body in ("r50", "r101", "x50-32x4d", "x101-32x4d")
}
"""mmdetection's config -> ours."""

# Standard deviation to which the output of each last layer is scaled, so that scores spread, boxes
# move and masks have both signs. As initialized, no score would pass the threshold.
_SPREAD = {
    "rpn_head.rpn_cls": 2.0,
    "rpn_head.rpn_reg": 0.3,
    "roi_head.bbox_head.fc_cls": 2.5,
    "roi_head.bbox_head.fc_reg": 1.0,
    "roi_head.mask_head.conv_logits": 3.0,
}
_BOXES_FOR_HEADS, _BOXES_FOR_MASKS, _LEAST_DETECTIONS = 100, 20, 10
# The score limit allows for float32 rounding over 50 layers, which depends on the summation order:
# 0.97e-4 on an AMD EPYC, on an Intel Xeon 0.59e-4 with one thread and 1.04e-4 with two. In float64
# the logits agree to 1e-14.
_BOX_PIXELS, _SCORE, _MASK_SHARE = 0.01, 2e-4, 0.001


def compare_detector(
    name: str, images: list[torch.Tensor], seed: int, folder: Path
) -> Iterator[Measure]:
    """Builds, saves, converts and loads one detector, and compares both on all images.

    Args:
        name: of mmdetection's config, a key of `DETECTORS`.
        images: RGB (3, H, W); layers in float64 are those of the first.
        seed: of the random weights.
        folder: for the weight files.
    """
    torch.manual_seed(seed)
    init_default_scope("mmdet")
    configs = Path(mmdet.__file__).parent / ".mim" / "configs" / "gn+ws"
    config = Config.fromfile(configs / f"{name}.py")
    theirs = MODELS.build(config.model).eval()
    perturb(theirs, seed)
    ours = _converted(name, theirs, config.pretty_text, folder)
    yield "settings", "tensors changed by converting there and back", _changed(theirs, folder), 0
    ours_named = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]
    moved = sum(a != b for a, b in zip(CocoDataset.METAINFO["classes"], ours_named))
    yield "settings", "classes in another place", moved, 0
    for image in images:
        yield from _compare_layers(theirs, ours, image)
    yield from _compare_layers(theirs.double(), ours.double(), images[0])
    _spread_outputs(theirs.float(), images[0])
    ours = _converted(name, theirs, config.pretty_text, folder)
    for image in images:
        yield from _compare_detections(theirs, ours, image)


def _converted(name: str, theirs: Any, config: str, folder: Path) -> Any:
    """Our detector in eval mode, with every tensor from the converted file."""
    torch.save({"meta": {"cfg": config}, "state_dict": theirs.state_dict()}, folder / "theirs.pth")
    weights = convert_file(folder / "theirs.pth", ws=True)
    write_detectron2(weights, folder / "ours.pth")
    cfg = get_config(DETECTORS[name])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    missing = set(model.state_dict()) - set(read_weight_file(folder / "ours.pth")["model"])
    if missing or not weights.metadata.ws_convs:
        raise AssertionError(f"the converted file lacks WS convs or {sorted(missing)[:5]}")
    WSCheckpointer(model).load(str(folder / "ours.pth"))
    return model


def _changed(theirs: Any, folder: Path) -> int:
    """The number of tensors that differ after converting ours back."""
    write_mmdet(folder / "ours.pth", folder / "back.pth")
    before, after = (
        read_weight_file(folder / file)["state_dict"] for file in ("theirs.pth", "back.pth")
    )
    theirs.load_state_dict(after, strict=True)
    return sum(not torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def _spread_outputs(model: Any, image: torch.Tensor) -> None:
    """Scales and shifts the last layers so that their outputs on `image` vary."""
    rpn = model.rpn_head.test_cfg
    limit, rpn.max_per_img = rpn.max_per_img, 100
    for name, target in _SPREAD.items():
        layer = dict(model.named_modules()).get(name)
        if layer is None:
            continue
        outputs: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))  # noqa: B023
        _predict(model, image)
        handle.remove()
        output = torch.cat([out.transpose(0, 1).flatten(1) for out in outputs], dim=1)
        scale = target / output.std(dim=1)
        layer.weight *= scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.copy_((layer.bias - output.mean(dim=1)) * scale)
    rpn.max_per_img = limit


def _preprocess(model: Any, image: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """mmdetection's preprocessing of one image, which it reads as BGR."""
    size = tuple(image.shape[-2:])
    sample = DetDataSample()
    sample.set_metainfo({"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
    data = model.data_preprocessor({"inputs": [image.flip(0)], "data_samples": [sample]}, False)
    return data["inputs"], data["data_samples"]


def _predict(model: Any, image: torch.Tensor) -> Any:
    """mmdetection's detections in one image: `bboxes`, `scores`, `labels` and perhaps `masks`."""
    inputs, samples = _preprocess(model, image)
    return model.predict(inputs, samples, rescale=True)[0].pred_instances


@torch.no_grad()
def _compare_layers(theirs: Any, ours: Any, image: torch.Tensor) -> Iterator[Measure]:
    """Compares features, RPN, box head and mask head; the heads get the same boxes."""
    inputs, samples = _preprocess(theirs, image)
    batch = ours.preprocess_image([{"image": image}])
    pairs = [("input", inputs, batch.tensor)]

    their_levels = theirs.extract_feat(inputs)
    our_levels = ours.backbone(batch.tensor)
    names = [f"p{level}" for level in range(2, 7)]
    pairs += [(n, level, our_levels[n]) for n, level in zip(names, their_levels)]

    their_rpn = theirs.rpn_head(their_levels)
    our_rpn = ours.proposal_generator.rpn_head([our_levels[n] for n in names])
    for what, their_side, our_side in zip(("RPN logits", "RPN deltas"), their_rpn, our_rpn):
        pairs += [(f"{what} {n}", a, b) for n, a, b in zip(names, their_side, our_side)]

    proposals = theirs.rpn_head.predict(their_levels, samples, rescale=False)[0].bboxes
    boxes = proposals[:_BOXES_FOR_HEADS].float()  # detectron2 keeps boxes in float32
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1).to(inputs.dtype)
    levels = [our_levels[n] for n in names[:4]]
    their_box = theirs.roi_head._bbox_forward(their_levels, rois)
    head = ours.roi_heads
    scores, deltas = head.box_predictor(head.box_head(head.box_pooler(levels, [Boxes(boxes)])))
    pairs += [
        ("class logits", their_box["cls_score"], scores),
        ("box deltas", their_box["bbox_pred"], deltas),
    ]
    if theirs.with_mask:
        their_masks = theirs.roi_head._mask_forward(their_levels, rois[:_BOXES_FOR_MASKS])
        pooled = head.mask_pooler(levels, [Boxes(boxes[:_BOXES_FOR_MASKS])])
        pairs.append(("mask logits", their_masks["mask_preds"], head.mask_head.layers(pooled)))
    yield from compare(pairs)


@torch.no_grad()
def _compare_detections(theirs: Any, ours: Any, image: torch.Tensor) -> Iterator[Measure]:
    """Compares final detections, which must match one to one."""
    found = _predict(theirs, image)
    height, width = image.shape[-2:]
    mine = ours([{"image": image, "height": height, "width": width}])[0]["instances"]
    boxes, classes, scores = mine.pred_boxes.tensor, mine.pred_classes, mine.scores
    if len(found.bboxes) < _LEAST_DETECTIONS:
        raise AssertionError(f"only {len(found.bboxes)} detections to compare")
    distances = (found.bboxes[:, None] - boxes[None]).abs().amax(dim=2)
    distances[found.labels[:, None] != classes[None]] = float("inf")
    partner: dict[int, int] = {}  # ours -> theirs
    for i, row in enumerate(distances):
        near = (j for j in row.argsort().tolist() if row[j] <= _BOX_PIXELS and j not in partner)
        partner.update({j: i for j in [next(near, None)] if j is not None})
    a, b = list(partner.values()), list(partner)
    differences = {
        "box (pixels)": (found.bboxes[a] - boxes[b], _BOX_PIXELS),
        "score": (found.scores[a] - scores[b], _SCORE),
    }
    if theirs.with_mask:
        unequal = (found.masks[a] != mine.pred_masks[b]).flatten(1).double().mean(dim=1)
        differences["mask (share)"] = (unequal, _MASK_SHARE)
    yield "detections", "detections", len(found.bboxes), None
    yield "detections", "in one only", len(found.bboxes) + len(boxes) - 2 * len(partner), 0
    for what, (difference, limit) in differences.items():
        yield "detections", what, float(difference.abs().max()) if partner else 0.0, limit
