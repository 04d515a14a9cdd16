"""Records of finished runs: their small files, kept where the runs themselves are not.

A study may take longer than one sitting, and its folder may lie on a machine that is given back. A
record is what the report and a search need of a run, in a folder of its name: its state with all
settings, its config, its metrics and on what it ran. Finished runs are recorded, and those of a
search that have lost, as it has its result from them, too.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

from ws_detectron.errors import UserError
from ws_detectron.evaluation.runs import CONFIG, METRICS
from ws_detectron.utils.io import write_text

from .plan import StudyRun
from .results import RECORD
from .run_state import FINISHED, STATE, RunState, has_lost, read_state
from .slurm import JOB

_NOTHING = 2  # rank of what is not recorded

# The state comes last: a folder that has it is whole.
FILES = (METRICS, CONFIG, RECORD, STATE)


def keep_record(run: StudyRun, state: RunState, folder: Path, what: str) -> None:
    """Copies the small files of a run that is to be recorded to `folder`/<name of the run>.

    Args:
        run: of the "study", or of its "search".
        state: where it stands.
        folder: of the records.
        what: which of the two it is.

    Raises:
        UserError: a file cannot be read or written.
    """
    if _rank(state, what) < _NOTHING:
        _copy(run.folder, folder / run.name)


def recorded_runs(
    runs: Sequence[StudyRun], folder: Optional[Path], what: str = "study"
) -> list[StudyRun]:
    """The runs, to be read: one whose record is further than its folder has the record's folder.

    Args:
        runs: all of the study, or of its search.
        folder: of the records; None for none.
        what: "study" or "search", as for `keep_record`.

    Raises:
        ConfigError: a record is of other settings than its run; names them.
    """
    if folder is None:
        return list(runs)
    found = []
    for run in runs:
        source = folder / run.name
        ours, recorded = (_rank(read_state(run, place), what) for place in (None, source))
        found.append(replace(run, folder=source) if recorded < ours else run)
    return found


def exchange_records(runs: Sequence[StudyRun], folder: Path, what: str = "study") -> int:
    """Gives runs what was recorded of them, and records those that are further than that.

    What an unfinished run left in the folder of a run with a record is deleted, but where a job of
    Slurm is queued for the folder or trains in it.

    Args:
        runs: all of the study, or of its search.
        folder: of the records.
        what: "study" or "search", as for `keep_record`.

    Returns:
        How many runs were taken from their records.

    Raises:
        UserError: a file cannot be read or written.
        ConfigError: a record is of other settings than its run; names them.
    """
    restored = 0
    for run in runs:
        source = folder / run.name
        ours, recorded = (_rank(read_state(run, place), what) for place in (None, source))
        if ours < recorded:
            _copy(run.folder, source)
        elif recorded < ours and not (run.folder / JOB).exists():
            shutil.rmtree(run.folder, ignore_errors=True)
            _copy(source, run.folder)
            restored += 1
    return restored


def _rank(state: Optional[RunState], what: str) -> int:
    """0 of a finished run, 1 of one that has lost in a search, else `_NOTHING`."""
    if state is not None and state.state == FINISHED:
        return 0
    return 1 if what == "search" and has_lost(state) else _NOTHING


def _copy(source: Path, target: Path) -> None:
    try:
        for name in FILES:
            if (source / name).is_file():
                write_text(target / name, (source / name).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot copy {source} to {target}: {error.strerror or error}") from error
