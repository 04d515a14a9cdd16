"""Trains the runs of a study, each in its own process: on this machine, or as Slurm jobs."""

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Optional

import torch

from ws_detectron.errors import DivergedError, UserError
from ws_detectron.evaluation.comparison import duration
from ws_detectron.evaluation.runs import read_run
from ws_detectron.utils.io import locked, write_text

from .plan import StudyRun
from .records import (
    DIVERGED,
    FAILED,
    FINISHED,
    OUTPUT,
    RUNNING,
    RunResult,
    final_scores,
    read_result,
    read_state,
    write_state,
)
from .study_file import Study

STOP_SECONDS = 20.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.5
LOCK = "study.lock"
JOB = "submitit_job.txt"
# of Slurm; each run is one task that starts its own processes
DEFAULTS = {"tasks_per_node": 1, "nodes": 1, "timeout_min": 24 * 60}


class Progress:
    """Prints a line for each start and each end of a run, with the time left.

    The time left is estimated from the seconds per image of finished runs: those of the same batch
    if there are any, else all.

    Args:
        results: results of all selected runs, finished ones included.
        jobs: number of runs that train at a time; None if unknown, as in a queue, so that no time
            is estimated.
        say: prints a line.
        keep: called with the result of each run that has ended, before the line is printed.
    """

    def __init__(
        self,
        results: Sequence[RunResult],
        jobs: Optional[int],
        say: Callable[[str], None],
        keep: Callable[[RunResult], None] = lambda result: None,
    ) -> None:
        self._results = {result.run.name: result for result in results}
        self._jobs, self._say, self._keep = jobs, say, keep
        self._begun: dict[str, float] = {}
        self._ended = {result.run.name for result in results if result.has_ended}
        if self._ended:
            say(f"{len(self._ended)} of {len(results)} runs are finished already")

    def began(self, run: StudyRun) -> None:
        self._begun[run.name] = time.monotonic()
        self._say(f"{self._position()} {run.name} begins; log: {run.folder}/{OUTPUT}")

    def ended(self, run: StudyRun) -> None:
        result = self._results[run.name] = read_result(run, {})
        assert result.record is not None
        self._ended.add(run.name)
        self._keep(result)
        what = f"{result.status.upper()}: {result.record.reason}"
        if result.status == FINISHED:
            titles = run.study.scores
            scores = [f"{titles[key]} {value:.1f}" for key, value in result.scores.items()]
            what = f"finished in {duration(result.record.seconds)}: {', '.join(scores) or 'no AP'}"
        seconds = self.seconds_left()
        left = "time left unknown" if seconds is None else f"about {duration(seconds)} left"
        self._say(f"{self._position()} {run.name} {what}; {left}")

    def seconds_left(self) -> Optional[float]:
        """None before any run has finished, and for a queue."""
        speeds: dict[int, list[float]] = {}  # batch -> seconds per image
        for result in self._results.values():
            # those of a resumed run are of its last start, in which it sees a part of its images
            record, run = result.record, result.run
            if record and record.state == FINISHED and result.starts == 1 and record.seconds:
                speeds.setdefault(run.batch, []).append(record.seconds / (run.images or 1))
        if not speeds or self._jobs is None:
            return None
        total, now = 0.0, time.monotonic()
        for name in self._results.keys() - self._ended:
            run = self._results[name].run
            each = speeds.get(run.batch) or [*itertools.chain(*speeds.values())]
            expected = (run.images or 1) * sum(each) / len(each)
            total += max(0.0, expected - now + self._begun.get(name, now))
        return total / self._jobs

    def _position(self) -> str:
        return f"[{len(self._ended)}/{len(self._results)}]"


