"""One pass over the training images, and predictions."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
from torch import nn
from torch.nn import functional as F

from .epoch_progress import Progress, Timer
from .model import CLASSES
from .recipe import Schedule
from .training_data import Images, batches

EVALUATION_BATCH = 200  # of 500, whose features leave the cache, each image takes 1.5 times as long


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy (None where it is not finite) and share of right answers."""

    loss: Optional[float]
    accuracy: float


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    data: Images,
    batch_size: int,
    first_step: int,
    *,
    progress: Progress,
    amp: bool = False,
    compiled: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> Metrics:
    """Trains on every image once, in an order drawn from torch's global generator.

    Args:
        first_step: steps that were done before, for the schedule.
        compiled: `model` as torch.compile gives it, for all batches of full size.

    Returns:
        The metrics of the images as each was met, dropout included.
    """
    model.train()
    device = data.labels.device
    order = torch.randperm(len(data)).to(device)
    # Loss and accuracy are reckoned from the kept logits now and then, not at every step: on a GPU
    # a step would wait for them, and at batch 2 they would be a good part of it.
    logits = torch.empty(len(data), CLASSES, device=device)
    labels = data.labels[order]
    seen = shown = 0
    timer = Timer()
    casting = autocast(device, amp)
    for step, (images, targets) in enumerate(batches(data, order, batch_size), start=first_step):
        lr = schedule.at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        size = len(targets)
        with casting:
            if compiled is not None and size == batch_size:
                _begin_compiled_step()
                output = compiled(images)
            else:
                output = model(images)
            loss = F.cross_entropy(output, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        logits[seen : seen + size] = output.detach()
        seen += size
        if timer.due():
            now = metrics(logits[shown:seen], labels[shown:seen])
            progress.advance(seen - shown, math.nan if now.loss is None else now.loss, now.accuracy)
            shown = seen
    return metrics(logits, labels)


def predict(model: nn.Module, data: Images, amp: bool = False) -> torch.Tensor:
    """Logits (N, 10), float32, of the model in evaluation."""
    model.eval()
    with torch.inference_mode(), autocast(data.labels.device, amp):
        parts = [model(images).float() for images in data.images.split(EVALUATION_BATCH)]
    return torch.cat(parts)


def metrics(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    """Of logits (N, 10) and classes (N,)."""
    loss = F.cross_entropy(logits, labels).item()
    right = int((logits.argmax(1) == labels).sum()) / len(labels)
    return Metrics(loss if math.isfinite(loss) else None, right)


def autocast(device: torch.device, amp: bool) -> AbstractContextManager:
    """bfloat16, which needs no loss scale and works on CPUs as well."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()


def compile_model(model: nn.Module, device: str) -> Any:
    """torch.compile for batches of one size.

    What it saves at 2 images in a step is the time between kernels: on a GPU it replays the step as
    CUDA graphs, on a CPU it fuses them and, from Python 3.12 on, calls them from C++, by which a
    step takes 8 to 11 % less.
    """
    if device == "cuda":
        return torch.compile(model, mode="reduce-overhead", dynamic=False)
    options: dict[str, Any] = {
        # In torch 2.11 a step of BN called from C++ drops 8 references to None that are not its
        # own; before None became immortal, Python aborted after some 20,000 steps.
        "cpp_wrapper": sys.version_info >= (3, 12),
        # Without the threads as an option, code cached by a run of other threads would be taken.
        "cpp.threads": torch.get_num_threads(),
    }
    return torch.compile(model, options=options, dynamic=False)


def _begin_compiled_step() -> None:
    """CUDA graphs of an earlier step may reuse their memory from here on."""
    mark = getattr(torch.compiler, "cudagraph_mark_step_begin", None)  # from torch 2.2 on
    if mark is not None:
        mark()
