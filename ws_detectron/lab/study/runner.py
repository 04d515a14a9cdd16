"""A whole study: search, runs, report."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Optional

from ws_detectron.errors import UserError

from .choice import choose
from .local import run_locally, slots, study_lock
from .plan import StudyRun, check_runs, search_runs, study_runs
from .process import command, drop_checkpoints, shown
from .progress import Progress
from .records import (
    DIVERGED,
    FINISHED,
    Record,
    RunResult,
    RunState,
    StudyResults,
    add_records,
    folder_record,
    is_finished,
    is_recorded,
    read_records,
    read_results,
    refuse_old_form,
)
from .report import problems_of, write_report
from .slurm import JOB, run_on_slurm
from .spec import Study

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Args:
        train_net: path of tools/train_net.py.
        jobs: how many runs train at a time.
        gpus: numbers of the GPUs to use, one as often as runs may share it; None for all visible
            ones on "cuda", for none on "cpu".
        launcher: "local" or "slurm".
        cluster: submitit's name for the cluster of "slurm".
        variants, batches, seeds: run only these; None for all. The report is of all.
        records: folder in which runs that have ended are recorded, and whose recorded runs are not
            trained again; None for none.
    """

    train_net: Path
    jobs: int = 1
    gpus: Optional[Sequence[int]] = None
    launcher: str = "local"
    cluster: str = "slurm"
    variants: Optional[Collection[str]] = field(default=None)
    batches: Optional[Collection[int]] = field(default=None)
    seeds: Optional[Collection[int]] = field(default=None)
    records: Optional[Path] = None


def run_study(study: Study, options: Options, say: Say) -> StudyResults:
    """Trains what is not finished: the search first, then the runs with what it chose.

    Runs that failed are tried again. A run of a search that diverged is not, as its choice must not
    change under runs that are finished; only where all runs of a variant diverged, they are.

    Raises:
        UserError: a run cannot work on any machine, or the folder is being worked on.
    """
    check_runs([*search_runs(study), *study_runs(study, {})])
    refuse_old_form(study.output / "cells")
    with study_lock(study.output) as lock:
        _train(study, "search", search_runs(study), options, say, lock)
        choices = _choices(study, read_records(options.records))
        _train(study, "study", study_runs(study, choices), options, say, lock)
    return read_study_results(study, options.records)


def _train(
    study: Study, what: str, runs: Sequence[StudyRun], options: Options, say: Say, lock: IO[Any]
) -> None:
    """Trains those of the runs that were asked for and are not finished."""
    results = _recorded(study, what, runs, options.records, say)
    asked = {run.name for run in _selected(study, runs, options)}
    results = [result for result in results if result.run.name in asked]
    if what == "search":
        results = _not_diverged(results)
    if not results:
        return
    for result in results:
        if is_finished(result.run):  # its process may have been killed before it came to that
            drop_checkpoints(result.run)
    wanted = [r.run for r in results if r.status != FINISHED or is_finished(r.run)]
    say(f"{what}: {len(results)} runs in {study.output}")
    progress = Progress(
        results,
        options.jobs if options.launcher == "local" else None,
        say,
        keep=partial(_keep, study, options.records),
    )
    if options.launcher == "slurm":
        run_on_slurm(
            wanted,
            options.train_net,
            study.slurm,
            study.output / "submitit",
            progress,
            cluster=options.cluster,
        )
        return
    _check_not_queued(wanted)
    gpus = _gpus(study, options)
    workers = slots(options.jobs, gpus, study.processes)
    if gpus is not None and options.jobs < len(gpus) // study.processes:
        what = "GPUs" if len(set(gpus)) == len(gpus) else "workers on GPUs"
        say(
            f"{options.jobs * study.processes} of {len(gpus)} {what} are used; "
            f"--jobs {len(gpus) // study.processes} uses more of them, for runs side by side"
        )
    run_locally(wanted, options.train_net, workers, progress, lock)


def _recorded(
    study: Study, what: str, runs: Sequence[StudyRun], folder: Optional[Path], say: Say
) -> list[RunResult]:
    """Results of all runs; those that ended without a record get one."""
    records = read_records(folder)
    results = read_results(runs, records)
    if folder is not None:
        say(f"{what}: {sum(run.name in records for run in runs)} runs taken from {folder}")
        new = {
            result.run.name: Record(result.state, result.metrics.rows, result.run_record)
            for result in results
            if result.state is not None and is_recorded(result.run, result.state)
        }
        add_records(
            folder,
            study.title,
            {k: v for k, v in new.items() if k not in records or records[k].state != v.state},
        )
    return results


