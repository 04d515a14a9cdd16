"""The leaves of configs/COCO-*: what their names say, their merged configs and models."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ws_detectron import add_ws_config
from ws_detectron.engine import as_flat_dict

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(path.stem for path in CONFIGS.glob("COCO-*/*.yaml"))

# What the names mean, stated independently of the files.


@dataclass(frozen=True)
class Variant:
    """A choice of normalization: norm layers, WS or not, MODEL.WEIGHTS and further keys."""

    backbone: str
    elsewhere: str  # in FPN and heads
    weights: str
    ws: bool = False  # behind each norm layer
    keys: dict[str, Any] = field(default_factory=dict)


TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
FAIR_GN = "catalog://ImageNetPretrained/FAIR/R-50-GN"
VARIANTS = {
    "bn": Variant("BN", "BN", TORCHVISION),
    "frozen_bn": Variant("FrozenBN", "", TORCHVISION),
    "frozen_bn_aws": Variant(
        *("FrozenBN", "", TORCHVISION, True),
        keys={"MODEL.WS.AFFINE": True, "MODEL.WS.MODE": "aws", "MODEL.WS.FPN": False},
    ),
    "sync_bn": Variant("SyncBN", "SyncBN", TORCHVISION),
    "gn": Variant("GN", "GN", FAIR_GN),
    "bn_ws": Variant("BN", "BN", "", ws=True),
    "gn_ws": Variant("GN", "GN", "ws://jhu/{backbone}_gn_ws", ws=True),
}
BIT = "BiT_R_50x1"
BIT_WEIGHTS = "ws://bit/resnetv2_50x1_bit.goog_in21k"
# depth, groups, width per group, convs (stem, three per block, one shortcut per stage), weights
BACKBONES = {
    BIT: (50, 1, 64, 53, ""),
    "R_50": (50, 1, 64, 53, "resnet50"),
    "R_101": (101, 1, 64, 104, "resnet101"),
    "X_50_32x4d": (50, 32, 4, 53, "resnext50_32x4d"),
    "X_101_32x4d": (101, 32, 4, 104, "resnext101_32x4d"),
}
# at 16 images per step: iterations, iterations at which the LR falls, iterations per checkpoint
SCHEDULES = {
    "1x": (90000, (60000, 80000), 7500),
    "3x": (270000, (210000, 250000), 7500),
    "20-23-24e": (24 * 7330, (20 * 7330, 23 * 7330), 7330),
}
IMAGES_PER_GPU = (1, 2, 8)
LR_OF_16_IMAGES = {"mask_rcnn": 0.02, "faster_rcnn": 0.02, "retinanet": 0.01, "panoptic": 0.02}
RGB_INPUT = ("RGB", [123.675, 116.280, 103.530], [58.395, 57.120, 57.375])
BIT_INPUT = ("RGB", [127.5] * 3, [127.5] * 3)
BGR_INPUT = ("BGR", [103.530, 116.280, 123.675], [1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Name:
    """What the name of a leaf says."""

    scratch: bool
    detector: str
    backbone: str
    schedule: str
    variant: str
    towers: bool  # norm and WS in RetinaNet's head, too
    images_per_gpu: int

    @classmethod
    def parse(cls, leaf: str) -> "Name":
        known = [LR_OF_16_IMAGES, BACKBONES, SCHEDULES, VARIANTS, map(str, IMAGES_PER_GPU)]
        pattern = "(scratch_)?({})_({})_FPN_({})_({})(_towers)?_({})img".format(
            *map("|".join, known)
        )
        match = re.fullmatch(pattern, leaf)
        assert match, f"{leaf} does not follow the naming scheme of configs/README.md"
        scratch, detector, backbone, schedule, variant, towers, images = match.groups()
        return cls(bool(scratch), detector, backbone, schedule, variant, bool(towers), int(images))

    @property
    def ws(self) -> bool:
        return VARIANTS[self.variant].ws

    @property
    def weights(self) -> str:
        if self.backbone == BIT:
            return BIT_WEIGHTS
        backbone = BACKBONES[self.backbone][4]
        return "" if self.scratch else VARIANTS[self.variant].weights.format(backbone=backbone)

    def keys(self) -> dict[str, Any]:
        """Every key that the name decides, with its value; tuples as lists."""
        return {**self._start(), **self._model(), **self._schedule()}

    def _start(self) -> dict[str, Any]:
        inputs = {FAIR_GN: BGR_INPUT, BIT_WEIGHTS: BIT_INPUT}
        image, mean, std = inputs.get(self.weights, RGB_INPUT)
        return {
            "MODEL.WEIGHTS": self.weights,
            "MODEL.BACKBONE.FREEZE_AT": 2 if self.weights else 0,
            "INPUT.FORMAT": image,
            "MODEL.PIXEL_MEAN": mean,
            "MODEL.PIXEL_STD": std,
        }

    def _model(self) -> dict[str, Any]:
        variant = VARIANTS[self.variant]
        ws = "WS" if self.ws and variant.elsewhere else ""  # WS needs a norm layer
        depth, groups, width, *_ = BACKBONES[self.backbone]
        retinanet, panoptic = self.detector == "retinanet", self.detector == "panoptic"
        builder = "build_{}{}resnet_fpn_backbone"
        prefix = "bit_" if self.backbone == BIT else "ws_" * self.ws
        keys = {
            "MODEL.RESNETS.DEPTH": depth,
            "MODEL.RESNETS.NUM_GROUPS": groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": width,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RESNETS.NORM": variant.backbone,
            "MODEL.FPN.NORM": variant.elsewhere,
            "MODEL.BACKBONE.NAME": builder.format(prefix, "retinanet_" if retinanet else ""),
            "MODEL.WS.MODE": "bit" if self.backbone == BIT else "official",
            "MODEL.WS.EPS": 1e-8 if self.backbone == BIT else 1e-5,
            **variant.keys,
        }
        if retinanet:
            return {
                **keys,
                "MODEL.META_ARCHITECTURE": "WSRetinaNet" if self.towers else "RetinaNet",
                "MODEL.RETINANET.NORM": variant.elsewhere if self.towers else "",
            }
        data = "coco_2017_{}_panoptic_separated" if panoptic else "coco_2017_{}"
        return {
            **keys,
            "MODEL.META_ARCHITECTURE": "PanopticFPN" if panoptic else "GeneralizedRCNN",
            "MODEL.MASK_ON": self.detector != "faster_rcnn",
            "MODEL.ROI_BOX_HEAD.NAME": f"{ws}FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NORM": variant.elsewhere,
            "MODEL.ROI_MASK_HEAD.NAME": f"{ws}MaskRCNNConvUpsampleHead",
            "MODEL.ROI_MASK_HEAD.NORM": variant.elsewhere,
            # detectron2's defaults where there is no semantic head
            "MODEL.SEM_SEG_HEAD.NAME": f"{ws if panoptic else ''}SemSegFPNHead",
            "MODEL.SEM_SEG_HEAD.NORM": variant.elsewhere if panoptic else "GN",
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 0.5 if panoptic else 1.0,
            "DATASETS.TRAIN": [data.format("train")],
            "DATASETS.TEST": [data.format("val")],
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS": not panoptic,
        }

    def _schedule(self) -> dict[str, Any]:
        """The linear rule, from 16 images per step to 8 GPUs with `images_per_gpu` each."""
        images = 8 * self.images_per_gpu
        max_iter, steps, period = SCHEDULES[self.schedule]
        # whole numbers, so that as many images are seen as at 16
        assert not any(iterations * 16 % images for iterations in (max_iter, *steps, period, 1000))
        return {
            "SOLVER.REFERENCE_WORLD_SIZE": 8,
            "SOLVER.IMS_PER_BATCH": images,
            "SOLVER.BASE_LR": LR_OF_16_IMAGES[self.detector] * images / 16,
            "SOLVER.MAX_ITER": max_iter * 16 // images,
            "SOLVER.STEPS": [step * 16 // images for step in steps],
            "SOLVER.WARMUP_ITERS": 1000 * 16 // images,
            "SOLVER.CHECKPOINT_PERIOD": period * 16 // images,
            # each checkpoint holds precise BN statistics and is evaluated
            "TEST.EVAL_PERIOD": period * 16 // images,
            "TEST.PRECISE_BN.ENABLED": True,
            "TEST.PRECISE_BN.NUM_ITER": 400 // self.images_per_gpu,
        }


def path_of(leaf: str) -> Path:
    """The file of a leaf."""
    (path,) = CONFIGS.glob(f"COCO-*/{leaf}.yaml")
    return path


@cache
def load(leaf: str) -> CfgNode:
    """The merged config of a leaf; frozen, since tests share it."""
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.merge_from_file(str(path_of(leaf)), allow_unsafe=False)
    cfg.freeze()
    return cfg


@cache
def build(leaf: str) -> nn.Module:
    """The model of a leaf without memory for its parameters, which makes building it cheap."""
    cfg = load(leaf).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def flatten(cfg: CfgNode) -> dict[str, Any]:
    """Full keys with their values; a tuple counts as the list of its items."""
    values = as_flat_dict(cfg)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def differing_keys(a: CfgNode, b: CfgNode) -> set[str]:
    """The keys that one config lacks or that have another value in it."""
    flat_a, flat_b = flatten(a), flatten(b)
    absent = object()
    return {
        key
        for key in flat_a.keys() | flat_b.keys()
        if flat_a.get(key, absent) != flat_b.get(key, absent)
    }
