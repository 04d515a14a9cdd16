"""Runs runs as jobs of Slurm, through submitit."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ws_detectron.errors import UserError
from ws_detectron.utils.io import write_text

from .plan import StudyRun
from .process import train
from .progress import Progress
from .records import FAILED, FINISHED, RunState, is_finished, read_state, write_state

JOB = "submitit_job.txt"
POLL_SECONDS = 10.0
# each run is one task that starts its own processes
DEFAULTS = {"tasks_per_node": 1, "nodes": 1, "timeout_min": 24 * 60}


class RunJob:
    """What a job runs. When Slurm preempts it or its time is up, submitit submits it once more."""

    def __call__(self, run: StudyRun, train_net: Path) -> RunState:
        return train(run, train_net)

    def checkpoint(self, run: StudyRun, train_net: Path) -> Any:
        """submitit asks for what to submit: the same, as a run resumes from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run, train_net)


def run_on_slurm(
    runs: Sequence[StudyRun],
    train_net: Path,
    parameters: dict[str, Any],
    folder: Path,
    progress: Progress,
    *,
    cluster: str = "slurm",
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Submits all runs that are not finished and waits for them.

    Ending this process leaves the jobs in the queue; the same call later finds them there and
    waits on, instead of submitting them twice.

    Args:
        runs: in the order in which they are submitted.
        train_net: path of tools/train_net.py; like the runs' folders on a file system that the
            nodes share.
        parameters: what `submitit.AutoExecutor.update_parameters` takes; GPUs follow the runs.
        folder: for submitit's own files.
        progress: is told of every submission and end.
        cluster: submitit's name for it; "local" runs the jobs here.
        poll_seconds: between looks at the queue.

    Raises:
        UserError: submitit is not installed, there is no Slurm, a parameter is unknown, or Slurm
            refuses a job.
    """
    submitit = _import_submitit()
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster)
    except RuntimeError as error:
        raise UserError(f"--launcher slurm cannot submit jobs here: {error}") from error
    jobs = {}
    for run in runs:
        if is_finished(run):
            (run.folder / JOB).unlink(missing_ok=True)  # it ended while nobody waited for it
            continue
        job = _earlier_job(submitit, cluster, run, folder)
        if job is None:
            on_gpu = run.options["MODEL.DEVICE"] == "cuda"
            needs = {"gpus_per_node": run.processes} if on_gpu else {}
            try:
                executor.update_parameters(**{**DEFAULTS, **needs, **parameters, "name": run.name})
            except (NameError, TypeError, ValueError) as error:
                raise UserError(f"submitit refuses the study's `slurm`: {error}") from error
            try:
                job = executor.submit(RunJob(), run, train_net)
            except RuntimeError as error:  # of sbatch: submitit's own errors are of this kind
                raise UserError(
                    f"{run.name} could not be submitted: {error}. The same command continues with "
                    "what is submitted already"
                ) from error
            write_text(run.folder / JOB, job.job_id)
        progress.began(run)
        jobs[run.name] = run, job
    while jobs:
        for name in [name for name, (_, job) in jobs.items() if job.done()]:
            run, job = jobs.pop(name)
            (run.folder / JOB).unlink(missing_ok=True)
            progress.ended(run, _outcome(run, job))
        if jobs:
            time.sleep(poll_seconds)


def _outcome(run: StudyRun, job: Any) -> RunState:
    error = job.exception()
    if error is None:
        return job.result()
    state = read_state(run)
    if state is not None and state.state == FINISHED:  # what failed came after the training
        return state
    lines = str(error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    return write_state(run, FAILED, reason=reason)


def _earlier_job(submitit: Any, cluster: str, run: StudyRun, folder: Path) -> Any:
    """The job of an earlier call that is still in the queue, if there is one."""
    path = run.folder / JOB
    if not path.is_file():
        return None
    kind = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    job = kind(folder=folder / "%j", job_id=path.read_text().strip())
    return None if job.done() else job


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "--launcher slurm needs submitit; install it with: pip install submitit"
        ) from error
    return submitit
