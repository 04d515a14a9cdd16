"""The network of the 2019 Fashion-MNIST report, with any of the normalization methods.

conv 3x3 32 "same" -> ReLU -> norm -> conv 32 -> ReLU -> norm -> max-pool 2 -> dropout 0.25; the
same with 64 channels; flatten -> dense 512 -> ReLU -> norm -> dropout 0.5 -> dense 10.

The report used Keras; what its defaults decide is taken over: Glorot-uniform weights, zero biases,
BN with eps 0.001 and 0.99 of the old statistics kept at each step.
"""

from collections import OrderedDict
from typing import Any, Optional

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ws_detectron.errors import UserError
from ws_detectron.layers import DEFAULT_WS_EPS, DEFAULT_WS_MODE, WSConv2d

from .classifier_norm import ChannelsLastGroupNorm
from .dropout import ByteDropout
from .variants import ARMS, ORDERS, REPORT_ORDER, Arm

CLASSES = 10
IMAGE_SIZE = 28
BLOCKS = (32, 64)
HIDDEN = 512
CONV_DROPOUT, DENSE_DROPOUT = 0.25, 0.5
REPORT_GROUPS = 32
_BN_EPS, _BN_MOMENTUM = 1e-3, 0.01


def build_classifier(
    arm: str,
    *,
    groups: int = REPORT_GROUPS,
    order: str = REPORT_ORDER,
    ws_mode: str = DEFAULT_WS_MODE,
    ws_eps: float = DEFAULT_WS_EPS,
) -> nn.Sequential:
    """Builds the network with random weights; takes (N, 1, 28, 28), gives logits (N, 10).

    Args:
        arm: one of `ARMS`.
        groups: of GN; the report's Keras layer took 32, which for 32 channels is one channel each.
        order: one of `ORDERS`.
        ws_mode, ws_eps: as for `WSConv2d`.

    Raises:
        UserError: no such arm or order, or `groups` does not divide 32, 64 and 512.
    """
    if arm not in ARMS:
        raise UserError(f"arm is {arm!r}; allowed: {', '.join(ARMS)}")
    if order not in ORDERS:
        raise UserError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")
    if groups < 1 or any(width % groups for width in (*BLOCKS, HIDDEN)):
        raise UserError(f"groups is {groups}; it must divide {BLOCKS[0]}, the fewest channels")
    chosen = ARMS[arm]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size, number = 1, IMAGE_SIZE, 0
    for block, width in enumerate(BLOCKS, start=1):
        for _ in range(2):
            number += 1
            norm = _norm(chosen, width, groups, dimensions=2)
            options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "activation": F.relu_}
            if order != REPORT_ORDER:
                options["norm"] = norm  # applied before the activation
            if chosen.ws:
                conv = WSConv2d(channels, width, ws_mode=ws_mode, ws_eps=ws_eps, **options)
            else:
                conv = Conv2d(channels, width, **options)
            layers[f"conv{number}"] = conv
            if order == REPORT_ORDER and norm is not None:
                layers[f"norm{number}"] = norm
            channels = width
        size //= 2
        layers[f"pool{block}"] = nn.MaxPool2d(2)
        layers[f"dropout{block}"] = ByteDropout(CONV_DROPOUT)
    layers["flatten"] = nn.Flatten()
    layers["dense"] = nn.Linear(channels * size * size, HIDDEN)
    tail: list[tuple[str, Optional[nn.Module]]] = [
        ("relu", nn.ReLU(inplace=True)),
        ("dense_norm", _norm(chosen, HIDDEN, groups, dimensions=0)),
    ]
    for name, layer in tail if order == REPORT_ORDER else reversed(tail):
        if layer is not None:
            layers[name] = layer
    layers["dropout3"] = ByteDropout(DENSE_DROPOUT)
    layers["predictor"] = nn.Linear(HIDDEN, CLASSES)
    model = nn.Sequential(layers)
    _initialize(model, chosen)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _norm(arm: Arm, channels: int, groups: int, *, dimensions: int) -> Optional[nn.Module]:
    """The norm layer behind a conv (`dimensions` 2) or a dense layer (0)."""
    if arm.norm == "BN":
        kind = nn.BatchNorm2d if dimensions else nn.BatchNorm1d
        return kind(channels, eps=_BN_EPS, momentum=_BN_MOMENTUM)
    if arm.norm == "LN":
        return ChannelsLastGroupNorm(1, channels)  # over all channels and pixels of an image
    if arm.norm == "GN":
        return ChannelsLastGroupNorm(groups, channels)
    return None


def _initialize(model: nn.Module, arm: Arm) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if arm.weight_norm:  # starts as the same function: each length is that of its vector
            parametrizations.weight_norm(layer)