def _keep(study: Study, folder: Optional[Path], run: StudyRun, state: RunState) -> None:
    """Records a run that has ended."""
    if folder is not None and is_recorded(run, state):
        add_records(folder, study.title, {run.name: folder_record(run, state)})


def _not_diverged(results: Sequence[RunResult]) -> list[RunResult]:
    """Without the diverged runs of a search, where another of the variant and batch did not."""
    open_ones = {(r.run.variant, r.run.batch) for r in results if r.status != DIVERGED}
    return [
        r for r in results if r.status != DIVERGED or (r.run.variant, r.run.batch) not in open_ones
    ]


def read_study_results(study: Study, records: Optional[Path] = None) -> StudyResults:
    """What is there of a study, finished or not; changes no file.

    Args:
        study: of `read_study`.
        records: folder of records, for runs whose own folders hold less; None for none.

    Raises:
        ConfigError: a folder or record is of other settings than its run; names them.
    """
    refuse_old_form(study.output / "cells")
    recorded = read_records(records)
    searched = read_results(search_runs(study), recorded)
    runs = study_runs(study, choose(study, searched))
    return StudyResults(study, read_results(runs, recorded), searched)


def report_study(results: StudyResults, folder: Path, say: Say, *, page: bool = False) -> list[str]:
    """Writes the report and says where; returns what is missing or failed."""
    paths = write_report(results, folder, page=page)
    say(f"report: {paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    return problems_of(results)


def commands(study: Study, options: Options) -> list[str]:
    """The command of each run that would run, finished ones included, for a shell.

    Where a search has not ended, the runs that follow it are shown with the values of the study
    file, and a comment says so.
    """
    lines = []
    searching = search_runs(study)
    choices = _choices(study, read_records(options.records))
    if searching:
        lines.append("# search")
        lines += _commands(_selected(study, searching, options), options)
        lines.append("# runs")
        unknown = sorted({variant for (variant, _), choice in choices.items() if choice is None})
        if unknown:
            keys = ", ".join(study.search.grid if study.search else ())
            lines.append(f"# {keys} of {', '.join(unknown)}: what the search will find")
            choices = {where: choice or {} for where, choice in choices.items()}
    lines += _commands(_selected(study, study_runs(study, choices), options), options)
    return lines


def _commands(runs: Sequence[StudyRun], options: Options) -> list[str]:
    return [shown(command(run, options.train_net)) for run in runs]


def _choices(study: Study, records: Mapping[str, Record]) -> dict:
    return choose(study, read_results(search_runs(study), records))


def _selected(study: Study, runs: Sequence[StudyRun], options: Options) -> list[StudyRun]:
    """The runs that were asked for; a search is of a variant, whatever batches and seeds."""
    known: dict[str, Collection] = {
        "variants": [variant.name for variant in study.variants],
        "batches": study.batches,
        "seeds": study.seeds,
    }
    for name, values in known.items():
        unknown = set(getattr(options, name) or ()) - set(values)
        if unknown:
            raise UserError(
                f"--{name} has {', '.join(map(str, sorted(unknown)))}; the study has "
                f"{', '.join(map(str, values))}"
            )
    return [
        run
        for run in runs
        if (options.variants is None or run.variant in options.variants)
        and (
            run.searching
            or (
                (options.batches is None or run.batch in options.batches)
                and (options.seeds is None or run.seed in options.seeds)
            )
        )
    ]


def _check_not_queued(runs: Sequence[StudyRun]) -> None:
    """A job of Slurm and a process of ours must not train in one folder."""
    for run in runs:
        path = run.folder / JOB
        if path.is_file() and not is_finished(run):
            raise UserError(
                f"{run.name} is job {path.read_text('utf-8').strip()} of an earlier --launcher "
                f"slurm; wait for it with the same option, or cancel it and delete {path}"
            )


def _gpus(study: Study, options: Options) -> Optional[list[str]]:
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    if study.device == "cpu":
        if options.gpus is not None:
            raise UserError("--gpus was given, but the study is for the CPU; add --device cuda")
        return None
    if options.gpus is not None:
        return [str(number) for number in options.gpus]
    import torch

    # what is visible to us may not be the first of the machine, and may have names for numbers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return visible[:count] if visible != [""] else [str(number) for number in range(count)]
