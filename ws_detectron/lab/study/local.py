"""Trains the runs of a study on this machine, several at a time."""

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

from .plan import StudyRun
from .process import RunProcess
from .progress import Progress
from .records import is_finished

POLL_SECONDS = 0.5
STATUS_SECONDS = 600.0
LOCK = "study.lock"


def slots(jobs: int, gpus: Optional[Sequence[str]], processes: int) -> list[dict[str, str]]:
    """The environment of each worker, which trains one run at a time.

    On the CPU, workers divide the cores, and `tools/train_net.py` divides those of a run among its
    processes. On GPUs, each worker gets the next `processes` GPUs.

    Args:
        jobs: number of workers.
        gpus: GPUs, as CUDA_VISIBLE_DEVICES names them, each once per run that may use it; None for
            the CPU.
        processes: number of processes of each run.

    Raises:
        UserError: there are not enough GPUs, or a run would get the same one twice.
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
            "To share a GPU between runs, name it once for each: --gpus 0 0 0 0"
        )
    shares = [gpus[i * processes : (i + 1) * processes] for i in range(jobs)]
    for share in shares:
        if len(set(share)) < len(share):
            raise UserError(
                f"--gpus gives a run {', '.join(share)}; its {processes} processes need a GPU each"
            )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def run_locally(
    runs: Sequence[StudyRun],
    train_net: Path,
    workers: Sequence[dict[str, str]],
    progress: Progress,
    lock: IO[Any],
) -> None:
    """Trains all runs that are not finished; if one fails, the others continue.

    Runs that were killed resume from their last checkpoint, and failed ones are tried again.

    Args:
        runs: in the order in which they start.
        train_net: path of tools/train_net.py.
        workers: an environment for each worker, as returned by `slots`.
        progress: reports every start and end.
        lock: as returned by `study_lock`; the runs inherit it, so that the study stays locked while
            any of them is alive, even if this process is killed.
    """
    waiting = [run for run in runs if not is_finished(run)]
    waiting.reverse()
    free = list(reversed(range(len(workers))))
    running: dict[int, RunProcess] = {}
    reported = time.monotonic()
    with _ended_by_signals():
        try:
            while waiting or running:
                while waiting and free:
                    worker, run = free.pop(), waiting.pop()
                    progress.began(run)
                    running[worker] = RunProcess(
                        run, train_net, workers[worker], pass_fds=[lock.fileno()]
                    )
                for worker in [worker for worker, process in running.items() if process.poll()]:
                    process = running.pop(worker)
                    free.append(worker)
                    progress.ended(process.run, process.finish())
                if time.monotonic() - reported > STATUS_SECONDS:
                    reported = time.monotonic()
                    progress.report_running(process.run for process in running.values())
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.stop()


def study_lock(output: Path) -> AbstractContextManager[IO[Any]]:
    """Within it, no other process can work on a study's folder.

    Raises:
        AlreadyLocked: another `run_study.py` works on it, or a run of one that was killed.
    """
    path = output / LOCK
    return locked(
        path,
        f"{output} is being worked on by another run_study.py, or by a run of one that was "
        f"killed; wait for it or end it (fuser {path} shows the process)",
    )


def _cores() -> int:
    """Number of cores that this process may use; on macOS, of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP (a closed terminal) into SystemExit, so that the runs are stopped.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored.
    """

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
