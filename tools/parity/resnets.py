"""Compares ResNets of the WS authors, torchvision and timm with ours."""

import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

from ws_detectron.checkpoint import Preprocessing, WSCheckpointer, convert_file, write_detectron2
from ws_detectron.model_zoo import get_config

from .measures import LIMITS, Measure, relative_difference, worst
from .mmdet_models import perturb

_STAGES = ("res2", "res3", "res4", "res5")


class _AuthorsConv2d(nn.Conv2d):
    """The PyTorch code in the README of joe-siyuan-qiao/WeightStandardization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _authors(build: Callable[..., nn.Module]) -> nn.Module:
    model = build(norm_layer=lambda channels: nn.GroupNorm(32, channels))
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = _AuthorsConv2d
    return model


def _as_pth_tar(model: nn.Module, path: Path) -> None:
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 90, "arch": "resnet", "state_dict": state}, path)


def _as_state_dict(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def _as_caffe2(model: nn.Module, path: Path) -> None:
    """With the blob names of Detectron's R-50-GN, pickled as by Python 2."""
    blobs = {}
    for key, value in model.state_dict().items():
        if key.startswith("fc."):
            blobs["pred_" + key[3]] = value.numpy()
            continue
        name = re.sub(r"^(conv|bn)1\.", r"conv1.\1.", key)
        name = re.sub(
            r"^layer(\d)\.(\d+)\.(conv|bn)(\d)",
            lambda m: f"res{int(m[1]) + 1}_{m[2]}_branch2{'abc'[int(m[4]) - 1]}.{m[3]}",
            name,
        )
        name = re.sub(
            r"^layer(\d)\.(\d+)\.downsample\.(\d)",
            lambda m: f"res{int(m[1]) + 1}_{m[2]}_branch1.{('conv', 'bn')[int(m[3])]}",
            name,
        )
        for ending, blob in (
            (".conv.weight", "_w"),
            (".bn.weight", "_gn_s"),
            (".bn.bias", "_gn_b"),
        ):
            name = name.replace(ending, blob)
        blobs[name] = value.numpy()
    with open(path, "wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)


class _Case(NamedTuple):
    """How an original ResNet is built and saved, and its architecture."""

    build: Callable[[], nn.Module]
    save: Callable[[nn.Module, Path], None]
    filename: str
    source: str = "auto"
    depth: int = 50
    groups: int = 1
    width_per_group: int = 64


_R18 = partial(torchvision.models.resnet18, weights=None)
_R50 = partial(torchvision.models.resnet50, weights=None)
_R101 = partial(torchvision.models.resnet101, weights=None)
_X50 = partial(torchvision.models.resnext50_32x4d, weights=None)
_TIMM_R50 = partial(timm.create_model, "resnet50", pretrained=False)
_TIMM_R50_GN = partial(timm.create_model, "resnet50_gn", pretrained=False)

CASES = {
    "WS authors' R-50 (.pth.tar)": _Case(
        partial(_authors, _R50), _as_pth_tar, "R-50-GN-WS.pth.tar"
    ),
    "WS authors' R-101 (.pth.tar)": _Case(
        partial(_authors, _R101), _as_pth_tar, "R-101-GN-WS.pth.tar", depth=101
    ),
    "WS authors' X-50 (.pth.tar)": _Case(
        partial(_authors, _X50), _as_pth_tar, "X-50-GN-WS.pth.tar", groups=32, width_per_group=4
    ),
    "WS authors' R-50 (Caffe2-style .pkl)": _Case(
        partial(_authors, _R50), _as_caffe2, "R-50-GN-WS.pkl"
    ),
    "torchvision resnet50": _Case(_R50, _as_state_dict, "resnet50.pth"),
    "torchvision resnet18": _Case(_R18, _as_state_dict, "resnet18.pth", depth=18),
    "timm resnet50": _Case(_TIMM_R50, _as_state_dict, "resnet50.pth", "timm"),
    "timm resnet50_gn": _Case(_TIMM_R50_GN, _as_state_dict, "resnet50_gn.pth", "timm"),
}


def compare_resnet(
    name: str, images: list[torch.Tensor], seed: int, folder: Path
) -> dict[str, list[Measure]]:
    """Builds, saves, converts and loads one ResNet, and compares the outputs of its stages.

    Args:
        name: a key of `CASES`.
        images: RGB (3, H, W).
        seed: of the random weights.
        folder: for the weight files.

    Returns:
        Measures by group: "float32", "float64".
    """
    case = CASES[name]
    torch.manual_seed(seed)
    theirs = case.build().eval()
    perturb(theirs, torch.Generator().manual_seed(seed))
    case.save(theirs, folder / case.filename)
    weights = convert_file(folder / case.filename, case.source)
    write_detectron2(weights, folder / "ours.pth")

    cfg = get_config("COCO-Detection/mmdet/Base-gn_ws-all.yaml")
    cfg.MODEL.RESNETS.DEPTH = case.depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if case.depth < 50 else 256
    cfg.MODEL.RESNETS.NUM_GROUPS = case.groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = case.width_per_group
    cfg.MODEL.RESNETS.NORM = "GN" if weights.metadata.norm == "GN" else "FrozenBN"
    builder = "build_ws_resnet_backbone" if weights.metadata.ws_convs else "build_resnet_backbone"
    ours = BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=3)).eval()
    WSCheckpointer(ours).load(str(folder / "ours.pth"))

    preprocessing = weights.metadata.preprocessing
    if preprocessing is None:
        raise AssertionError(f"{name} has no preprocessing")
    results = {
        "float32": worst([m for im in images for m in _stages(theirs, ours, im, preprocessing)])
    }
    theirs.double(), ours.double()
    results["float64"] = _stages(theirs, ours, images[0], preprocessing)
    return results


@torch.no_grad()
def _stages(
    theirs: Any, ours: nn.Module, image: torch.Tensor, preprocessing: Preprocessing
) -> list[Measure]:
    dtype = next(theirs.parameters()).dtype
    if preprocessing.input_format == "BGR":
        image = image.flip(0)
    shape = (3, 1, 1)
    mean = torch.tensor(preprocessing.pixel_mean, dtype=dtype).view(shape)
    std = torch.tensor(preprocessing.pixel_std, dtype=dtype).view(shape)
    x = ((image - mean) / std)[None]
    mine = ours(x)
    x = theirs.maxpool(getattr(theirs, "relu", nn.ReLU())(theirs.bn1(theirs.conv1(x))))
    measures = []
    for stage, layer in zip(_STAGES, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
        x = layer(x)
        measures.append(Measure(stage, relative_difference(x, mine[stage]), LIMITS[dtype]))
    return measures
