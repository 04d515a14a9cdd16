"""Turns the convolutions of a built model into WS convolutions, and back.

Working on a built module tree keeps every detectron2 builder, and so every config key of theirs,
in use as it is.
"""

import copy
from dataclasses import dataclass, field
from typing import Optional

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from ws_detectron.layers import (
    DEFAULT_WS_EPS,
    DEFAULT_WS_MODE,
    WSConv2d,
    check_ws_arguments,
    standardize_alone,
    standardize_together,
    standardize_weight,
)

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
        skipped: name -> reason of every convolution that was left as it was.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} convolutions standardized, {len(self.skipped)} left plain"]
        lines += [f"  left: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_to_ws(
    module: nn.Module, eps: float = DEFAULT_WS_EPS, mode: str = DEFAULT_WS_MODE
) -> ConversionReport:
    """Makes a `WSConv2d` of every detectron2 `Conv2d` that a norm layer follows, in place.

    "Followed by a norm" means that the conv's own `norm` is set, or that the conv has no
    activation and is followed by a norm layer in the same `nn.Sequential`. WS is meant for those
    alone (arXiv:1903.10520, section 3.1): without a norm behind it, a standardized filter could
    not set the scale of its output.

    The module objects stay the same ones: only their class changes. So parameters,
    `requires_grad`, hooks, and references to a conv from elsewhere (detectron2's FPN keeps its
    convs in plain lists as well) all hold. A `WSConv2d` that a norm layer follows
    takes `eps` and `mode`; another one stays as it is, and is reported as left. The convs of
    `module` standardize together (`layers.standardize_together`).

    Args:
        module: any module tree; may be a single conv.
        eps: `eps` of `standardize_weight`.
        mode: `mode` of `standardize_weight`.

    Returns:
        The names of all convolutions in `module`, converted or left and why.

    Raises:
        ValueError: `eps` or `mode` is not allowed.
    """
    check_ws_arguments(eps, mode)
    report = ConversionReport()
    norm_follows = _convs_before_a_norm(module)
    for name, conv in module.named_modules():
        reason = _reason_to_skip(conv, id(conv) in norm_follows)
        if reason is None:
            conv.__class__ = WSConv2d
            conv.ws_eps, conv.ws_mode = eps, mode
            report.converted.append(name)
        elif reason:
            report.skipped[name] = reason
    if report.converted:
        standardize_together(module)
    return report


def with_ws(
    module: nn.Module, eps: float = DEFAULT_WS_EPS, mode: str = DEFAULT_WS_MODE
) -> nn.Module:
    """`convert_to_ws` that returns the module, as a LazyConfig needs it: `L(with_ws)(module=...)`.

    Args, Raises:
        as for `convert_to_ws`.
    """
    convert_to_ws(module, eps, mode)
    return module


def fold_ws(module: nn.Module) -> nn.Module:
    """Makes a plain detectron2 `Conv2d` of every `WSConv2d`, in place; the outputs stay the same.

    Each conv gets a new weight parameter that holds the standardized filters, so that inference
    and export no longer compute them. The new parameters are not those that an optimizer may hold:
    fold a `copy.deepcopy` of a model that is to be trained on.

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
            folded = standardize_weight(conv.weight, conv.ws_eps, conv.ws_mode)
        conv.weight = nn.Parameter(folded, requires_grad=conv.weight.requires_grad)
        del conv.ws_eps, conv.ws_mode
        conv.__class__ = Conv2d
    return module


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with plain convs that gives the same outputs, for evaluation in training.

    Standardizing at every image would cost an R-50 about as much as the whole of its weights
    moved seven times; a folded copy pays that once. The model itself is untouched, whatever the
    copy goes through.

    Args:
        model: may be wrapped for distributed training; the copy is not, as inference needs no
            exchange of gradients.

    Returns:
        The folded copy, or `model` itself, unwrapped, where it has no WS conv.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if not any(isinstance(module, WSConv2d) for module in model.modules()):
        return model
    return fold_ws(copy.deepcopy(model))


def _convs_before_a_norm(module: nn.Module) -> set[int]:
    """The `id`s of the modules that a norm layer follows directly in an `nn.Sequential`."""
    return {
        id(first)
        for sequence in module.modules()
        if isinstance(sequence, nn.Sequential)
        for first, second in zip(sequence, list(sequence)[1:])
        if isinstance(second, _NORM_TYPES)
    }


def _reason_to_skip(module: nn.Module, norm_follows: bool) -> Optional[str]:
    """None: convert. Empty: not a convolution. Otherwise the reason to leave it plain."""
    if type(module) in (Conv2d, WSConv2d):
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        if module.norm is not None or (norm_follows and module.activation is None):
            return None
        return "no norm layer follows"
    if isinstance(module, (Conv2d, WSConv2d)):
        return f"{type(module).__name__} may compute its output in a way of its own"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{type(module).__name__} is not a detectron2 Conv2d"
    if "Deform" in type(module).__name__ and hasattr(module, "weight"):
        return "deformable convolutions are not supported"
    return ""
