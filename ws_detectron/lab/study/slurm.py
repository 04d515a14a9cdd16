"""Trains runs as Slurm jobs, through submitit."""

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
    """The function of a job. If Slurm preempts it or its time is up, submitit submits it again."""

    def __call__(self, run: StudyRun, train_net: Path) -> RunState:
        return train(run, train_net)

    def checkpoint(self, run: StudyRun, train_net: Path) -> Any:
        """What submitit submits again: the same, as a run resumes from its checkpoint."""
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

    If this process ends, the jobs stay in the queue; the same call later waits for them instead of
    submitting them again.

    Args:
        runs: in the order in which they are submitted.
        train_net: path of tools/train_net.py; like the runs' folders on a file system that the
            nodes share.
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
    submitit = _import_submitit()
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster)
    except RuntimeError as error:
        raise UserError(f"--launcher slurm cannot submit jobs here: {error}") from error
    jobs = {}
    for run in runs:
        if is_finished(run):
            (run.folder / JOB).unlink(missing_ok=True)  # it ended after the last call
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
            except RuntimeError as error:  # from sbatch; submitit raises subclasses
                raise UserError(
                    f"{run.name} could not be submitted: {error}. The same command waits for the "
                    "runs that are already submitted"
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
    if state is not None and state.state == FINISHED:  # the job failed after the training
        return state
    lines = str(error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    return write_state(run, FAILED, reason=reason)


def _earlier_job(submitit: Any, cluster: str, run: StudyRun, folder: Path) -> Any:
    """The job of an earlier call, if it is still in the queue."""
    path = run.folder / JOB
    if not path.is_file():
        return None
    job_type = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    job = job_type(folder=folder / "%j", job_id=path.read_text().strip())
    return None if job.done() else job


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "--launcher slurm needs submitit; install it with: pip install submitit"
        ) from error
    return submitit