class RunProcess:
    """The process of a run.

    Makes the run's folder, sets its state to "running", and starts a new log. It gets `environ` in
    addition to the variables of this process, and keeps the file descriptors `pass_fds` open.
    """

    def __init__(
        self, run: StudyRun, environ: dict[str, str], pass_fds: Sequence[int] = ()
    ) -> None:
        self.run, self.environ = run, environ
        run.folder.mkdir(parents=True, exist_ok=True)
        write_state(run, RUNNING)
        self._start = time.perf_counter()
        # Overwritten, as the error of an earlier process is not that of this one. detectron2's
        # log.txt keeps all of them.
        with open(run.folder / OUTPUT, "wb") as log:
            self._process = subprocess.Popen(
                run.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
                start_new_session=True,  # a new process group, so that `stop` ends its children too
                pass_fds=pass_fds,
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self) -> None:
        """Waits for the process to end, and writes the state of the run."""
        status, run = self._process.wait(), self.run
        if status == 0:
            missing = [] if run.cfg else final_scores(run, read_run(run.folder, "").rows)[1]
            state, reason = FAILED if missing else FINISHED, "; ".join(missing)
        else:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            reason = f"{failure_reason(run.folder / OUTPUT)} ({how})"
            state = DIVERGED if status == DivergedError.exit_status else FAILED
        write_state(run, state, reason=reason, seconds=time.perf_counter() - self._start)
        if state == FINISHED:  # now: without checkpoints, an unfinished run starts again
            drop_checkpoints(run)

    def stop(self) -> None:
        """Ends the process and its children; the state stays "running", to be resumed."""
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                return


