"""One pass over the training images, and predictions."""

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .model import CLASSES
from .training_data import Images, batches
from .training_settings import MOMENTUM, WARMUP, WEIGHT_DECAY

REFRESH_SECONDS = 0.5
EVALUATION_BATCH = 200  # at 500 the features exceed the cache: 1.5 times as long per image


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy (None where it is not finite) and accuracy, 0 to 1."""

    loss: Optional[float]
    accuracy: float


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


class Progress:
    """Receives the progress of a training; this base class ignores it."""

    def begin_epoch(self, epoch: int, epochs: int, images: int) -> None:
        """`epoch` counts from 1."""

    def advance(self, images: int, loss: float, accuracy: float) -> None:
        """Called about twice a second: images since the last call, their loss and accuracy."""

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Called with the epoch's entry in the history, once it is saved."""


class BarProgress(Progress):
    """A progress bar on a terminal, and a line after each epoch.

    Args:
        name: of the run, starts each line.
        echo: called with each line.
    """

    def __init__(self, name: str, echo: Callable[[str], None]) -> None:
        self._name, self._echo = name, echo
        self._bar: Any = None
        self._epochs = 0

    def begin_epoch(self, epoch: int, epochs: int, images: int) -> None:
        self._epochs = epochs
        self._bar = tqdm(
            total=images,
            desc=f"{self._name} epoch {epoch}/{epochs}",
            unit=" images",
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def advance(self, images: int, loss: float, accuracy: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self._bar.update(images)

    def end_epoch(self, record: dict[str, Any]) -> None:
        self._bar.close()
        speed = record["images"] / record["seconds"]
        losses = [record[f"{part}_loss"] for part in ("train", "validation")]
        shown = ["diverged" if loss is None else f"{loss:.4f}" for loss in losses]
        self._echo(
            f"{self._name} epoch {record['epoch']}/{self._epochs}: "
            f"train loss {shown[0]}, accuracy {record['train_accuracy']:.2%}; "
            f"validation loss {shown[1]}, accuracy {record['validation_accuracy']:.2%}; "
            f"{record['seconds']:.1f} s, {speed:.0f} images/s"
        )


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
        first_step: number of steps before this epoch, for the schedule.
        compiled: `model` as compiled by torch.compile, used for all batches of full size.

    Returns:
        The metrics over all images, each computed in its own training step, with dropout.
    """
    model.train()
    device = data.labels.device
    order = torch.randperm(len(data)).to(device)
    # Loss and accuracy are computed from stored logits, about twice a second: computed at every
    # step, they would make a GPU wait, and take a large part of the step at batch size 2.
    logits = torch.empty(len(data), CLASSES, device=device)
    labels = data.labels[order]
    seen = shown = 0
    refreshed = time.perf_counter()
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
        if time.perf_counter() - refreshed >= REFRESH_SECONDS:
            now = metrics(logits[shown:seen], labels[shown:seen])
            progress.advance(seen - shown, math.nan if now.loss is None else now.loss, now.accuracy)
            shown, refreshed = seen, time.perf_counter()
    return metrics(logits, labels)


def predict(model: nn.Module, data: Images, amp: bool = False) -> torch.Tensor:
    """Logits (N, 10), float32, of the model in evaluation mode."""
    model.eval()
    with torch.inference_mode(), autocast(data.labels.device, amp):
        parts = [model(images).float() for images in data.images.split(EVALUATION_BATCH)]
    return torch.cat(parts)


def metrics(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    """Loss and accuracy of logits (N, 10) for labels (N,)."""
    loss = F.cross_entropy(logits, labels).item()
    accuracy = int((logits.argmax(1) == labels).sum()) / len(labels)
    return Metrics(loss if math.isfinite(loss) else None, accuracy)


def autocast(device: torch.device, amp: bool) -> AbstractContextManager:
    """Autocast to bfloat16, which needs no loss scale and works on CPUs as well."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()


def compile_model(model: nn.Module, device: str) -> Any:
    """torch.compile for batches of one size.

    At 2 images per step it saves the time between kernels: on a GPU it replays the step as CUDA
    graphs, on a CPU it fuses the kernels and, from Python 3.12 on, calls them from C++, which makes
    a step 8 to 11 % shorter.
    """
    if device == "cuda":
        return torch.compile(model, mode="reduce-overhead", dynamic=False)
    options: dict[str, Any] = {
        # In torch 2.11 a step of BN called from C++ releases 8 references to None that it does not
        # own; before None became immortal, Python aborted after some 20,000 steps.
        "cpp_wrapper": sys.version_info >= (3, 12),
        # torch's own number of threads is not part of the key under which it caches code
        "cpp.threads": torch.get_num_threads(),
    }
    return torch.compile(model, options=options, dynamic=False)


def _begin_compiled_step() -> None:
    """Lets CUDA graphs reuse the memory of earlier steps."""
    mark = getattr(torch.compiler, "cudagraph_mark_step_begin", None)  # from torch 2.2 on
    if mark is not None:
        mark()
