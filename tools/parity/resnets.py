"""Compares ResNets of the WS authors, torchvision, timm, Google (BiT) and mmcv with ours."""

import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from mmcv.cnn import ConvAWS2d
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50, resnet101, resnext50_32x4d

from ws_detectron.checkpoint import Preprocessing, WSCheckpointer, convert_file, write_detectron2
from ws_detectron.model_zoo import get_config

from . import Measure, compare, perturb


class _AuthorsConv2d(nn.Conv2d):
    """The PyTorch code in the README of joe-siyuan-qiao/WeightStandardization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _authors(resnet: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = resnet(norm_layer=lambda channels: nn.GroupNorm(32, channels))
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = _AuthorsConv2d
        return model

    return build


def _bit(name: str, eps: float = 1e-8) -> Callable[[], nn.Module]:
    """A BiT model of timm, with the `eps` of its WS; 1e-8 is timm's."""

    def build() -> nn.Module:
        model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, timm.layers.StdConv2d):
                module.eps = eps
        return model

    return build


def _affine(resnet: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = resnet()
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = ConvAWS2d
                gamma, beta = module.weight.new_zeros(2, module.out_channels, 1, 1, 1)
                module.register_buffer("weight_gamma", gamma)
                module.register_buffer("weight_beta", beta)
        return model

    return build


def _save(model: nn.Module, path: Path) -> None:
    """Saves as the source does: a training's state, Caffe2 blobs, arrays or a state dict.

    Affine WS starts from plain weights, so its buffers are left out.
    """
    state = {key: value for key, value in model.state_dict().items() if "weight_" not in key}
    if path.suffix == ".safetensors":
        save_file(state, path)
        return
    if path.suffix == ".npz":
        arrays = {_google_name(key): value.numpy() for key, value in state.items()}
        np.savez(
            path, **{n: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for n, a in arrays.items()}
        )
        # As timm's own reader of Google's files understands this one.
        torch.nn.init.zeros_(model.get_parameter("norm.weight"))
        model.load_pretrained(path)  # type: ignore[operator]
        if any(not torch.equal(value, state[key]) for key, value in model.state_dict().items()):
            raise AssertionError("timm reads other weights than were saved")
        return
    if path.suffix == ".tar":
        state = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 90, "arch": "resnet", "state_dict": state}, path)
    elif path.suffix == ".pkl":  # pickled as by Python 2
        blobs = {_caffe2_name(key): value.numpy() for key, value in state.items()}
        path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    else:
        torch.save(state, path)


def _google_name(key: str) -> str:
    """The name of a parameter of timm's BiT in Google's `.npz`."""
    key = re.sub(
        r"^stages\.(\d)\.blocks\.(\d+)\.",
        lambda m: f"block{int(m[1]) + 1}/unit{int(m[2]) + 1:02d}/",
        key,
    )
    key = re.sub(r"(conv|norm)([123])\.", lambda m: f"{'abc'[int(m[2]) - 1]}/{m[1]}.", key)
    key = key.replace("stem.", "root_block/").replace("downsample.", "a/proj/")
    key = key.replace("head.fc.weight", "head/conv2d/kernel").replace("head.fc", "head/conv2d/")
    key = key.replace("conv.weight", "standardized_conv2d/kernel")
    key = key.replace("norm.weight", "group_norm/gamma").replace("norm.bias", "group_norm/beta")
    return f"resnet/{key.replace('/.', '/')}"


def _caffe2_name(key: str) -> str:
    """The name of a parameter as a blob of Detectron's R-50-GN."""
    if key.startswith("fc."):
        return f"pred_{key[3]}"
    key = re.sub(r"^(conv|bn)1\.", r"conv1.\1.", key)
    key = re.sub(r"^layer(\d)\.(\d+)", lambda m: f"res{int(m[1]) + 1}_{m[2]}", key)
    key = re.sub(r"\.(conv|bn)([123])", lambda m: f"_branch2{'abc'[int(m[2]) - 1]}.{m[1]}", key)
    key = key.replace(".downsample.0", "_branch1.conv").replace(".downsample.1", "_branch1.bn")
    endings = {".conv.weight": "_w", ".bn.weight": "_gn_s", ".bn.bias": "_gn_b"}
    return re.sub("|".join(map(re.escape, endings)), lambda m: endings[m[0]], key)


_X50: dict[str, Any] = {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}
_R18: dict[str, Any] = {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}
_R50X3 = {"STEM_OUT_CHANNELS": 192, "WIDTH_PER_GROUP": 192, "RES2_OUT_CHANNELS": 768}
RESNETS: dict[str, tuple[Callable[[], nn.Module], str, str, dict[str, Any]]] = {
    "WS authors' R-50 (.pth.tar)": (_authors(resnet50), "R-50-GN-WS.pth.tar", "auto", {}),
    "WS authors' R-101 (.pth.tar)": (
        *(_authors(resnet101), "R-101-GN-WS.pth.tar", "auto", {"DEPTH": 101}),
    ),
    "WS authors' X-50 (.pth.tar)": (
        *(_authors(resnext50_32x4d), "X-50-GN-WS.pth.tar", "auto", _X50),
    ),
    "WS authors' R-50 (Caffe2-style .pkl)": (_authors(resnet50), "R-50-GN-WS.pkl", "auto", {}),
    "torchvision resnet50": (resnet50, "resnet50.pth", "auto", {}),
    "torchvision resnet18": (resnet18, "resnet18.pth", "auto", _R18),
    "mmcv ConvAWS2d in resnet50": (_affine(resnet50), "resnet50.pth", "auto", {}),
    "mmcv ConvAWS2d in resnet18": (_affine(resnet18), "resnet18.pth", "auto", _R18),
    "timm resnet50": (partial(timm.create_model, "resnet50"), "resnet50.pth", "timm", {}),
    "timm resnet50_gn": (partial(timm.create_model, "resnet50_gn"), "r50_gn.pth", "timm", {}),
    "BiT R-50x1 of timm (.safetensors)": (
        *(_bit("resnetv2_50x1_bit"), "model.safetensors", "auto", {}),
    ),
    "BiT R-50x1 of Google (.npz)": (
        *(_bit("resnetv2_50x1_bit", eps=1e-10), "BiT-M-R50x1.npz", "auto", {}),
    ),
    "BiT R-101x1 of timm (.bin)": (
        *(_bit("resnetv2_101x1_bit"), "pytorch_model.bin", "auto", {"DEPTH": 101}),
    ),
    "BiT R-50x3 of timm (.bin)": (
        *(_bit("resnetv2_50x3_bit"), "pytorch_model.bin", "auto", _R50X3),
    ),
}
"""How an original is built, its file, that file's source, and keys of `MODEL.RESNETS`."""


