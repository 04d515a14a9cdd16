"""The network of the 2019 Fashion-MNIST report, with any of the normalization variants.

conv 3x3 32 "same" -> ReLU -> norm -> conv 32 -> ReLU -> norm -> max-pool 2 -> dropout 0.25; the
same with 64 channels; flatten -> dense 512 -> ReLU -> norm -> dropout 0.5 -> dense 10.

The report used Keras; its defaults are kept: Glorot-uniform weights, zero biases, BN with eps 0.001
that keeps 0.99 of the old statistics at each step.
"""

from dataclasses import dataclass

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn.utils import parametrizations

from ws_detectron.layers import WSConv2d


@dataclass(frozen=True)
class Variant:
    """A choice of normalization.

    Attributes:
        title: for tables and figures.
        norm: the layer after each conv and after the hidden dense layer: "", "BN", "LN" or "GN".
        ws: Weight Standardization of every conv.
        weight_norm: Weight Normalization (arXiv:1602.07868) of every conv and dense layer.
    """

    title: str
    norm: str = ""
    ws: bool = False
    weight_norm: bool = False


VARIANTS = {
    "none": Variant("none"),
    "bn": Variant("BN", norm="BN"),
    "ln": Variant("LN", norm="LN"),
    "gn": Variant("GN", norm="GN"),
    "wn": Variant("WN", weight_norm=True),
    "bn_ws": Variant("BN+WS", norm="BN", ws=True),
    "gn_ws": Variant("GN+WS", norm="GN", ws=True),
}

ORDERS = ("report", "detector")
"""conv -> ReLU -> norm as in the report, and conv -> norm -> ReLU as in detectors."""

REPORT_GROUPS = 32
"""Groups of the report's GN, the default of Keras: one channel per group for 32 channels."""


def build_classifier(
    variant: str, *, groups: int = REPORT_GROUPS, order: str = ORDERS[0]
) -> nn.Sequential:
    """Builds the network with random weights; takes (N, 1, 28, 28), gives logits (N, 10).

    Args:
        variant: a key of `VARIANTS`.
        groups: of GN, a divisor of 32.
        order: one of `ORDERS`.
    """
    chosen = VARIANTS[variant]
    layers: list[nn.Module] = []

    def add(layer: nn.Module, channels: int) -> None:
        """Adds a layer with its norm and ReLU."""
        norm: list[nn.Module] = []
        if chosen.norm == "BN":
            batch_norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
            norm = [batch_norm(channels, eps=1e-3, momentum=0.01)]
        elif chosen.norm:  # LN: over all channels and pixels of an image
            norm = [nn.GroupNorm(1 if chosen.norm == "LN" else groups, channels)]
        relu = nn.ReLU(inplace=True)
        layers.extend([layer, relu, *norm] if order == "report" else [layer, *norm, relu])

    conv = WSConv2d if chosen.ws else Conv2d
    for inputs, channels in ((1, 32), (32, 64)):
        add(conv(inputs, channels, kernel_size=3, padding=1), channels)
        add(conv(channels, channels, kernel_size=3, padding=1), channels)
        layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
    layers.append(nn.Flatten())
    add(nn.Linear(7 * 7 * 64, 512), 512)
    layers += [nn.Dropout(0.5), nn.Linear(512, 10)]

    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            layer.bias.data.zero_()  # type: ignore[union-attr]
            if chosen.weight_norm:  # keeps the function: each length starts as its vector's
                parametrizations.weight_norm(layer)
    model = nn.Sequential(*layers)
    if (
        chosen.norm != "GN"
    ):  # channels last a CPU convolves faster, but torch's GN takes 3 times as long
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
