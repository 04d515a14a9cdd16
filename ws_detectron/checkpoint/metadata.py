"""Metadata of weight files: their origin, and what a model needs to use them; read from a model.

Files written by this package contain it as a dict of plain values under the key `METADATA_KEY`.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ws_detectron.errors import WeightsError
from ws_detectron.layers import WSConv2d, check_ws_arguments

METADATA_KEY = "ws_detectron"
_VERSION = 1
_BODY = re.compile(r"(^|\.)(stem|res\d)\.")


@dataclass(frozen=True)
class WSForm:
    """The `mode` and `eps` of `standardize_weight` with which a conv was trained."""

    mode: str
    eps: float

    def __str__(self) -> str:
        return f"{self.mode}, eps {self.eps:g}"


@dataclass(frozen=True)
class Preprocessing:
    """How a detector normalizes an image (0 to 255).

    Attributes:
        input_format: channel order, "RGB" or "BGR" (detectron2's INPUT.FORMAT).
        pixel_mean: subtracted per channel, in that order (MODEL.PIXEL_MEAN).
        pixel_std: divided by per channel, in that order (MODEL.PIXEL_STD).
    """

    input_format: Optional[str]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


@dataclass(frozen=True)
class WeightMetadata:
    """The metadata of one file.

    Attributes:
        source: the framework that the weights are from, or "training".
        origin: name of the file that was converted; empty for weights trained here.
        sha256: of that file.
        architecture: of the ResNet, such as "R-50"; empty if unknown.
        ws_convs: name of each conv trained with WS -> its mode and eps. In a file of a ResNet
            only, names are relative to the ResNet, like the keys.
        norm: "GN" or "BN" after the convs of the ResNet; empty if unknown or none.
        gn_groups: number of groups of the GN layers.
        preprocessing: None if unknown.
        stride_in_1x1: whether bottlenecks have their stride in the first 1x1 conv
            (MODEL.RESNETS.STRIDE_IN_1X1); None if unknown or not applicable.
    """

    source: str
    origin: str = ""
    sha256: str = ""
    architecture: str = ""
    ws_convs: Mapping[str, WSForm] = field(default_factory=dict)
    norm: str = ""
    gn_groups: Optional[int] = None
    preprocessing: Optional[Preprocessing] = None
    stride_in_1x1: Optional[bool] = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values that every safe loader accepts."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any, path: str) -> "WeightMetadata":
        """The inverse of `as_dict`.

        Args:
            values: from an untrusted file.
            path: the file, for messages.

        Raises:
            WeightsError: a value is missing or invalid.
        """
        try:
            values = dict(values)
            values.pop("ws_known", None)  # True in files of development versions
            if values.pop("version") != _VERSION:
                raise ValueError("written by another version of ws_detectron")
            forms = {str(name): WSForm(**form) for name, form in values.pop("ws_convs").items()}
            for form in set(forms.values()):
                check_ws_arguments(form.eps, form.mode)
            given = values.pop("preprocessing")
            preprocessing = given and Preprocessing(
                given["input_format"],
                tuple(float(value) for value in given["pixel_mean"]),
                tuple(float(value) for value in given["pixel_std"]),
            )
            return cls(ws_convs=forms, preprocessing=preprocessing, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{path}: the entry {METADATA_KEY!r} cannot be used ({error!r})"
            ) from None


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
