"""Compares mmdetection's detectors with ours, layer by layer and at the end."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from ws_detectron.checkpoint import (
    WSCheckpointer,
    convert_file,
    read_weight_file,
    write_detectron2,
    write_mmdet,
)
from ws_detectron.model_zoo import get_config

from . import mmdet_models
from .measures import LIMITS, Measure, relative_difference, worst

CONFIGS = {
    f"{model}-rcnn_{body}_fpn_gn-ws-all_{schedule}_coco": f"{folder}/mmdet/"
    f"{model}_rcnn_{body.replace('-', '_')}_fpn_gn_ws-all_{schedule}_coco.yaml"
    for model, schedule, folder in (
        ("mask", "2x", "COCO-InstanceSegmentation"),
        ("faster", "1x", "COCO-Detection"),
    )
    for body in ("r50", "r101", "x50-32x4d", "x101-32x4d")
}
"""mmdetection's config -> ours."""

_BOXES_FOR_HEADS, _BOXES_FOR_MASKS = 100, 20
# The score limit allows for float32 rounding over 50 layers, which depends on the summation order:
# 0.97e-4 on an AMD EPYC, on an Intel Xeon 0.59e-4 with one thread and 1.04e-4 with two. In float64
# the logits agree to 1e-14.
_BOX_PIXELS, _SCORE, _MASK_SHARE = 0.01, 2e-4, 0.999


