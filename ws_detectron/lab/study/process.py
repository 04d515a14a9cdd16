"""Trains one run in its own process, by `tools/train_net.py`."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ws_detectron.errors import DivergedError

from .plan import StudyRun, as_arguments
from .records import (
    DIVERGED,
    FAILED,
    FINISHED,
    OUTPUT,
    RUNNING,
    RunState,
    failure_reason,
    write_state,
)

# between SIGTERM and SIGKILL
STOP_SECONDS = 20.0


def command(run: StudyRun, train_net: Path) -> list[str]:
    """The command line that starts or resumes a run.

    Without a checkpoint in the folder, `--resume` starts from the beginning.
    """
    start = [sys.executable, str(train_net), "--resume", "--config-file", run.config]
    if run.processes > 1:
        # the default address is the same for all runs of a user
        start += ["--num-gpus", str(run.processes), "--dist-url", "auto"]
    return [*start, *as_arguments(run.options)]


def shown(command: Sequence[str]) -> str:
    """A command quoted for a shell."""
    return shlex.join(command)


class RunProcess:
    """The process of a run.

    Makes the run's folder, sets its state to "running", and starts a new log.

    Args:
        run: the run to train.
        train_net: path of tools/train_net.py.
        environ: environment variables, in addition to those of this process.
        pass_fds: file descriptors that the process keeps open.
    """

    def __init__(
        self,
        run: StudyRun,
        train_net: Path,
        environ: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.run = run
        run.folder.mkdir(parents=True, exist_ok=True)
        write_state(run, RUNNING)
        self._start = time.perf_counter()
        self._log = run.folder / OUTPUT
        # Overwritten, as the error of an earlier process is not that of this one. detectron2's
        # log.txt keeps all of them.
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command(run, train_net),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
                start_new_session=True,  # a new process group, so that `stop` ends its children too
                pass_fds=pass_fds,
            )

    def poll(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def finish(self) -> RunState:
        """Waits for the process to end, and writes the state of the run."""
        status = self._process.wait()
        seconds = time.perf_counter() - self._start
        if status == 0:
            # in this order: without checkpoints, an unfinished run starts from the beginning
            state = write_state(self.run, FINISHED, seconds=seconds)
            drop_checkpoints(self.run)
            return state
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        reason = f"{failure_reason(self._log)} ({how})"
        failure = DIVERGED if status == DivergedError.exit_status else FAILED
        return write_state(self.run, failure, reason=reason, seconds=seconds)

    def stop(self) -> None:
        """Ends the process and its children; the state stays "running", to be resumed."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass


def drop_checkpoints(run: StudyRun) -> None:
    """Deletes the checkpoints that a finished run does not keep."""
    patterns = {"all": [], "last": ["model_[0-9]*.pth"], "none": ["last_checkpoint", "*.pth"]}
    for pattern in patterns[run.checkpoints]:
        for path in run.folder.glob(pattern):
            path.unlink()


def train(run: StudyRun, train_net: Path) -> RunState:
    """Trains a run and waits for its end."""
    process = RunProcess(run, train_net, {})
    try:
        return process.finish()
    except BaseException:
        process.stop()
        raise
