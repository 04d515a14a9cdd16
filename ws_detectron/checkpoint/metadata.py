"""Metadata of weight files: their origin, and what a model needs to use them; read from a model.

Files written by this package contain it as a dict of plain values under the key `METADATA_KEY`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Optional

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ws_detectron.errors import WeightsError
from ws_detectron.layers import WSConv2d, check_ws_arguments

METADATA_KEY = "ws_detectron"
_VERSION = 1
_BODY = re.compile(r"(^|\.)(stem|res\d)\.")
_FIRST_BLOCK = re.compile(r"(^|\.)res[345]\.0$")
# Strides of the first two convs of a bottleneck -> MODEL.RESNETS.STRIDE_IN_1X1
_STRIDES = {((2, 2), (1, 1)): True, ((1, 1), (2, 2)): False}


@dataclass(frozen=True)
class WSForm:
    """The `mode` and `eps` of `standardize_weight` with which a conv was trained, and whether it
    has the buffers of affine WS."""

    mode: str
    eps: float
    affine: bool = False

    def __str__(self) -> str:
        return f"{self.mode}, eps {self.eps:g}" + ", affine" * self.affine


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
        ws_convs: name of each conv trained with WS -> its form. In a file of a ResNet
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

    def settings(self) -> dict[str, Any]:
        """Config key -> value that a model needs, of groups, stride and input, if known."""
        values = {
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
            "MODEL.WS.GN_GROUPS": self.gn_groups,
        }
        if self.preprocessing:
            keys = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
            values.update(zip(keys, astuple(self.preprocessing)))
        return {key: value for key, value in values.items() if value is not None}

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
            if values.pop("version") != _VERSION:
                raise ValueError("written by another version of ws_detectron")
            forms = {str(name): WSForm(**form) for name, form in values.pop("ws_convs").items()}
            for form in set(forms.values()):
                check_ws_arguments(form.eps, form.mode)
                if form.affine not in (True, False):
                    raise ValueError(f"affine is {form.affine!r}")
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


def in_resnet(name: str) -> bool:
    """Whether a module or key is of the ResNet of a model, or of a ResNet alone."""
    return _BODY.search(name) is not None


def is_bit(keys: Iterable[str]) -> bool:
    """Whether the keys of a model or file are those of `build_bit_*`, or of their ResNet."""
    return any(key.endswith("stem.out.norm.weight") for key in keys)


def describe_model(model: nn.Module) -> WeightMetadata:
    """Reads WS, norm, preprocessing and stride style from a model.

    Args:
        model: a detectron2 model, not wrapped in DistributedDataParallel. Preprocessing is read
            from its `pixel_mean`, `pixel_std` and `input_format`, if it has them.
    """
    forms: dict[str, WSForm] = {}
    groups, norm, stride_in_1x1 = set(), "", None
    for name, module in model.named_modules():
        if isinstance(module, WSConv2d):
            forms[name] = WSForm(module.ws_mode, module.ws_eps, module.affine() is not None)
        elif isinstance(module, nn.GroupNorm):
            groups.add(module.num_groups)
        if not norm and in_resnet(name):
            bn = isinstance(module, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm))
            norm = "GN" if isinstance(module, nn.GroupNorm) else "BN" if bn else ""
        if _FIRST_BLOCK.search(name) and hasattr(module, "conv3"):
            strides = module.conv1.stride, module.conv2.stride
            stride_in_1x1 = _STRIDES.get(strides, stride_in_1x1)
    preprocessing = None
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    if mean is not None and std is not None:
        values = tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
        preprocessing = Preprocessing(getattr(model, "input_format", None), *values)
    return WeightMetadata(
        source="training",
        ws_convs=forms,
        norm=norm,
        gn_groups=groups.pop() if len(groups) == 1 else None,
        preprocessing=preprocessing,
        stride_in_1x1=stride_in_1x1,
    )
