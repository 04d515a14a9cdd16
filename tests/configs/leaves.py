"""The leaves of configs/COCO-*: what their names mean, their merged configs and models."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ws_detectron import add_ws_config

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(path.stem for path in CONFIGS.glob("COCO-*/*.yaml"))

# What the names mean, stated independently of the files.

# norm of backbone, FPN, box head, mask head
NORMS = {
    "bn": ("BN", "BN", "BN", "BN"),
    "frozen_bn": ("FrozenBN", "", "", ""),
    "sync_bn": ("SyncBN", "SyncBN", "SyncBN", "SyncBN"),
    "gn": ("GN", "GN", "GN", "GN"),
    "bn_ws": ("BN", "BN", "BN", "BN"),
    "gn_ws": ("GN", "GN", "GN", "GN"),
}
# depth, groups, width per group, convs (stem, three per block, one shortcut per stage)
BACKBONES = {
    "R_50": (50, 1, 64, 53),
    "R_101": (101, 1, 64, 104),
    "X_50_32x4d": (50, 32, 4, 53),
    "X_101_32x4d": (101, 32, 4, 104),
}
# at 16 images per step: iterations, iterations at which the LR falls, iterations per checkpoint
SCHEDULES = {
    "1x": (90000, (60000, 80000), 7500),
    "3x": (270000, (210000, 250000), 7500),
    "20-23-24e": (24 * 7330, (20 * 7330, 23 * 7330), 7330),
}
IMAGES_PER_GPU = (1, 2, 8)
LR_OF_16_IMAGES = {"mask_rcnn": 0.02, "faster_rcnn": 0.02, "retinanet": 0.01, "panoptic": 0.02}
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
FAIR_GN = "catalog://ImageNetPretrained/FAIR/R-50-GN"
WEIGHTS = {
    ("R_50", "bn"): TORCHVISION,
    ("R_50", "frozen_bn"): TORCHVISION,
    ("R_50", "sync_bn"): TORCHVISION,
    ("R_50", "gn"): FAIR_GN,
    ("R_50", "bn_ws"): "",
    ("R_50", "gn_ws"): "ws://jhu/resnet50_gn_ws",
    ("R_101", "gn_ws"): "ws://jhu/resnet101_gn_ws",
    ("X_50_32x4d", "gn_ws"): "ws://jhu/resnext50_32x4d_gn_ws",
    ("X_101_32x4d", "gn_ws"): "ws://jhu/resnext101_32x4d_gn_ws",
}


@dataclass(frozen=True)
class Name:
    """What the name of a leaf says."""

    scratch: bool
    detector: str
    backbone: str
    schedule: str
    arm: str
    images_per_gpu: int
    towers: bool = False  # norm and WS in RetinaNet's head, too

    @classmethod
    def parse(cls, leaf: str) -> "Name":
        known = [LR_OF_16_IMAGES, BACKBONES, SCHEDULES, NORMS, map(str, IMAGES_PER_GPU)]
        pattern = "(scratch_)?({})_({})_FPN_({})_({})(_towers)?_({})img".format(
            *map("|".join, known)
        )
        match = re.fullmatch(pattern, leaf)
        assert match, f"{leaf} does not follow the naming scheme of configs/README.md"
        scratch, detector, backbone, schedule, arm, towers, images = match.groups()
        return cls(bool(scratch), detector, backbone, schedule, arm, int(images), bool(towers))

    @property
    def ws(self) -> bool:
        return self.arm.endswith("_ws")

    @property
    def weights(self) -> str:
        return "" if self.scratch else WEIGHTS[self.backbone, self.arm]


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


def differing_keys(a: CfgNode, b: CfgNode) -> set[str]:
    """The keys that one config lacks or that have another value in it."""
    flat_a, flat_b = dict(flatten(a)), dict(flatten(b))
    absent = object()
    return {
        key
        for key in flat_a.keys() | flat_b.keys()
        if flat_a.get(key, absent) != flat_b.get(key, absent)
    }


def flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full keys with their values; a tuple counts as the list of its items."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
