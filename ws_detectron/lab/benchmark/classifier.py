"""Time per epoch of the Fashion-MNIST classifier's variants."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ws_detectron.lab.fashion_mnist.model import build_classifier
from ws_detectron.lab.fashion_mnist.training import TRAIN_IMAGES, build_optimizer, train_epoch

from .timing import Action, interleave

MAX_STEPS, MAX_IMAGES = 1000, 12800
"""Limits of a round, whichever comes first: 1000 steps at batch 2, 400 at 32, 100 at 128."""


def measure_classifier(
    device: str, rounds: int = 10, warmup: int = 2, variants: Sequence[str] = ("bn", "gn", "gn_ws"),
    batches: Sequence[int] = (1,), modes: Sequence[str] = ("plain",),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """An epoch of the Fashion-MNIST classifier, from its first training steps.

    Args:
        device, rounds, warmup: as for `interleave`.
        variants: variants of `lab.fashion_mnist`, the baseline first.
        batches: numbers of images per step to measure.
        modes: "plain" or "compile" (`torch.compile`) or both.

    Yields:
        For each batch size `facts`, and `seconds` for 50,000 images, name -> seconds of each round.
    """
    for batch_size in batches:
        steps = max(1, min(MAX_STEPS, MAX_IMAGES // batch_size))
        images = steps * batch_size
        torch.manual_seed(0)
        data = TensorDataset(
            torch.randn(images, 1, 28, 28, device=device),
            torch.randint(0, 10, (images,), device=device),
        )
        actions = {
            variant if mode == "plain" else f"{variant}, compiled": _epoch(
                variant, data, batch_size, device, mode == "compile"
            )
            for variant in variants
            for mode in modes
        }
        seconds = interleave(actions, rounds, warmup, device)
        epochs = {name: [s * TRAIN_IMAGES / images for s in of] for name, of in seconds.items()}
        yield {"facts": {"batch_size": batch_size, "steps": steps}, "seconds": epochs}


def _epoch(
    variant: str, data: TensorDataset, batch_size: int, device: str, compiled: bool
) -> Action:
    model: Any = build_classifier(variant).to(device)
    if compiled:
        model = torch.compile(model, dynamic=False)
    optimizer = build_optimizer(model, 0.001)
    lrs = [0.001] * (len(data) // batch_size)
    return partial(train_epoch, model, optimizer, data, batch_size, lrs)
