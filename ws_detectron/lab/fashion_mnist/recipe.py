"""How the classifier is trained: SGD with Nesterov momentum, by batch size.

One recipe serves all arms, so that they differ in their normalization alone. The report does not
say what optimizer it used.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SCHEDULES = ("cosine", "constant")
WARMUP = 0.1
"""Share of all steps in which the LR rises linearly."""

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
"""Of weights with more than one dimension; biases and norm layers have none."""

DEFAULT_LRS = {2: 0.0015, 32: 0.02, 128: 0.05}
"""Batch size -> highest LR. Other sizes scale linearly from the nearest of these (by ratio)."""


RECIPE = {
    "optimizer": "SGD with Nesterov momentum",
    "momentum": MOMENTUM,
    "weight_decay": WEIGHT_DECAY,
    "warmup": WARMUP,
}
"""What no option changes; runs with another one are not to be compared."""


def default_lr(batch_size: int) -> float:
    """The highest LR of a batch size, see `DEFAULT_LRS`."""
    nearest = min(DEFAULT_LRS, key=lambda known: abs(math.log(known / batch_size)))
    return DEFAULT_LRS[nearest] * batch_size / nearest


@dataclass(frozen=True)
class Schedule:
    """The LR of each step, counted from 0.

    "cosine": a linear rise to `lr` over the first `WARMUP` of all steps, then half a cosine down
    to 0. "constant": `lr` throughout.
    """

    kind: str
    lr: float
    steps: int

    def at(self, step: int) -> float:
        if self.kind == "constant":
            return self.lr
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD in one fused call per step, where torch has that (from 2.4 on)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": lr, "momentum": MOMENTUM, "nesterov": True}
    try:
        return torch.optim.SGD(groups, fused=True, **options)
    except (TypeError, RuntimeError):  # no such argument, or not for this device
        return torch.optim.SGD(groups, **options)