def compare_detector(
    name: str, images: list[torch.Tensor], seed: int, folder: Path
) -> dict[str, list[Measure]]:
    """Builds, saves, converts and loads one detector, and compares both on all images.

    Args:
        name: of mmdetection's config, a key of `CONFIGS`.
        images: RGB (3, H, W).
        seed: of the random weights.
        folder: for the weight files.

    Returns:
        Measures by group: "float32", "float64", "detections", "settings", "files".
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    theirs, text = mmdet_models.build_detector(name)
    mmdet_models.perturb(theirs, generator)
    ours, files = _convert_and_load(name, theirs, text, folder)
    results = {"files": files, "settings": _settings(theirs, ours)}
    results["float32"] = worst([m for image in images for m in _layers(theirs, ours, image)])
    theirs.double(), ours.double()
    results["float64"] = _layers(theirs, ours, images[0])
    theirs.float()
    mmdet_models.spread_outputs(theirs, images[0])
    ours, _ = _convert_and_load(name, theirs, text, folder)
    results["detections"] = worst([m for image in images for m in _detections(theirs, ours, image)])
    return results


def _convert_and_load(name: str, theirs: Any, text: str, folder: Path) -> tuple[Any, list[Measure]]:
    original, converted = folder / "theirs.pth", folder / "ours.pth"
    torch.save({"meta": {"cfg": text}, "state_dict": theirs.state_dict()}, original)
    weights = convert_file(original, ws=True)
    write_detectron2(weights, converted)
    files = _compare_files(theirs, original, converted, folder / "back.pth")
    files.append(Measure("WS convs", float(len(weights.metadata.ws_convs)), 1, True))
    return load_ours(get_config(CONFIGS[name]), converted), files


def load_ours(cfg: CfgNode, weights: Path) -> Any:
    """Our detector in eval mode, with every tensor from the file."""
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    checkpoint = WSCheckpointer(model)
    missing = set(model.state_dict()) - set(read_weight_file(weights)["model"])
    if missing:
        raise AssertionError(f"{weights} lacks {sorted(missing)[:5]}")
    checkpoint.load(str(weights))
    return model


def _compare_files(theirs: Any, original: Path, converted: Path, back: Path) -> list[Measure]:
    write_mmdet(converted, back)
    before = read_weight_file(original)["state_dict"]
    after = read_weight_file(back)["state_dict"]
    changed = set(before) ^ set(after)
    changed |= {key for key in before if key in after and not torch.equal(before[key], after[key])}
    theirs.load_state_dict(after, strict=True)
    return [Measure("tensors changed by converting there and back", float(len(changed)), 0)]


@torch.no_grad()
def _layers(theirs: Any, ours: Any, image: torch.Tensor) -> list[Measure]:
    """Compares features, RPN, box head and mask head; the heads get the same boxes."""
    dtype = next(theirs.parameters()).dtype
    inputs, samples = mmdet_models.preprocess(theirs, image)
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
    # detectron2 keeps boxes in float32.
    boxes = proposals[:_BOXES_FOR_HEADS].float()
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1).to(dtype)
    levels = [our_levels[n] for n in names[:4]]
    their_box = theirs.roi_head._bbox_forward(their_levels, rois)
    head = ours.roi_heads
    features = head.box_head(head.box_pooler(levels, [Boxes(boxes)]))
    scores, deltas = head.box_predictor(features)
    pairs += [
        ("class logits", their_box["cls_score"], scores),
        ("box deltas", their_box["bbox_pred"], deltas),
    ]
    if theirs.with_mask:
        their_masks = theirs.roi_head._mask_forward(their_levels, rois[:_BOXES_FOR_MASKS])
        pooled = head.mask_pooler(levels, [Boxes(boxes[:_BOXES_FOR_MASKS])])
        pairs.append(("mask logits", their_masks["mask_preds"], head.mask_head.layers(pooled)))
    return [Measure(what, relative_difference(a, b), LIMITS[dtype]) for what, a, b in pairs]


@torch.no_grad()
def _detections(theirs: Any, ours: Any, image: torch.Tensor) -> list[Measure]:
    """Compares final detections, which must match one to one."""
    found = mmdet_models.predict(theirs, image)
    height, width = image.shape[-2:]
    mine = ours([{"image": image, "height": height, "width": width}])[0]["instances"]
    boxes, classes, scores = mine.pred_boxes.tensor, mine.pred_classes, mine.scores
    distances = (found.bboxes[:, None] - boxes[None]).abs().amax(dim=2)
    distances[found.labels[:, None] != classes[None]] = float("inf")
    pairs, taken = [], set()
    for i in range(len(found.bboxes)):
        for j in distances[i].argsort().tolist():
            if j not in taken and float(distances[i, j]) <= _BOX_PIXELS:
                pairs.append((i, j))
                taken.add(j)
                break
    unmatched = len(found.bboxes) + len(boxes) - 2 * len(pairs)
    a, b = [i for i, _ in pairs], [j for _, j in pairs]
    measures = [
        Measure("detections", float(len(found.bboxes)), 10, at_least=True),
        Measure("detections of one side only", float(unmatched), 0),
        Measure("box, pixels", _largest(found.bboxes[a] - boxes[b]), _BOX_PIXELS),
        Measure("score", _largest(found.scores[a] - scores[b]), _SCORE),
    ]
    if theirs.with_mask:
        equal = (found.masks[a] == mine.pred_masks[b]).flatten(1).double().mean(dim=1)
        least = float(equal.min()) if len(equal) else 0.0
        measures.append(Measure("share of equal mask pixels", least, _MASK_SHARE, at_least=True))
    return measures


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


@torch.no_grad()
def _settings(theirs: Any, ours: Any) -> list[Measure]:
    """Compares anchors, box coders and class order, which do not depend on weights."""
    from mmdet.datasets import CocoDataset

    sizes = [(25, 38), (13, 19), (7, 10), (4, 5), (2, 3)]
    their_anchors = theirs.rpn_head.prior_generator.grid_priors(sizes, device="cpu")
    features = [torch.zeros(1, 1, *size) for size in sizes]
    our_anchors = ours.proposal_generator.anchor_generator(features)
    anchors = max(_largest(a - b.tensor) for a, b in zip(their_anchors, our_anchors))
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(500, 2, generator=generator) * 300
    boxes = torch.cat([boxes, boxes + 1 + 300 * torch.rand(500, 2, generator=generator)], dim=1)
    deltas = torch.randn(500, 4, generator=generator)
    coders = (
        ("RPN", theirs.rpn_head.bbox_coder, ours.proposal_generator.box2box_transform),
        ("box head", theirs.roi_head.bbox_head.bbox_coder, ours.roi_heads.box_predictor),
    )
    measures = [Measure("anchors, pixels", anchors, 1e-3)]
    for name, coder, transform in coders:
        transform = getattr(transform, "box2box_transform", transform)
        difference = coder.decode(boxes, deltas) - transform.apply_deltas(deltas, boxes)
        measures.append(Measure(f"decoded boxes of the {name}, pixels", _largest(difference), 1e-2))
    names = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]
    unequal = sum(a != b for a, b in zip(CocoDataset.METAINFO["classes"], names))
    measures.append(Measure("classes in another place", float(unequal), 0))
    return measures
