"""Gradient accumulation: one optimizer step from a batch that is computed in parts.

`SOLVER.IMS_PER_BATCH` stays the number of images per optimizer step, so LR, schedule, hooks,
`EventStorage` and checkpoints do not change. `SOLVER.ACCUMULATE_STEPS` is the number of parts into
which a batch is split; the memory needed is that of one part.

The loss of a step is the mean of its parts' losses. DistributedDataParallel computes the same from
as many processes, so k parts on one GPU equal k GPUs with one part each. They equal the undivided
batch only where its loss is a mean over images; docs/training.md says where.
"""

import time
from contextlib import ExitStack, nullcontext
from typing import Any, Optional

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ws_detectron.errors import ConfigError


def accumulated_step(loop: SimpleTrainer, steps: int, images: Optional[int] = None) -> None:
    """One optimizer step from `steps` parts, each a batch of the loop's loader.

    The gradient is that of the mean of the parts' losses. Processes exchange it once, with the
    last part; under AMP it is unscaled once, and gradient clipping, which detectron2's optimizers
    do in their `step`, acts on the sum. The mean losses are logged; what the model itself logs
    (accuracy, numbers of samples, pictures) is that of the last part.

    A loss that only some parts have counts as 0 in the others, in the gradient and in the log, so
    that the logged losses sum to the minimized one.

    Args:
        loop: detectron2's SimpleTrainer or AMPTrainer, whose `run_step` this replaces. The options
            of the main branch (`zero_grad_before_forward`, `after_backward`, `log_grad_scaler`,
            `async_write_metrics`) work as there.
        steps: at least 1.
        images: of each part; None if they are not to be counted.

    Raises:
        ConfigError: the loader gives more images at once.
        FloatingPointError: a loss is infinite or NaN.
    """
    model: nn.Module = loop.model
    assert model.training, "the model is in evaluation mode"
    scaler = getattr(loop, "grad_scaler", None)
    zero_before_forward = getattr(loop, "zero_grad_before_forward", False)
    losses: dict[str, torch.Tensor] = {}
    data_time = 0.0
    if zero_before_forward:
        loop.optimizer.zero_grad()
    for part in range(steps):
        start = time.perf_counter()
        batch = next(loop._data_loader_iter)
        data_time += time.perf_counter() - start
        if images is not None and isinstance(batch, list) and len(batch) > images:
            raise ConfigError(
                f"SOLVER.ACCUMULATE_STEPS is {steps}, and the training loader gives {len(batch)} "
                f"images at once, not {images}; build it with "
                "ws_detectron.engine.build_train_loader(cfg, mapper)"
            )
        with ExitStack() as during_part:
            if part < steps - 1:
                during_part.enter_context(EventStorage(get_event_storage().iter))
                if isinstance(model, DistributedDataParallel):
                    during_part.enter_context(model.no_sync())
            device = next(model.parameters()).device.type
            precision = getattr(loop, "precision", torch.float16)
            with torch.autocast(device, precision) if scaler else nullcontext():
                found = model(batch)
                named = {"total_loss": found} if isinstance(found, torch.Tensor) else found
                shares = {name: loss / steps for name, loss in named.items()}
                total: Any = sum(shares.values())  # of shape () or (1,)
            if part == 0 and not zero_before_forward:
                loop.optimizer.zero_grad()
            (scaler.scale(total) if scaler else total).backward()
        for name, share in shares.items():
            losses[name] = losses.get(name, 0) + share.detach()
    if scaler and getattr(loop, "log_grad_scaler", False):
        get_event_storage().put_scalar("[metric]grad_scaler", scaler.get_scale())
    if hasattr(loop, "after_backward"):
        loop.after_backward()
    if getattr(loop, "async_write_metrics", False):
        loop.concurrent_executor.submit(loop._write_metrics, losses, data_time, iter=loop.iter)
    else:
        loop._write_metrics(losses, data_time)
    if scaler:
        scaler.step(loop.optimizer)
        scaler.update()
    else:
        loop.optimizer.step()
