"""What a training shows while it runs."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

REFRESH_SECONDS = 0.5


class Progress:
    """Takes note of nothing; the base of what does."""

    def begin_epoch(self, epoch: int, epochs: int, images: int) -> None:
        """`epoch` counts from 1."""

    def advance(self, images: int, loss: float, accuracy: float) -> None:
        """So many images later; loss and accuracy (0 to 1) of these. About twice a second."""

    def end_epoch(self, record: dict[str, Any]) -> None:
        """The epoch's entry in the history, after it was saved."""


class BarProgress(Progress):
    """A bar with loss, accuracy and images/s on a terminal, and a line for each epoch anywhere.

    Args:
        name: of the run, before each line.
        say: takes a line.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
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
        self._say(
            f"{self._name} epoch {record['epoch']}/{self._epochs}: "
            f"train loss {shown[0]}, accuracy {record['train_accuracy']:.2%}; "
            f"validation loss {shown[1]}, accuracy {record['validation_accuracy']:.2%}; "
            f"{record['seconds']:.1f} s, {speed:.0f} images/s"
        )


class Timer:
    """Says when `REFRESH_SECONDS` have passed since it last said so."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self._last < REFRESH_SECONDS:
            return False
        self._last = now
        return True
