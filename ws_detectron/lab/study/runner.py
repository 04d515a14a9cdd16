"""Runs a whole study: search, runs, report."""

import importlib.util
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Optional

from ws_detectron.errors import UserError
from ws_detectron.utils.io import write_text

from .plan import StudyRun, check_runs, search_runs, study_runs
from .records import (
    FINISHED,
    RunResult,
    StudyResults,
    add_records,
    choose,
    read_records,
    read_result,
)
from .study_file import Study, read_study
from .workers import (
    Progress,
    drop_checkpoints,
    environments,
    run_locally,
    run_on_slurm,
    study_lock,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a study is run."""

    jobs: int = 1  # runs that train at a time
    gpus: Optional[Sequence[int]] = None  # each once per run that may use it; None: all visible
    launcher: str = "local"  # or "slurm"
    # Only these are run; None for all. The report shows all.
    variants: Optional[Collection[str]] = None
    batches: Optional[Collection[int]] = None
    seeds: Optional[Collection[int]] = None
    # Folder in which ended runs are recorded, and whose recorded runs are not trained again
    records: Optional[Path] = None


def run_study(study: Study, options: Options, say: Say) -> StudyResults:
    """Trains the runs that are not finished: first the search, then the runs with its choice.

    Runs that failed are tried again. Diverged runs of a search are not: a later success would
    change the choice, with which other runs are already trained.

    Raises:
        UserError: a run cannot work on any machine, or another process works on the study.
    """
    searching, runs = search_runs(study), study_runs(study, {})
    check_runs([*searching, *runs])
    with study_lock(study.output) as lock:
        searched = _train(study, "search", searching, options, say, lock)
        choices = choose(searched)
        if searching:
            runs = study_runs(study, choices)
        results = _train(study, "study", runs, options, say, lock)
    return StudyResults(study, results, searched, choices)


def _train(
    study: Study, what: str, runs: Sequence[StudyRun], options: Options, say: Say, lock: IO[Any]
) -> list[RunResult]:
    """Trains the selected runs that have not ended; returns the results of all runs."""
    records = read_records(options.records)
    results = {run.name: read_result(run, records) for run in runs}

    def keep(*ended: RunResult) -> None:
        """Records runs that have ended, if they are not recorded."""
        results.update({result.run.name: result for result in ended})
        new = {r.run.name: r.record for r in ended if r.has_ended and r.record}
        if options.records is not None:
            changed = {name: new[name] for name in new if new[name] != records.get(name)}
            add_records(options.records, study.title, changed)

    if runs and options.records is not None:
        say(f"{what}: {len(results.keys() & records)} runs taken from {options.records}")
    keep(*results.values())
    chosen = [results[run.name] for run in _selected(study, runs, options)]
    for result in chosen:
        if result.status == FINISHED:  # if its process was killed before it did so
            drop_checkpoints(result.run)
    wanted = [result.run for result in chosen if not result.has_ended]
    if chosen:
        say(f"{what}: {len(chosen)} runs in {study.output}")
        on_slurm = options.launcher == "slurm"
        progress = Progress(chosen, None if on_slurm else options.jobs, say, keep)
        if on_slurm:
            run_on_slurm(wanted, study.slurm, study.output / "submitit", progress)
        else:
            workers = environments(study, options.jobs, options.gpus)
            run_locally(wanted, workers, progress, lock)
    return [*results.values()]


def read_study_results(study: Study, records: Optional[Path] = None) -> StudyResults:
    """Reads the results of a study, finished or not; changes no file.

    Args:
        study: as returned by `read_study`.
        records: folder of records, used for runs whose own folders hold less; None: no records.

    Raises:
        ConfigError: a folder or record has other settings than its run; names them.
    """
    recorded = read_records(records)
    searched = [read_result(run, recorded) for run in search_runs(study)]
    choices = choose(searched)
    runs = [read_result(run, recorded) for run in study_runs(study, choices)]
    return StudyResults(study, runs, searched, choices)


def check_packages(page: bool = False) -> None:
    """Checks that a report can be written, before anything is trained.

    Args:
        page: whether it is wanted as HTML, too.

    Raises:
        UserError: a package is missing.
    """
    needed = ["matplotlib", "pandas", "scipy", *(["markdown"] if page else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the report of a study needs {', '.join(missing)}: pip install 'ws_detectron[lab]'"
        )


def report_study(results: StudyResults, folder: Path, say: Say, *, page: bool = False) -> list[str]:
    """Writes report.md and two figures; with `page`, also report.html, with the figures inside.

    Says the means of each variant at each batch.

    Returns:
        What is missing or failed.

    Raises:
        UserError: the folder cannot be written to.
    """
    # these need the packages of the extra `lab`
    from ws_detectron.evaluation.figure_style import write_figure

    from .figures import draw_scores, draw_study_curves, page_figure
    from .report import as_page, first_figure, mean_table, problems_of, report_text, titles_of

    figures = {first_figure(results.study): draw_scores, "learning_curves.png": draw_study_curves}
    for name, draw in figures.items():
        write_figure(draw(results), folder / name)
    texts = {"report.md": report_text(results)}
    if page:
        pages = {name: page_figure(name[:-4], draw, results) for name, draw in figures.items()}
        texts["report.html"] = as_page(results.study.title, texts["report.md"], pages)
    for name, text in texts.items():
        write_text(folder / name, text)
    for score in titles_of(results.study, results.runs):
        say(mean_table(results, score))
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
    from ws_detectron.evaluation.figure_style import write_figure

    from .figures import draw_batches

    if records and len(records) != len(files):
        raise UserError(f"{len(files)} studies need as many --records; got {len(records)}")
    folders: Sequence[Optional[Path]] = [*records] or [None] * len(files)
    results = [read_study_results(read_study(f), r) for f, r in zip(files, folders)]
    known = sorted({batch for result in results for batch in result.study.batches})
    if batches is not None and not set(batches) <= set(known):
        raise UserError(f"--batches has {[*batches]}; the studies have {known}")
    write_figure(draw_batches(results, batches), figure)


def commands(study: Study, options: Options) -> list[str]:
    """The shell command of each selected run, finished ones included.

    A comment names variants of which the search has not found anything yet.
    """
    results = read_study_results(study, options.records)
    unknown = sorted({variant for (variant, _), choice in results.choices.items() if not choice})
    lines = []
    for title, some in (("# search", results.search), ("# runs", results.runs)):
        runs = _selected(study, [result.run for result in some], options)
        lines += [*([title] if study.search else []), *(shlex.join(run.command) for run in runs)]
    return lines + [f"# {name}: the search has not found its values yet" for name in unknown]


def _selected(study: Study, runs: Sequence[StudyRun], options: Options) -> list[StudyRun]:
    """The selected runs; runs of a search are selected by their variant alone."""
    wanted: dict[str, Collection] = {}
    for name in ("variants", "batches", "seeds"):
        known, asked = getattr(study, name), getattr(options, name)
        wanted[name] = known if asked is None else asked
        unknown = sorted(set(wanted[name]) - set(known))
        if unknown:
            raise UserError(
                f"--{name} has {', '.join(map(str, unknown))}; the study has "
                f"{', '.join(map(str, known))}"
            )
    return [
        run
        for run in runs
        if run.variant in wanted["variants"]
        and (run.searching or (run.batch in wanted["batches"] and run.seed in wanted["seeds"]))
    ]
