"""The network of the 2019 Fashion-MNIST report, with any of the normalization variants.

conv 3x3 32 "same" -> ReLU -> norm -> conv 32 -> ReLU -> norm -> max-pool 2 -> dropout 0.25; the
same with 64 channels; flatten -> dense 512 -> ReLU -> norm -> dropout 0.5 -> dense 10.

The report used Keras; its defaults are kept: Glorot-uniform weights, zero biases, BN with eps 0.001
that keeps 0.99 of the old statistics at each step.

On a CPU, dropout and GN are faster equivalents of torch's layers.
"""

from collections import OrderedDict
from typing import Any, Optional

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ws_detectron.errors import UserError
from ws_detectron.layers import WSConv2d
from ws_detectron.layers.standardize import in_graph_capture

from .training_settings import ORDERS, REPORT_GROUPS, REPORT_ORDER, VARIANTS, Variant

CLASSES = 10
IMAGE_SIZE = 28
BLOCKS = (32, 64)
HIDDEN = 512
CONV_DROPOUT, DENSE_DROPOUT = 0.25, 0.5
_BN_EPS, _BN_MOMENTUM = 1e-3, 0.01
_BYTE_VALUES = 256


def build_classifier(
    variant: str, *, groups: int = REPORT_GROUPS, order: str = REPORT_ORDER
) -> nn.Sequential:
    """Builds the network with random weights; takes (N, 1, 28, 28), gives logits (N, 10).

    Args:
        variant: a key of `VARIANTS`.
        groups: of GN.
        order: one of `ORDERS`.

    Raises:
        UserError: no such variant or order, or `groups` does not divide 32, 64 and 512.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant is {variant!r}; allowed: {', '.join(VARIANTS)}")
    if order not in ORDERS:
        raise UserError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")
    if groups < 1 or any(width % groups for width in (*BLOCKS, HIDDEN)):
        raise UserError(f"groups is {groups}; it must divide {BLOCKS[0]}, the fewest channels")
    chosen = VARIANTS[variant]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size, number = 1, IMAGE_SIZE, 0
    for block, width in enumerate(BLOCKS, start=1):
        for _ in range(2):
            number += 1
            norm = _norm(chosen, width, groups, dimensions=2)
            options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "activation": F.relu_}
            if order != REPORT_ORDER:
                options["norm"] = norm  # applied before the activation
            conv = WSConv2d if chosen.ws else Conv2d
            layers[f"conv{number}"] = conv(channels, width, **options)
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


def _norm(variant: Variant, channels: int, groups: int, *, dimensions: int) -> Optional[nn.Module]:
    """The norm layer after a conv (`dimensions` 2) or a dense layer (0)."""
    if variant.norm == "BN":
        layer = nn.BatchNorm2d if dimensions else nn.BatchNorm1d
        return layer(channels, eps=_BN_EPS, momentum=_BN_MOMENTUM)
    if variant.norm == "LN":
        return ChannelsLastGroupNorm(1, channels)  # over all channels and pixels of an image
    if variant.norm == "GN":
        return ChannelsLastGroupNorm(groups, channels)
    return None


def _initialize(model: nn.Module, variant: Variant) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if variant.weight_norm:  # keeps the function: each length starts as that of its vector
            parametrizations.weight_norm(layer)


class ByteDropout(nn.Module):
    """`nn.Dropout` that uses one random byte for each value.

    One draw from torch's generator gives 8 bytes, while `nn.Dropout` draws for each value, which
    took 6 % of a training step on a CPU. In training y = x*b/(1 - p), b = 0 with probability p; in
    evaluation y = x. On other devices it is `nn.Dropout`.

    Args:
        p: probability of a zero, a multiple of 1/256 below 1, so that a byte gives it exactly.

    Raises:
        ValueError: `p` is not such a number.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1 or p * _BYTE_VALUES != int(p * _BYTE_VALUES):
            raise ValueError(f"p must be a multiple of 1/{_BYTE_VALUES} in [0, 1), got {p}")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drops values of x, of any shape, and keeps its memory format."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or in_graph_capture():
            return F.dropout(x, self.p)
        random = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        random.random_(-(2**63), None)  # all 64 bits
        kept = random.view(torch.uint8)[: x.numel()] >= int(self.p * _BYTE_VALUES)
        scale = kept.to(x.dtype).mul_(1 / (1 - self.p))
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            n, channels, height, width = x.shape
            return x * scale.view(n, height, width, channels).permute(0, 3, 1, 2)
        return x * scale.view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ChannelsLastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` (arXiv:1803.08494, section 3) that keeps features channels last, on a CPU.

    A CPU convolves and pools faster channels last, but torch's group norm is slow there where a
    group has few channels. With torch 2.11 on 32 images of 28 x 28 pixels and 32 channels in 32
    groups, one thread: 29 ms channels last, 0.24 ms channels first. Reordering before and after
    every norm costs more than the convs gain.

    On other devices, under autocast and for features without pixels it is `nn.GroupNorm`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes x of shape (N, C, ...)."""
        usual = x.device.type != "cpu" or x.dim() != 4 or x.dtype != self.weight.dtype
        if usual or in_graph_capture():  # a compiler fuses the formula by itself
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        y: torch.Tensor = _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return y


class _GroupNorm(torch.autograd.Function):
    """For the n = C/G*H*W values x of a group, their mean m and variance v, r = 1/sqrt(v + eps):

        N = (x - m) * r
        y = N * weight + bias                                 = x * scale + shift
        dL/dx = r * (g*weight - mean(g*weight) - N * mean(g*weight*N))
                                                              = g * scale + x * slope + offset

    Pixels are summed per channel, then channels per group. v = mean(x^2) - m^2 loses accuracy in
    float32 where |m| is over 100 times the standard deviation, which does not occur after a conv
    with small biases or a ReLU.

    Shape letters: N images, P = H*W pixels, C channels, G groups, c = C/G.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        rows = _rows(x)  # (N, P, C)
        images, pixels, channels = rows.shape
        grouped = (images, groups, channels // groups)  # (N, G, c); per group (N, G, 1)
        values = pixels * channels // groups
        mean = rows.sum(1).view(grouped).sum(2, keepdim=True).div_(values)
        square = (rows * rows).sum(1).view(grouped).sum(2, keepdim=True).div_(values)
        variance = square.addcmul_(mean, mean, value=-1).clamp_(min=0)
        inverse = variance.add_(eps).rsqrt_()
        scale = inverse * weight.view(grouped[1:])
        shift = torch.addcmul(bias.view(grouped[1:]), mean, scale, value=-1)
        y = torch.empty_like(x)  # no view: an in-place ReLU may follow
        scale_rows, shift_rows = (term.view(images, 1, channels) for term in (scale, shift))
        torch.addcmul(shift_rows, rows, scale_rows, out=_rows(y))
        ctx.save_for_backward(x, weight, mean, inverse, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, inverse, scale = ctx.saved_tensors
        rows = _rows(x)
        g = _rows(gradient.contiguous(memory_format=torch.channels_last))
        images, pixels, channels = rows.shape
        grouped = scale.shape
        values = pixels * channels // grouped[1]
        factor = weight.view(grouped[1:])
        sum_g = g.sum(1).view(grouped)
        sum_gx = (g * rows).sum(1).view(grouped)
        sum_gn = sum_gx.addcmul_(mean, sum_g, value=-1).mul_(inverse)
        slope = (sum_gn * factor).sum(2, keepdim=True).mul_(inverse).mul_(inverse).div_(-values)
        offset = (sum_g * factor).sum(2, keepdim=True).mul_(inverse).div_(-values)
        offset.addcmul_(mean, slope, value=-1)
        scale_rows, slope_rows, offset_rows = (
            term.expand(grouped).reshape(images, 1, channels) for term in (scale, slope, offset)
        )
        result = torch.empty_like(x)
        torch.addcmul(offset_rows, rows, slope_rows, out=_rows(result)).addcmul_(g, scale_rows)
        return result, sum_gn.sum(0).view(-1), sum_g.sum(0).view(-1), None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W), channels last, as (N, H*W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