def failure_reason(path: Path) -> str:
    """Why a process failed: the last `error:` line of its log, else the last non-empty line."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    filled = [line.strip() for line in lines if line.strip()]
    errors = [line[len("error: ") :] for line in filled if line.startswith("error: ")]
    return (errors or filled or ["it wrote nothing"])[-1]


def drop_checkpoints(run: StudyRun) -> None:
    """Deletes the checkpoints that a finished run does not keep."""
    patterns = {"all": [], "last": ["model_[0-9]*.pth"], "none": ["last_checkpoint", "*.pth"]}
    for pattern in patterns[run.study.checkpoints]:
        for path in run.folder.glob(pattern):
            path.unlink()


def environments(study: Study, jobs: int, gpus: Optional[Sequence[int]]) -> list[dict[str, str]]:
    """The environment of each worker, which trains one run at a time.

    On the CPU, workers divide the cores, and `tools/train_net.py` divides those of a run among its
    processes. On GPUs, each worker gets the next `processes` GPUs.

    Args:
        study: its `device` and `processes` count.
        jobs: number of workers.
        gpus: numbers of GPUs, each once per run that may use it; None for all visible ones.

    Raises:
        UserError: there are not enough GPUs, or a run would get the same one twice.
    """
    if study.device == "cpu":
        if gpus is not None:
            raise UserError("--gpus was given, but the study is for the CPU; add --device cuda")
        if "OMP_NUM_THREADS" in os.environ:
            return [{}] * jobs
        on_linux = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
        return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))}] * jobs
    # visible GPUs may not be the first of the machine, and may be given by UUID
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count, each = torch.cuda.device_count(), study.processes
    names = [*map(str, gpus)] if gpus is not None else visible[:count] or [*map(str, range(count))]
    if len(names) < jobs * each:
        raise UserError(
            f"--jobs {jobs} with {each} process(es) each need {jobs * each} GPUs; there are "
            f"{len(names)} (--gpus, else the visible ones): {', '.join(names) or 'none'}. To share "
            "a GPU between runs, name it once for each: --gpus 0 0 0 0"
        )
    shares = [names[i * each : (i + 1) * each] for i in range(jobs)]
    for share in shares:
        if len(set(share)) < each:
            raise UserError(
                f"--gpus gives a run {', '.join(share)}; its {each} processes need a GPU each"
            )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def run_locally(
    runs: Sequence[StudyRun],
    workers: Sequence[dict[str, str]],
    progress: Progress,
    lock: IO[Any],
) -> None:
    """Trains runs here; if one fails, the others continue.

    Runs that were killed resume from their last checkpoint, and failed ones are tried again.

    Args:
        runs: in the order in which they start.
        workers: an environment for each worker, as returned by `environments`.
        progress: reports every start and end.
        lock: as returned by `study_lock`; the runs inherit it, so that the study stays locked while
            any of them is alive, even if this process is killed.
    """
    waiting, free = [*runs], [*workers]
    running: list[RunProcess] = []
    with _ended_by_signals():
        try:
            while waiting or running:
                while waiting and free:
                    run = waiting.pop(0)
                    progress.began(run)
                    running.append(RunProcess(run, free.pop(0), [lock.fileno()]))
                for process in [process for process in running if process.has_ended()]:
                    running.remove(process)
                    free.append(process.environ)
                    process.finish()
                    progress.ended(process.run)
                time.sleep(POLL_SECONDS)
        finally:
            for process in running:
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


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP (a closed terminal) into SystemExit, so that the runs are stopped.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored.
    """

    def leave(number: int, frame: Optional[FrameType]) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        signal.signal(number, handler if handler == signal.SIG_IGN else leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunJob:
    """The function of a job. If Slurm preempts it or its time is up, submitit submits it again."""

    def __call__(self, run: StudyRun) -> None:
        process = RunProcess(run, {})
        try:
            process.finish()
        except BaseException:
            process.stop()
            raise

    def checkpoint(self, run: StudyRun) -> Any:
        """What submitit submits again: the same, as a run resumes from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


def run_on_slurm(
    runs: Sequence[StudyRun],
    parameters: dict[str, Any],
    folder: Path,
    progress: Progress,
    *,
    cluster: str = "slurm",
    poll_seconds: float = 10.0,
) -> None:
    """Submits runs and waits for them.

    If this process ends, the jobs stay in the queue; the same call later waits for them instead of
    submitting them again.

    Args:
        runs: in the order in which they are submitted; their folders and scripts are on a file
            system that the nodes share.
        parameters: arguments of `submitit.AutoExecutor.update_parameters`; the number of GPUs is
            that of a run's processes by default.
        folder: folder of submitit's own files.
        progress: reports every submission and end.
        cluster: submitit's name of the cluster; "local" runs the jobs here.
        poll_seconds: seconds between queries of the queue.

    Raises:
        UserError: submitit is not installed, there is no Slurm, a parameter is unknown, or Slurm
            refuses a job.
    """
    try:
        import submitit
        from submitit.helpers import as_completed
    except ImportError as error:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster)
    except RuntimeError as error:
        raise UserError(f"--launcher slurm cannot submit jobs here: {error}") from error
    job_type = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    jobs: list[Any] = []
    for run in runs:
        path = run.folder / JOB  # of an earlier call, if it may still be in the queue
        job: Any = job_type(folder / "%j", path.read_text().strip()) if path.is_file() else None
        if job is None or job.done():
            needs = {"gpus_per_node": run.study.processes} if run.study.device == "cuda" else {}
            try:
                executor.update_parameters(**{**DEFAULTS, **needs, **parameters, "name": run.name})
                job = executor.submit(RunJob(), run)
            except (NameError, TypeError, ValueError) as error:
                raise UserError(f"submitit refuses the study's `slurm`: {error}") from error
            except RuntimeError as error:  # from sbatch; submitit raises subclasses
                raise UserError(
                    f"{run.name} could not be submitted: {error}. The same command waits for the "
                    "runs that are already submitted"
                ) from error
            write_text(path, job.job_id)
        progress.began(run)
        jobs.append(job)
    for job in as_completed(jobs, poll_frequency=poll_seconds):
        run = runs[jobs.index(job)]
        (run.folder / JOB).unlink(missing_ok=True)
        _note_failure(run, job.exception())
        progress.ended(run)


def _note_failure(run: StudyRun, error: Optional[BaseException]) -> None:
    """Sets a run's state to "failed" if its job failed, unless that was after the training."""
    state = read_state(run)
    if error is not None and (state is None or state.state != FINISHED):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        write_state(run, FAILED, reason=lines[-1])
