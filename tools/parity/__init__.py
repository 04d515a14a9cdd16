"""Compares converted models with the originals; see tools/check_parity.py."""

import re
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import nn

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest allowed relative difference by dtype."""


Measure = tuple[str, str, float, Optional[float]]
"""Group, tensor or property, its value, and the largest allowed one, None where any is."""


def compare(pairs: list[tuple[str, torch.Tensor, torch.Tensor]]) -> Iterator[Measure]:
    """max |theirs - ours| / max |theirs| of each (name, theirs, ours); the group is the dtype.

    Infinite where shapes differ or a value is not finite.
    """
    for what, theirs, ours in pairs:
        value = float("inf")
        if theirs.shape == ours.shape:
            ratio = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max()
            value = float(ratio) if torch.isfinite(ratio) else value
        yield str(theirs.dtype).removeprefix("torch."), what, value, LIMITS[theirs.dtype]


@torch.no_grad()
def perturb(model: Any, seed: int) -> None:
    """Changes all parameters from their initial values, in place.

    Each filter gets its own mean and scale, which WS must remove; norm layers get random affine
    parameters, and BN random statistics. The last norm layer of each residual branch, initialized
    with 0 in mmdetection, gets 0.1: with 1, a random ResNet is chaotic, and mmdetection's float32
    output differs from its float64 output by 8e-5, that of timm's BiT R-50x1 by 2e-5.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            per_filter = torch.empty(len(module.weight), 1, 1, 1)
            module.weight += 0.5 * module.weight.std() * noise(per_filter)
            module.weight *= torch.exp(0.5 * noise(per_filter))
        elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            scale = 0.1 if re.search(r"layer\d\.\d+\.(gn3|bn3)$|blocks\.\d+\.norm3$", name) else 1.0
            module.weight.copy_(scale * (1 + 0.2 * noise(module.weight)))
            module.bias.copy_(0.2 * scale * noise(module.bias))
            statistics = dict(module.named_buffers())
            if statistics:
                mean, variance = statistics["running_mean"], statistics["running_var"]
                mean.copy_(0.3 * noise(mean))
                variance.copy_(torch.exp(0.3 * noise(variance)))
        elif isinstance(module, (nn.Linear, nn.ConvTranspose2d)) and module.bias is not None:
            module.bias.copy_(0.01 * noise(module.bias))
