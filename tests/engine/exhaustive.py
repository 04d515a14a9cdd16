"""A Mask R-CNN whose losses weight all images equally in any batch, and inputs for it.

Nothing is sampled at random: RPN and RoI heads take all there is. Each image has two objects, which
are its only foreground, and ten proposals besides.
"""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from ws_detectron.engine import load_config

CONFIG = "quickstart/mask_rcnn_R_18_FPN_fashion_{}_1img.yaml"
SIZE = 64
EXHAUSTIVE = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4096,  # there are about 1000 anchors
    "MODEL.RPN.LOSS_WEIGHT": 100.0,  # makes up for dividing by 4096
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 12,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.5,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.95],
    "DATALOADER.NUM_WORKERS": 0,
}


def config(variant: str) -> CfgNode:
    """The quick start's fashion model of a variant, "bn" or "gn_ws", that samples nothing."""
    cfg = load_config(CONFIG.format(variant))
    cfg.merge_from_list([word for pair in EXHAUSTIVE.items() for word in pair])
    return cfg


def model(variant: str) -> nn.Module:
    """The same weights at each call, in float64.

    Among millions of activations some lie so near 0 that the rounding of float32, which depends on
    the batch and the processor, decides whether ReLU lets them pass; one of them moved gradients by
    1 %. Proposals are made in float32, as torchvision's NMS gets them.
    """
    torch.manual_seed(3)
    made = build_model(config(variant)).double().train()
    made.proposal_generator.anchor_generator.float()
    made.proposal_generator.rpn_head.register_forward_hook(_in_float32)
    return made


def _in_float32(module: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
    return tuple([level.float() for level in levels] for levels in outputs)


def images(count: int) -> list[dict]:
    """Noise with two brighter rectangles each; the first images are the same for any `count`."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        image = 40 + 60 * torch.rand(3, SIZE, SIZE, generator=generator)
        boxes, masks = [], torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
        for mask, left in zip(masks, (4 + number, 34 + number)):
            box = [left, 8 + 5 * number, left + 20, 36 + 5 * number]
            mask[box[1] : box[3], box[0] : box[2]] = True
            image[:, mask] += 30.0 * (number + 1)
            boxes.append(box)
        truth = Instances((SIZE, SIZE))
        truth.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        truth.gt_classes = torch.tensor([number % 10, (number + 1) % 10])
        truth.gt_masks = BitMasks(masks)
        made.append({"image": image, "instances": truth, "height": SIZE, "width": SIZE})
    return made


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest norm of a parameter's difference, relative to that of its expected gradient.

    Gradients that are zero but for rounding, as those of a filter's mean under WS cannot be told
    from it, are measured against the typical norm instead.
    """
    assert found.keys() == expected.keys()
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    typical = sorted(norms.values())[len(norms) // 2]
    return max(
        float((found[name] - expected[name]).norm()) / max(norms[name], 1e-2 * typical)
        for name in norms
    )