def compare_resnet(
    name: str, images: list[torch.Tensor], seed: int, folder: Path
) -> Iterator[Measure]:
    """Builds, saves, converts and loads one ResNet, and compares the outputs of its stages.

    With affine WS, also after a step that each side takes against its own gradient.

    Args:
        name: a key of `RESNETS`.
        images: RGB (3, H, W); in float64 only the first is used.
        seed: of the random weights.
        folder: for the weight files.
    """
    build, file, source, keys = RESNETS[name]
    torch.manual_seed(seed)
    theirs: Any = build().eval()
    perturb(theirs, seed)
    _save(theirs, folder / file)
    weights = convert_file(folder / file, source)
    write_detectron2(weights, folder / "ours.pth")

    cfg = get_config("COCO-Detection/mmdet/Base-gn_ws-all.yaml")
    cfg.MODEL.RESNETS.update(keys, NORM="GN" if weights.metadata.norm == "GN" else "FrozenBN")
    builder = "build_ws_resnet_backbone" if weights.metadata.ws_convs else "build_resnet_backbone"
    if isinstance(theirs, timm.models.ResNetV2):
        builder = "build_bit_resnet_backbone"
    for form in set(weights.metadata.ws_convs.values()):
        cfg.MODEL.WS.MODE, cfg.MODEL.WS.EPS = form.mode, form.eps
    affine = any(isinstance(module, ConvAWS2d) for module in theirs.modules())
    if affine:
        cfg.MODEL.BACKBONE.FREEZE_AT, builder = 0, "build_ws_resnet_backbone"
        cfg.MODEL.WS.AFFINE, cfg.MODEL.WS.MODE = True, "aws"
    ours = BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=3)).eval()

    def load() -> None:
        """Affine WS takes its buffers from the filters, in the dtype of the models."""
        WSCheckpointer(ours).load(str(folder / "ours.pth"))
        if affine:
            theirs.load_state_dict(torch.load(folder / file))

    load()

    preprocessing = weights.metadata.preprocessing
    del weights  # R-50x3 takes 2 GB in float64, on each side and standardized
    if preprocessing is None:
        raise AssertionError(f"{name} has no preprocessing")
    for image in images:
        yield from _stages(theirs, ours, image, preprocessing)
    theirs.double(), ours.double()
    load()
    yield from _stages(theirs, ours, images[0], preprocessing)
    if affine:
        x, theirs.fc = images[0][None].double() / 255 - 0.5, nn.Identity()
        _step(theirs, theirs(x))
        _step(ours, ours(x)["res5"].mean((2, 3)))
        for group, what, value, limit in _stages(theirs, ours, images[0], preprocessing):
            yield group, f"{what} after a step", value, limit


def _step(model: nn.Module, output: torch.Tensor) -> None:
    """Changes the filters of each conv by a tenth of their length."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    gradients = torch.autograd.grad(output.square().sum(), weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients):
            weight -= 0.1 * weight.norm() / gradient.norm() * gradient


@torch.no_grad()
def _stages(
    theirs: Any, ours: nn.Module, image: torch.Tensor, preprocessing: Preprocessing
) -> Iterator[Measure]:
    dtype = next(theirs.parameters()).dtype
    if preprocessing.input_format == "BGR":
        image = image.flip(0)
    mean, std = (
        torch.tensor(values, dtype=dtype).view(3, 1, 1)
        for values in (preprocessing.pixel_mean, preprocessing.pixel_std)
    )
    x = ((image - mean) / std)[None]
    mine = ours(x)
    if isinstance(theirs, timm.models.ResNetV2):
        yield from compare(_bit_stages(theirs, x, mine))
        return
    x = theirs.maxpool(getattr(theirs, "relu", nn.ReLU())(theirs.bn1(theirs.conv1(x))))
    pairs = []
    for number in (1, 2, 3, 4):
        x = getattr(theirs, f"layer{number}")(x)
        pairs.append((f"res{number + 1}", x, mine[f"res{number + 1}"]))
    yield from compare(pairs)


def _bit_stages(
    theirs: Any, x: torch.Tensor, mine: dict[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """timm's stages, each followed by the norm and ReLU that read it: those of the next, or the
    final ones."""
    stages = list(theirs.stages)
    readers = [*(stage.blocks[0].norm1 for stage in stages[1:]), theirs.norm]
    pairs, x = [], theirs.stem(x)
    for number, (stage, read) in enumerate(zip(stages, readers), start=2):
        x = stage(x)
        pairs.append((f"res{number}", read(x), mine[f"res{number}"]))
    return pairs
