"""One run in a process of its own: `tools/train_net.py`, in the run's folder."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ws_detectron.errors import DivergedError

from .plan import StudyRun, words
from .records import DIVERGED, FAILED, FINISHED, OUTPUT, RUNNING, RunState, last_words, write_state

# How long a run may take to end when it is asked to
PATIENCE = 20.0


def command(run: StudyRun, train_net: Path) -> list[str]:
    """The command line of a run; given once more, it resumes the run.

    Without a checkpoint in the folder, `--resume` starts from the beginning.
    """
    start = [sys.executable, str(train_net), "--resume", "--config-file", run.config]
    if run.processes > 1:
        # the default address is one for all runs of a user, and several may train at a time
        start += ["--num-gpus", str(run.processes), "--dist-url", "auto"]
    return [*start, *words(run.options)]


def shown(command: Sequence[str]) -> str:
    """A command to be copied into a shell."""
    return shlex.join(command)


class RunProcess:
    """A run that trains.

    Starting it makes its folder, notes that it runs, and starts a new log.

    Args:
        run: to run.
        train_net: path of tools/train_net.py.
        environ: variables besides the ones of this process.
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
        # A new one: what an earlier process said must not pass for the last words of this one.
        # All of them are in detectron2's log.txt.
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command(run, train_net),
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

    def finish(self) -> RunState:
        """Waits for its end and notes how it ended."""
        status = self._process.wait()
        seconds = time.perf_counter() - self._start
        if status == 0:
            # in this order: without checkpoints, an unfinished run starts from the beginning
            state = write_state(self.run, FINISHED, seconds=seconds)
            drop_checkpoints(self.run)
            return state
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        reason = f"{last_words(self._log)} ({how})"
        failure = DIVERGED if status == DivergedError.exit_status else FAILED
        return write_state(self.run, failure, reason=reason, seconds=seconds)

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


def drop_checkpoints(run: StudyRun) -> None:
    """Deletes what a finished run does not keep."""
    patterns = {"all": [], "last": ["model_[0-9]*.pth"], "none": ["last_checkpoint", "*.pth"]}
    for pattern in patterns[run.checkpoints]:
        for path in run.folder.glob(pattern):
            path.unlink()


def train(run: StudyRun, train_net: Path) -> RunState:
    """Runs a run to its end, in the environment as it is."""
    process = RunProcess(run, train_net, {})
    try:
        return process.finish()
    except BaseException:
        process.stop()
        raise
