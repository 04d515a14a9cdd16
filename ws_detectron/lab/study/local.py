"""Runs cells on this machine, a number of them side by side."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, Optional

from ws_detectron.errors import UserError
from ws_detectron.utils.locking import locked

from .cell_state import is_finished
from .cells import Cell
from .process import CellProcess
from .progress import Progress

POLL_SECONDS = 0.5
BEAT_SECONDS = 600.0
LOCK = "study.lock"


def slots(jobs: int, gpus: Optional[Sequence[str]], processes: int) -> list[dict[str, str]]:
    """The environment of each place where a cell can run.

    CPU cells share the cores, and `tools/train_net.py` shares those of a cell out to its processes;
    GPU cells get the next `processes` GPUs each.

    Args:
        jobs: how many cells run side by side.
        gpus: the GPUs to use, as CUDA_VISIBLE_DEVICES names them, one as often as cells may share
            it; None for the CPU.
        processes: of each cell.

    Raises:
        UserError: there are not enough GPUs, or a cell would get the same one twice.
    """
    if gpus is None:
        if "OMP_NUM_THREADS" in os.environ:
            return [{} for _ in range(jobs)]
        threads = max(1, _cores() // jobs)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]
    if len(gpus) < jobs * processes:
        raise UserError(
            f"--jobs {jobs} with {processes} process(es) each need {jobs * processes} GPUs; "
            f"there are {len(gpus)} (--gpus, else the visible ones): {', '.join(gpus) or 'none'}. "
            "A GPU that several small cells may share is named once for each: --gpus 0 0 0 0"
        )
    shares = [gpus[i * processes : (i + 1) * processes] for i in range(jobs)]
    for share in shares:
        if len(set(share)) < len(share):
            raise UserError(
                f"--gpus gives a cell {', '.join(share)}; its {processes} processes need a GPU each"
            )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def run_locally(
    cells: Sequence[Cell],
    train_net: Path,
    places: Sequence[dict[str, str]],
    progress: Progress,
    lock: IO[Any],
) -> None:
    """Runs all cells that are not finished; a cell that fails does not keep the others from it.

    Cells that were killed go on from their last checkpoint, and failed ones are tried again.

    Args:
        cells: in the order in which they start.
        train_net: path of tools/train_net.py.
        places: an environment for each cell that runs at a time, of `slots`.
        progress: is told of every start and end.
        lock: of `study_lock`; the cells keep it, so that the study stays locked as long as one of
            them lives, even if this process is killed.
    """
    waiting = [cell for cell in cells if not is_finished(cell)]
    waiting.reverse()
    free = list(reversed(range(len(places))))
    running: dict[int, CellProcess] = {}
    beat = time.monotonic()
    with _ended_by_signals():
        try:
            while waiting or running:
                while waiting and free:
                    place, cell = free.pop(), waiting.pop()
                    progress.began(cell)
                    running[place] = CellProcess(
                        cell, train_net, places[place], pass_fds=[lock.fileno()]
                    )
                for place in [place for place, process in running.items() if process.poll()]:
                    process = running.pop(place)
                    free.append(place)
                    progress.ended(process.cell, process.finish())
                if time.monotonic() - beat > BEAT_SECONDS:
                    beat = time.monotonic()
                    progress.beat(process.cell for process in running.values())
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.stop()


def study_lock(output: Path) -> AbstractContextManager[IO[Any]]:
    """Keeps a study's folder from being worked on twice, for as long as it is entered.

    Raises:
        AlreadyLocked: somebody else works on it, be it only a cell whose `run_study` was killed.
    """
    path = output / LOCK
    return locked(
        path,
        f"{output} is being worked on by another run_study.py, or by a cell of one that was "
        f"killed; wait for it or end it (fuser {path} shows it)",
    )


def _cores() -> int:
    """The cores that this process may use; macOS knows only how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM, and SIGHUP of a terminal that closes, into an exception, so that the cells are
    stopped on the way out. What is ignored, as SIGHUP under nohup, stays so."""

    def leave(number: int, frame: Optional[FrameType]) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    caught = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
