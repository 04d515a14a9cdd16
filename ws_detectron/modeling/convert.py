"""Turns the convolutions of a built model into WS convolutions, and back.

Converting after building reuses detectron2's builders, and with them all their config keys.
"""

import copy
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Optional

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from ws_detectron.layers import (
    DEFAULT_WS_EPS,
    DEFAULT_WS_MODE,
    WSConv2d,
    affine_of,
    check_ws_arguments,
    standardize_alone,
    standardize_together,
    standardize_weight,
)

logger = logging.getLogger(__name__)

_NORM_TYPES = (
    FrozenBatchNorm2d,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._InstanceNorm,
)


@dataclass
class ConversionReport:
    """What `convert_to_ws` did.

    Attributes:
        converted: names of the convolutions that are WS convolutions now.
        skipped: name of each other convolution -> the reason.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} convolutions standardized, {len(self.skipped)} left plain"]
        lines += [f"  left: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_to_ws(
    module: nn.Module,
    eps: float = DEFAULT_WS_EPS,
    mode: str = DEFAULT_WS_MODE,
    affine: bool = False,
) -> ConversionReport:
    """Turns every detectron2 `Conv2d` followed by a norm layer into a `WSConv2d`, in place.

    "Followed by a norm layer" means that the conv's own `norm` is set, or that the conv has no
    activation and precedes a norm layer in an `nn.Sequential`. WS is meant for these convs only
    (arXiv:1903.10520, section 3.1): without a norm layer, nothing could set the scale of the
    output.

    Only the class of a conv changes. Parameters, `requires_grad`, hooks and other references to
    the conv (detectron2's FPN also keeps its convs in plain lists) stay valid. A `WSConv2d`
    followed by a norm layer gets the new `eps` and `mode`. The filters of `module` are
    standardized together afterwards (`layers.standardize_together`). If there is no such conv, a
    warning says why.

    With `affine`, a trained model keeps its outputs: the buffers gamma and beta of a `Conv2d` are
    taken from its filters; a `WSConv2d` keeps its own, or gets 1 and 0.

    Args:
        module: any module tree; may be a single conv.
        eps: `eps` of `standardize_weight`.
        mode: `mode` of `standardize_weight`.
        affine: whether the convs have gamma and beta (`WSConv2d`). mmcv's ConvAWS2d has them, and
            mode "aws".

    Returns:
        The names of the convolutions that were converted, and of the others with the reason.

    Raises:
        ValueError: `eps` or `mode` is not allowed.
    """
    check_ws_arguments(eps, mode)
    report = ConversionReport()
    norm_follows = _convs_before_a_norm(module)
    for name, conv in module.named_modules():
        reason = _reason_to_skip(conv, id(conv) in norm_follows)
        if reason is None:
            if type(conv) is Conv2d:
                conv.__class__ = WSConv2d
                conv.set_affine(affine_of(conv.weight, eps, mode) if affine else None)
            elif affine != (conv.affine() is not None):
                conv.reset_affine(affine)
            conv.ws_eps, conv.ws_mode = eps, mode
            report.converted.append(name)
        elif reason:
            report.skipped[name] = reason
    if report.converted:
        standardize_together(module)
    else:
        reasons = Counter(report.skipped.values()).most_common()
        logger.warning(
            "convert_to_ws has standardized no convolution: %s; WS is for a "
            "detectron2.layers.Conv2d with `norm` set, or directly before a norm layer in an "
            "nn.Sequential",
            ", ".join(f"{reason} ({count})" for reason, count in reasons) or "there is none",
        )
    return report


def with_ws(
    module: nn.Module,
    eps: float = DEFAULT_WS_EPS,
    mode: str = DEFAULT_WS_MODE,
    affine: bool = False,
) -> nn.Module:
    """`convert_to_ws` that returns the module, as a LazyConfig needs it: `L(with_ws)(module=...)`.

    Args, Raises:
        as for `convert_to_ws`.
    """
    convert_to_ws(module, eps, mode, affine)
    return module


def fold_ws(module: nn.Module) -> nn.Module:
    """Turns every `WSConv2d` into a plain detectron2 `Conv2d`, in place, with the same outputs.

    Each conv gets a new weight parameter with the standardized filters, so that inference and
    export need not compute them. An optimizer keeps the old parameters: fold a `copy.deepcopy` of
    a model that you train further, or use `folded_copy`.

    Args:
        module: any module tree; may be a single conv.

    Returns:
        `module` itself.
    """
    for conv in module.modules():
        if type(conv) is not WSConv2d:
            standardize_alone(conv)
            continue
        with torch.no_grad():
            folded = standardize_weight(conv.weight, conv.ws_eps, conv.ws_mode, conv.affine())
        conv.weight = nn.Parameter(folded, requires_grad=conv.weight.requires_grad)
        del conv.ws_eps, conv.ws_mode, conv.weight_gamma, conv.weight_beta
        conv.__class__ = Conv2d
    return module


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with plain convs and the same outputs, for evaluation during training.

    The copy standardizes its filters once instead of at every image.

    Args:
        model: may be wrapped in (Distributed)DataParallel; the copy is not.

    Returns:
        The folded copy, or the unwrapped model itself if it has no WS conv.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if not any(isinstance(module, WSConv2d) for module in model.modules()):
        return model
    return fold_ws(copy.deepcopy(model))


def _convs_before_a_norm(module: nn.Module) -> set[int]:
    """The `id`s of modules directly before a norm layer in an `nn.Sequential`."""
    return {
        id(first)
        for sequence in module.modules()
        if isinstance(sequence, nn.Sequential)
        for first, second in zip(sequence, list(sequence)[1:])
        if isinstance(second, _NORM_TYPES)
    }


def _reason_to_skip(module: nn.Module, norm_follows: bool) -> Optional[str]:
    """Why not to convert `module`: None to convert it, "" if it is not a convolution."""
    if type(module) in (Conv2d, WSConv2d):
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        if module.norm is not None or (norm_follows and module.activation is None):
            return None
        return "no norm layer follows"
    if isinstance(module, (Conv2d, WSConv2d)):
        return f"{type(module).__name__} may override the forward"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"torch's {type(module).__name__} is not a detectron2 Conv2d"
    if "Deform" in type(module).__name__ and hasattr(module, "weight"):
        return "deformable convolutions are not supported"
    return ""
