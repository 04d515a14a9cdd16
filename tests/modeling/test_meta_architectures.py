"""The WS backbone inside detectron2's other models: one training step and one inference each."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from ws_detectron import WSConv2d, add_ws_config

SIZE = 64
MODELS = {
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "resnet_fpn"),
    "Faster R-CNN C4": ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "resnet"),
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "retinanet_resnet_fpn"),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "resnet_fpn"),
    "Cascade Mask R-CNN": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "resnet_fpn"),
    "Keypoint R-CNN": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", "resnet_fpn"),
    "RetinaNet with WS towers": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "retinanet_resnet_fpn",
        ("MODEL.META_ARCHITECTURE", "WSRetinaNet", "MODEL.RETINANET.NORM", "GN"),
    ),
    "Panoptic FPN": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", "resnet_fpn"),
    "Panoptic FPN with WS semantic head": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        "resnet_fpn",
        ("MODEL.SEM_SEG_HEAD.NAME", "WSSemSegFPNHead"),
    ),
}


# WS convs outside of backbone and ROI heads
OTHER_WS_CONVS = {"RetinaNet with WS towers": 8, "Panoptic FPN with WS semantic head": 7}


def model_config(path: str, backbone: str, opts: tuple[str, ...] = ()) -> CfgNode:
    """A model-zoo config with the WS backbone named, and small numbers of proposals."""
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(path))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = f"build_ws_{backbone}_backbone"
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    if backbone == "resnet_fpn":
        head = cfg.MODEL.ROI_BOX_HEAD
        head.NAME, head.NORM, head.NUM_CONV, head.NUM_FC = "WSFastRCNNConvFCHead", "GN", 1, 1
        head.CONV_DIM = head.FC_DIM = 32
        cfg.MODEL.ROI_MASK_HEAD.NAME = "WSMaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NORM = "GN"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    for phase in ("TRAIN", "TEST"):
        cfg.MODEL.RPN[f"PRE_NMS_TOPK_{phase}"] = 100
        cfg.MODEL.RPN[f"POST_NMS_TOPK_{phase}"] = 20
    cfg.merge_from_list(list(opts))
    return cfg


def example(cfg: CfgNode) -> dict:
    """One image with one object of class 0, annotated for every kind of head."""
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 48.0, 48.0]]))
    instances.gt_classes = torch.tensor([0])
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, 8:48, 8:48] = True
    instances.gt_masks = BitMasks(mask)
    if cfg.MODEL.KEYPOINT_ON:
        points = torch.rand(1, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3) * 39 + 8
        points[..., 2] = 2
        instances.gt_keypoints = Keypoints(points)
    return {
        "image": torch.rand(3, SIZE, SIZE) * 255,
        "height": SIZE,
        "width": SIZE,
        "instances": instances,
        "sem_seg": torch.zeros(SIZE, SIZE, dtype=torch.int64),
    }


@pytest.mark.parametrize("name", MODELS)
def test_trains_a_step_and_infers(name: str) -> None:
    cfg = model_config(*MODELS[name])
    if name.endswith("C4"):  # res5 belongs to its ROI heads, which have no WS form
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        cfg.MODEL.RESNETS.NORM = "BN"
    model = build_model(cfg)
    assert any(isinstance(m, WSConv2d) for m in model.backbone.modules())
    heads = (getattr(model, part, nn.Identity()) for part in ("head", "sem_seg_head"))
    others = sum(isinstance(m, WSConv2d) for head in heads for m in head.modules())
    assert others == OTHER_WS_CONVS.get(name, 0)
    with EventStorage():
        losses = model([example(cfg)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = [p for p in ws_parameters(model) if p.requires_grad]
    assert trained and all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    model.eval()
    with torch.no_grad():
        (output,) = model([{"image": example(cfg)["image"], "height": SIZE, "width": SIZE}])
    assert "instances" in output


def ws_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, WSConv2d)]
