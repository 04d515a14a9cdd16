"""A whole study: search, cells, report."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Optional

from ws_detectron.errors import UserError

from .cell_state import has_lost, is_finished, read_state
from .cells import Cell, check_cells, search_cells, study_cells
from .choice import choose
from .local import run_locally, slots, study_lock
from .process import command, drop_checkpoints, shown
from .progress import Progress
from .records import exchange_records, keep_record, recorded_cells
from .report import problems_of, write_report
from .results import StudyResults, read_results
from .slurm import JOB, run_on_slurm
from .spec import Study

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Args:
        train_net: path of tools/train_net.py.
        jobs: how many cells run side by side.
        gpus: numbers of the GPUs to use, one as often as cells may share it; None for all visible
            ones on "cuda", for none on "cpu".
        launcher: "local" or "slurm".
        cluster: submitit's name for the cluster of "slurm".
        arms, batches, seeds: run only these; None for all. The report is of all.
        records: folder in which cells that have ended are recorded, and from which recorded ones
            are taken instead of being run; None for none.
    """

    train_net: Path
    jobs: int = 1
    gpus: Optional[Sequence[int]] = None
    launcher: str = "local"
    cluster: str = "slurm"
    arms: Optional[Collection[str]] = field(default=None)
    batches: Optional[Collection[int]] = field(default=None)
    seeds: Optional[Collection[int]] = field(default=None)
    records: Optional[Path] = None


def run_study(study: Study, options: Options, say: Say) -> StudyResults:
    """Runs what is not finished: the search first, then the cells with what it chose.

    Cells that failed are tried again. A run of a search whose training failed has lost, and is left
    at that, as its choice must not change under cells that are finished; only where all runs of an
    arm have lost, they are tried again. One that was ended from outside has not lost.

    Raises:
        UserError: a cell cannot run on any machine, or the folder is being worked on.
    """
    check_cells([*search_cells(study), *study_cells(study, {})])
    with study_lock(study.output) as lock:
        _run(study, "search", search_cells(study), options, say, lock)
        _run(study, "study", study_cells(study, _choices(study)), options, say, lock)
    return read_study_results(study)


def _run(
    study: Study, what: str, cells: Sequence[Cell], options: Options, say: Say, lock: IO[Any]
) -> None:
    """Runs those of the cells that were asked for and are not finished."""
    keep = None
    if options.records is not None:
        _exchange(what, cells, options.records, say)
        keep = partial(keep_record, folder=options.records, what=what)
    wanted = _selected(study, cells, options)
    if what == "search":
        wanted = _not_lost(wanted)
    if not wanted:
        return
    for cell in wanted:
        if is_finished(cell):  # its process may have been killed before it came to that
            drop_checkpoints(cell)
    say(f"{what}: {len(wanted)} cells in {study.output}")
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
            f"--jobs {len(gpus) // study.processes} uses more of them, for cells side by side"
        )
    progress = Progress(wanted, options.jobs, say, keep=keep)
    run_locally(wanted, options.train_net, places, progress, lock)


def _exchange(what: str, cells: Sequence[Cell], records: Path, say: Say) -> None:
    restored = exchange_records(cells, records, what)
    say(f"{what}: {restored} finished cells taken from {records}")


def _not_lost(cells: Sequence[Cell]) -> list[Cell]:
    """Runs of a search without those that lost, where another of the arm and batch did not."""
    states = {cell.name: read_state(cell) for cell in cells}

    lost = {cell.name for cell in cells if has_lost(states[cell.name])}
    open_ones = {(cell.arm, cell.batch) for cell in cells if cell.name not in lost}
    return [c for c in cells if not (c.name in lost and (c.arm, c.batch) in open_ones)]


def read_study_results(study: Study, records: Optional[Path] = None) -> StudyResults:
    """What is there of a study, finished or not; changes no file.

    Args:
        study: of `read_study`.
        records: folder of records, for cells whose own folders hold less; None for none.

    Raises:
        ConfigError: a folder or record is of other settings than its cell; names them.
    """
    searching = recorded_cells(search_cells(study), records, "search")
    searched = read_results(searching)
    cells = study_cells(study, choose(study, searched))
    return StudyResults(study, read_results(recorded_cells(cells, records)), searched)


def report_study(results: StudyResults, folder: Path, say: Say) -> list[str]:
    """Writes the report and says where; returns what is missing or failed."""
    paths = write_report(results, folder)
    say(f"report: {paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    return problems_of(results)


def commands(study: Study, options: Options) -> list[str]:
    """The command of each cell that would run, finished ones included, for a shell.

    Where a search has not ended, the cells that follow it are shown with the values of the study
    file, and a comment says so.
    """
    lines = []
    searching = search_cells(study)
    choices = _choices(study)
    if searching:
        lines.append("# search")
        lines += _commands(_selected(study, searching, options), options)
        lines.append("# cells")
        unknown = sorted({arm for (arm, _), choice in choices.items() if choice is None})
        if unknown:
            keys = ", ".join(study.search.grid if study.search else ())
            lines.append(f"# {keys} of {', '.join(unknown)}: what the search will find")
            choices = {where: choice or {} for where, choice in choices.items()}
    lines += _commands(_selected(study, study_cells(study, choices), options), options)
    return lines


def _commands(cells: Sequence[Cell], options: Options) -> list[str]:
    return [shown(command(cell, options.train_net)) for cell in cells]


def _choices(study: Study) -> dict:
    return choose(study, read_results(search_cells(study)))


def _selected(study: Study, cells: Sequence[Cell], options: Options) -> list[Cell]:
    """The cells that were asked for; a search is of an arm, whatever batches and seeds."""
    known: dict[str, Collection] = {
        "arms": [arm.name for arm in study.arms],
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
    searching = {cell.name for cell in search_cells(study)}
    return [
        cell
        for cell in cells
        if (options.arms is None or cell.arm in options.arms)
        and (
            cell.name in searching
            or (
                (options.batches is None or cell.batch in options.batches)
                and (options.seeds is None or cell.seed in options.seeds)
            )
        )
    ]


def _check_not_queued(cells: Sequence[Cell]) -> None:
    """A job of Slurm and a process of ours must not train in one folder."""
    for cell in cells:
        path = cell.folder / JOB
        if path.is_file() and not is_finished(cell):
            raise UserError(
                f"{cell.name} is job {path.read_text('utf-8').strip()} of an earlier --launcher "
                f"slurm; wait for it with the same option, or cancel it and delete {path}"
            )


def _gpus(study: Study, options: Options) -> Optional[list[str]]:
    """The GPUs that cells may use, as CUDA_VISIBLE_DEVICES names them."""
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
