"""Runs cells as jobs of Slurm, through submitit."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ws_detectron.errors import UserError
from ws_detectron.utils.io import write_text

from .cell_state import FAILED, FINISHED, CellState, is_finished, read_state, write_state
from .cells import Cell
from .process import run_cell
from .progress import Progress

JOB = "submitit_job.txt"
POLL_SECONDS = 10.0
# each cell is one task that starts its own processes
DEFAULTS = {"tasks_per_node": 1, "nodes": 1, "timeout_min": 24 * 60}


class CellJob:
    """What a job runs. When Slurm preempts it or its time is up, submitit submits it once more."""

    def __call__(self, cell: Cell, train_net: Path) -> CellState:
        return run_cell(cell, train_net)

    def checkpoint(self, cell: Cell, train_net: Path) -> Any:
        """submitit asks for what to submit: the same, as a cell goes on from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, cell, train_net)


def run_on_slurm(
    cells: Sequence[Cell],
    train_net: Path,
    parameters: dict[str, Any],
    folder: Path,
    progress: Progress,
    *,
    cluster: str = "slurm",
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Submits all cells that are not finished and waits for them.

    Ending this process leaves the jobs in the queue; the same call later finds them there and
    waits on, instead of submitting them twice.

    Args:
        cells: in the order in which they are submitted.
        train_net: path of tools/train_net.py; like the cells' folders on a file system that the
            nodes share.
        parameters: what `submitit.AutoExecutor.update_parameters` takes; GPUs follow the cells.
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
    for cell in cells:
        if is_finished(cell):
            (cell.folder / JOB).unlink(missing_ok=True)  # it ended while nobody waited for it
            continue
        job = _earlier_job(submitit, cluster, cell, folder)
        if job is None:
            on_gpu = cell.options["MODEL.DEVICE"] == "cuda"
            needs = {"gpus_per_node": cell.processes} if on_gpu else {}
            try:
                executor.update_parameters(**{**DEFAULTS, **needs, **parameters, "name": cell.name})
            except (NameError, TypeError, ValueError) as error:
                raise UserError(f"submitit refuses the study's `slurm`: {error}") from error
            try:
                job = executor.submit(CellJob(), cell, train_net)
            except RuntimeError as error:  # of sbatch: submitit's own errors are of this kind
                raise UserError(
                    f"{cell.name} could not be submitted: {error}. The same command goes on with "
                    "what is submitted already"
                ) from error
            write_text(cell.folder / JOB, job.job_id)
        progress.began(cell)
        jobs[cell.name] = cell, job
    while jobs:
        for name in [name for name, (_, job) in jobs.items() if job.done()]:
            cell, job = jobs.pop(name)
            (cell.folder / JOB).unlink(missing_ok=True)
            progress.ended(cell, _outcome(cell, job))
        if jobs:
            time.sleep(poll_seconds)


def _outcome(cell: Cell, job: Any) -> CellState:
    error = job.exception()
    if error is None:
        return job.result()
    state = read_state(cell)
    if state is not None and state.state == FINISHED:  # what failed came after the training
        return state
    lines = str(error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    return write_state(cell, FAILED, reason=reason, lost=False)


def _earlier_job(submitit: Any, cluster: str, cell: Cell, folder: Path) -> Any:
    """The job of an earlier call that is still in the queue, if there is one."""
    path = cell.folder / JOB
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
