"""A whole study: search, runs, report."""

import os
from collections.abc import Callable, Collection, Sequence
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
from .records import exchange_records, keep_record, recorded_runs
from .report import problems_of, write_report
from .results import StudyResults, read_results
from .run_state import has_lost, is_finished, read_state
from .slurm import JOB, run_on_slurm
from .spec import Study

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Args:
        train_net: path of tools/train_net.py.
        jobs: how many runs run side by side.
        gpus: numbers of the GPUs to use, one as often as runs may share it; None for all visible
            ones on "cuda", for none on "cpu".
        launcher: "local" or "slurm".
        cluster: submitit's name for the cluster of "slurm".
        variants, batches, seeds: run only these; None for all. The report is of all.
        records: folder in which runs that have ended are recorded, and from which recorded ones
            are taken instead of being run; None for none.
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
    """Runs what is not finished: the search first, then the runs with what it chose.

    Runs that failed are tried again. A run of a search whose training failed has lost, and is left
    at that, as its choice must not change under runs that are finished; only where all runs of an
    variant have lost, they are tried again. One that was ended from outside has not lost.

    Raises:
        UserError: a run cannot run on any machine, or the folder is being worked on.
    """
    check_runs([*search_runs(study), *study_runs(study, {})])
    with study_lock(study.output) as lock:
        _run(study, "search", search_runs(study), options, say, lock)
        _run(study, "study", study_runs(study, _choices(study)), options, say, lock)
    return read_study_results(study)


def _run(
    study: Study, what: str, runs: Sequence[StudyRun], options: Options, say: Say, lock: IO[Any]
) -> None:
    """Runs those of the runs that were asked for and are not finished."""
    keep = None
    if options.records is not None:
        _exchange(what, runs, options.records, say)
        keep = partial(keep_record, folder=options.records, what=what)
    wanted = _selected(study, runs, options)
    if what == "search":
        wanted = _not_lost(wanted)
    if not wanted:
        return
    for run in wanted:
        if is_finished(run):  # its process may have been killed before it came to that
            drop_checkpoints(run)
    say(f"{what}: {len(wanted)} runs in {study.output}")
    if options.launcher == "slurm":
        run_on_slurm(
            wanted,
            options.train_net,
            study.slurm,
            study.output / "submitit",
            Progress(wanted, None, say, keep=keep),
            cluster=options.cluster,
        )
        return
    _check_not_queued(wanted)
    gpus = _gpus(study, options)
    places = slots(options.jobs, gpus, study.processes)
    if gpus is not None and options.jobs < len(gpus) // study.processes:
        what = "GPUs" if len(set(gpus)) == len(gpus) else "places on GPUs"
        say(
            f"{options.jobs * study.processes} of {len(gpus)} {what} are used; "
            f"--jobs {len(gpus) // study.processes} uses more of them, for runs side by side"
        )
    progress = Progress(wanted, options.jobs, say, keep=keep)
    run_locally(wanted, options.train_net, places, progress, lock)


def _exchange(what: str, runs: Sequence[StudyRun], records: Path, say: Say) -> None:
    restored = exchange_records(runs, records, what)
    say(f"{what}: {restored} finished runs taken from {records}")


def _not_lost(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Runs of a search without those that lost, where another of the variant and batch did not."""
    states = {run.name: read_state(run) for run in runs}

    lost = {run.name for run in runs if has_lost(states[run.name])}
    open_ones = {(run.variant, run.batch) for run in runs if run.name not in lost}
    return [c for c in runs if not (c.name in lost and (c.variant, c.batch) in open_ones)]


def read_study_results(study: Study, records: Optional[Path] = None) -> StudyResults:
    """What is there of a study, finished or not; changes no file.

    Args:
        study: of `read_study`.
        records: folder of records, for runs whose own folders hold less; None for none.

    Raises:
        ConfigError: a folder or record is of other settings than its run; names them.
    """
    searching = recorded_runs(search_runs(study), records, "search")
    searched = read_results(searching)
    runs = study_runs(study, choose(study, searched))
    return StudyResults(study, read_results(recorded_runs(runs, records)), searched)


def report_study(results: StudyResults, folder: Path, say: Say) -> list[str]:
    """Writes the report and says where; returns what is missing or failed."""
    paths = write_report(results, folder)
    say(f"report: {paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    return problems_of(results)


def commands(study: Study, options: Options) -> list[str]:
    """The command of each run that would run, finished ones included, for a shell.

    Where a search has not ended, the runs that follow it are shown with the values of the study
    file, and a comment says so.
    """
    lines = []
    searching = search_runs(study)
    choices = _choices(study)
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


def _choices(study: Study) -> dict:
    return choose(study, read_results(search_runs(study)))


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
    searching = {run.name for run in search_runs(study)}
    return [
        run
        for run in runs
        if (options.variants is None or run.variant in options.variants)
        and (
            run.name in searching
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
