"""One cell in a process of its own: `tools/train_net.py`, in the cell's folder."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ws_detectron.errors import DivergedError

from .cell_state import FAILED, FINISHED, OUTPUT, RUNNING, CellState, last_words, write_state
from .cells import Cell, words

# How long a cell may take to end when it is asked to
PATIENCE = 20.0


def command(cell: Cell, train_net: Path) -> list[str]:
    """The command line of a cell; given once more, it goes on where the cell stopped.

    Without a checkpoint in the folder, `--resume` starts from the beginning.
    """
    start = [sys.executable, str(train_net), "--resume", "--config-file", cell.config]
    if cell.processes > 1:
        # the default address is one for all runs of a user; cells may run side by side
        start += ["--num-gpus", str(cell.processes), "--dist-url", "auto"]
    return [*start, *words(cell.options)]


def shown(command: Sequence[str]) -> str:
    """A command to be copied into a shell."""
    return shlex.join(command)


class CellProcess:
    """A cell that runs.

    Starting it makes its folder, notes that it runs, and begins its log anew.

    Args:
        cell: to run.
        train_net: path of tools/train_net.py.
        environ: variables besides the ones of this process.
        pass_fds: file descriptors that the process keeps open.
    """

    def __init__(
        self,
        cell: Cell,
        train_net: Path,
        environ: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.cell = cell
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_state(cell, RUNNING)
        self._start = time.perf_counter()
        self._log = cell.folder / OUTPUT
        # Written anew: what an earlier process said must not pass for the last words of this one.
        # All of them are in detectron2's log.txt.
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command(cell, train_net),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
                start_new_session=True,  # a group of its own, so that `stop` reaches its children
                pass_fds=pass_fds,
            )

    def poll(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def finish(self) -> CellState:
        """Waits for its end and notes how it ended."""
        status = self._process.wait()
        seconds = time.perf_counter() - self._start
        if status == 0:
            # in this order, as without checkpoints a cell that is not finished would start anew
            state = write_state(self.cell, FINISHED, seconds=seconds)
            drop_checkpoints(self.cell)
            return state
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        reason = f"{last_words(self._log)} ({how})"
        lost = status == DivergedError.exit_status
        return write_state(self.cell, FAILED, reason=reason, seconds=seconds, lost=lost)

    def stop(self) -> None:
        """Ends it and its children; its state stays "running", so that it is resumed."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass


def drop_checkpoints(cell: Cell) -> None:
    """Deletes what a finished cell does not keep."""
    patterns = {"all": [], "last": ["model_[0-9]*.pth"], "none": ["last_checkpoint", "*.pth"]}
    for pattern in patterns[cell.checkpoints]:
        for path in cell.folder.glob(pattern):
            path.unlink()


def run_cell(cell: Cell, train_net: Path) -> CellState:
    """Runs a cell to its end, in the environment as it is."""
    process = CellProcess(cell, train_net, {})
    try:
        return process.finish()
    except BaseException:
        process.stop()
        raise
