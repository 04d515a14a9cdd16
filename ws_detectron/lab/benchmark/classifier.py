"""Time per epoch of the Fashion-MNIST classifier's variants."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ws_detectron.lab.fashion_mnist.loop import (
    Progress,
    Schedule,
    build_optimizer,
    compile_model,
    train_epoch,
)
from ws_detectron.lab.fashion_mnist.model import build_classifier
from ws_detectron.lab.fashion_mnist.training_data import Images
from ws_detectron.lab.fashion_mnist.training_settings import TRAIN_IMAGES

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
        data = Images(
            torch.randn(images, 28, 28, 1, device=device).permute(0, 3, 1, 2),
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


def _epoch(variant: str, data: Images, batch_size: int, device: str, compiled: bool) -> Action:
    model: nn.Module = build_classifier(variant).to(device)
    return partial(
        train_epoch, model, build_optimizer(model, 0.001), Schedule("constant", 0.001, 1), data,
        batch_size, 0, progress=Progress(),
        compiled=compile_model(model, device) if compiled else None,
    )  # fmt: skip
