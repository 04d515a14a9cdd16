"""SIGTERM and SIGINT ask for the end of a training, as schedulers do before they take the machine.

The step is finished and a checkpoint written; see `StopOnSignal`. A second signal ends the process
at once.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from ws_detectron.checkpoint import WSCheckpointer

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One request often arrives several times: a terminal or scheduler signals all processes of a job,
# and what started them passes it on.
_ONE_REQUEST = 1.0  # seconds


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Within it, the first SIGTERM or SIGINT calls `handle` and a later one ends the process.

    Signals within a second of the first count as the same. A signal that is ignored stays so, as
    SIGINT in a job that a shell starts with `&`. In threads but the main one nothing is changed.

    Args:
        handle: gets the number of the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def received(number: int, frame: object) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
            handle(number)
        elif now - first[0] > _ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, received)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(SystemExit):
    """A signal has ended the training; the status is 128 + signal, as a shell has it."""


class StopOnSignal(HookBase):
    """Ends the training after the step in which a process of the job got a signal.

    After each step the processes agree whether one of them got a signal, so that all end with the
    same step, after the main process has written a checkpoint.

    Args:
        checkpointer: of the trainer.
        period: SOLVER.CHECKPOINT_PERIOD, with which checkpoints are written already.
        device: of the tensor that is reduced, MODEL.DEVICE.
    """

    def __init__(self, checkpointer: WSCheckpointer, period: int, device: str) -> None:
        self._checkpointer, self._period, self._device = checkpointer, period, device
        self._signal = 0
        self.stops = False

    def request(self, number: int) -> None:
        """Ends the training after this step; called in the handler of signal `number`."""
        self._signal = number

    def after_step(self) -> None:
        """Writes the checkpoint and raises if a signal came.

        Raises:
            Stopped: on every process.
        """
        number = self._agreed()
        if not number:
            return
        self.stops = True
        done = self.trainer.iter + 1
        if done % self._period and done < self.trainer.max_iter:
            self._checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        logger.warning(
            "%s: the training ends after iteration %d, and --resume continues it",
            signal.Signals(number).name,
            self.trainer.iter,
        )
        raise Stopped(128 + number)

    def _agreed(self) -> int:
        if comm.get_world_size() == 1:
            return self._signal
        number = torch.tensor(self._signal, device=self._device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)
