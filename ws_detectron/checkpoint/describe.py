"""Describes what a built model needs of its weights, in terms of `WeightMetadata`."""

import re
from typing import Optional

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ws_detectron.layers import WSConv2d

from .metadata import Preprocessing, WeightMetadata, WSForm

_BODY = re.compile(r"(^|\.)(stem|res\d)\.")


def describe_model(model: nn.Module) -> WeightMetadata:
    """Reads WS, norm, preprocessing and stride style from a model.

    Args:
        model: a detectron2 model, not wrapped in DistributedDataParallel. Preprocessing is read
            from its `pixel_mean`, `pixel_std` and `input_format`, if it has them.
    """
    modules = dict(model.named_modules())
    groups = {m.num_groups for m in modules.values() if isinstance(m, nn.GroupNorm)}
    return WeightMetadata(
        source="training",
        ws_convs={
            name: WSForm(module.ws_mode, module.ws_eps)
            for name, module in modules.items()
            if isinstance(module, WSConv2d)
        },
        norm=_body_norm(modules),
        gn_groups=groups.pop() if len(groups) == 1 else None,
        preprocessing=_preprocessing(model),
        stride_in_1x1=_stride_in_1x1(modules),
    )


def _body_norm(modules: dict[str, nn.Module]) -> str:
    for name, module in modules.items():
        if _BODY.search(name):
            if isinstance(module, nn.GroupNorm):
                return "GN"
            if isinstance(module, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)):
                return "BN"
    return ""


def _preprocessing(model: nn.Module) -> Optional[Preprocessing]:
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    if mean is None or std is None:
        return None
    return Preprocessing(
        getattr(model, "input_format", None),
        tuple(mean.flatten().tolist()),
        tuple(std.flatten().tolist()),
    )


def _stride_in_1x1(modules: dict[str, nn.Module]) -> Optional[bool]:
    for name, module in modules.items():
        if re.search(r"(^|\.)res[345]\.0$", name) and hasattr(module, "conv3"):
            strides = [module.conv1.stride, module.conv2.stride]
            if strides == [(2, 2), (1, 1)]:
                return True
            if strides == [(1, 1), (2, 2)]:
                return False
    return None
