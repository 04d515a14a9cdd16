"""Runs a whole study: search, runs, report."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Optional

from ws_detectron.errors import UserError
from ws_detectron.evaluation.curves import write_figure

from .choice import choose
from .figures import draw_batches
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
)
from .report import problems_of, write_report
from .slurm import JOB, run_on_slurm
from .spec import Study, read_study

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Args:
        train_net: path of tools/train_net.py.
        jobs: number of runs that train at a time.
        gpus: numbers of GPUs, each once per run that may use it; None: all visible ones on "cuda",
            none on "cpu".
        launcher: "local" or "slurm".
        cluster: submitit's name of the cluster for "slurm".
        variants, batches, seeds: run only these; None for all. The report shows all.
        records: folder in which runs that have ended are recorded, and whose recorded runs are not
            trained again; None: no records.
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
    """Trains the runs that are not finished: first the search, then the runs with its choice.

    Runs that failed are tried again. Diverged runs of a search are not, unless all of a variant
    diverged: a later success would change the choice, with which other runs are already trained.

    Raises:
        UserError: a run cannot work on any machine, or another process works on the study.
    """
    check_runs([*search_runs(study), *study_runs(study, {})])
    with study_lock(study.output) as lock:
        _train(study, "search", search_runs(study), options, say, lock)
        choices = _choices(study, read_records(options.records))
        _train(study, "study", study_runs(study, choices), options, say, lock)
    return read_study_results(study, options.records)


def _train(
    study: Study, what: str, runs: Sequence[StudyRun], options: Options, say: Say, lock: IO[Any]
) -> None:
    """Trains the selected runs that are not finished."""
    results = _recorded(study, what, runs, options.records, say)
    selected = {run.name for run in _selected(study, runs, options)}
    results = [result for result in results if result.run.name in selected]
    if what == "search":
        results = _not_diverged(results)
    if not results:
        return
    for result in results:
        if is_finished(result.run):  # if its process was killed before it did so
            drop_checkpoints(result.run)
    wanted = [r.run for r in results if r.status != FINISHED or is_finished(r.run)]
    say(f"{what}: {len(results)} runs in {study.output}")
    progress = Progress(
        results,
        options.jobs if options.launcher == "local" else None,
        say,
        keep=partial(_record, study, options.records),
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
            f"--jobs {len(gpus) // study.processes} trains more runs at a time"
        )
    run_locally(wanted, options.train_net, workers, progress, lock)


def _recorded(
    study: Study, what: str, runs: Sequence[StudyRun], folder: Optional[Path], say: Say
) -> list[RunResult]:
    """Results of all runs; runs that have ended are recorded if they were not."""
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


def _record(study: Study, folder: Optional[Path], run: StudyRun, state: RunState) -> None:
    """Records a run that has ended."""
    if folder is not None and is_recorded(run, state):
        add_records(folder, study.title, {run.name: folder_record(run, state)})


def _not_diverged(results: Sequence[RunResult]) -> list[RunResult]:
    """Skips diverged runs of a search, unless all of their variant and batch diverged."""
    others = {(r.run.variant, r.run.batch) for r in results if r.status != DIVERGED}
    return [
        r for r in results if r.status != DIVERGED or (r.run.variant, r.run.batch) not in others
    ]


def read_study_results(study: Study, records: Optional[Path] = None) -> StudyResults:
    """Reads the results of a study, finished or not; changes no file.

    Args:
        study: as returned by `read_study`.
        records: folder of records, used for runs whose own folders hold less; None: no records.

    Raises:
        ConfigError: a folder or record has other settings than its run; names them.
    """
    recorded = read_records(records)
    searched = read_results(search_runs(study), recorded)
    runs = study_runs(study, choose(study, searched))
    return StudyResults(study, read_results(runs, recorded), searched)


def report_study(results: StudyResults, folder: Path, say: Say, *, page: bool = False) -> list[str]:
    """Writes the report and prints its path; returns what is missing or failed."""
    paths = write_report(results, folder, page=page)
    say(f"report: {paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    return problems_of(results)


def draw_studies(
    files: Sequence[str], records: Sequence[Path], batches: Optional[Collection[int]], figure: Path
) -> None:
    """Draws box AP of each variant of several studies, see `draw_batches`.

    Args:
        files: study files.
        records: a folder of records for each study, or empty.
        batches: batches to draw; None for all.
        figure: a `.png` or `.svg`.

    Raises:
        UserError: the numbers of studies and folders differ, there is no such batch, or the figure
            cannot be written.
    """
    if records and len(records) != len(files):
        raise UserError(f"{len(files)} studies need as many --records; got {len(records)}")
    folders: Sequence[Optional[Path]] = [*records] or [None] * len(files)
    results = [read_study_results(read_study(f), r) for f, r in zip(files, folders)]
    known = sorted({batch for result in results for batch in result.study.batches})
    if batches is not None and not set(batches) <= set(known):
        raise UserError(f"--batches has {[*batches]}; the studies have {known}")
    try:
        write_figure(draw_batches(results, batches), figure)
    except OSError as error:
        raise UserError(f"cannot write {figure}: {error.strerror}") from error


def commands(study: Study, options: Options) -> list[str]:
    """The shell command of each selected run, finished ones included.

    If the search has not ended, the other runs are shown with the values of the study file, and a
    comment says so.
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
            lines.append(f"# {keys} of {', '.join(unknown)}: not yet chosen by the search")
            choices = {where: choice or {} for where, choice in choices.items()}
    lines += _commands(_selected(study, study_runs(study, choices), options), options)
    return lines


def _commands(runs: Sequence[StudyRun], options: Options) -> list[str]:
    return [shown(command(run, options.train_net)) for run in runs]


def _choices(study: Study, records: Mapping[str, Record]) -> dict:
    return choose(study, read_results(search_runs(study), records))


def _selected(study: Study, runs: Sequence[StudyRun], options: Options) -> list[StudyRun]:
    """The selected runs; runs of a search are selected by their variant alone."""
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
    """Refuses to train locally a run that is a queued Slurm job."""
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

    # the visible GPUs may not be the first of the machine, and may be given by UUID
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return visible[:count] if visible != [""] else [str(number) for number in range(count)]
