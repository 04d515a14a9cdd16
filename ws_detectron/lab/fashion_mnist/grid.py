"""The grid of the report: arms x batch sizes x seeds, one training after another."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import UserError
from ws_detectron.utils.locking import AlreadyLocked

from .accuracy_results import FinishedRun
from .epoch_progress import Progress
from .files import find_fashion_mnist
from .run_files import RESULT, check_same_settings
from .training import train
from .training_settings import TrainingSettings, first_difference

logger = logging.getLogger(__name__)

REPORT_BATCHES = (2, 32, 128)
GRID_SEEDS = {2: (0,)}
"""Batch size -> seeds. An epoch at batch 2 takes several times as long as at the others."""
OTHER_SEEDS = (0, 1, 2)


def grid(
    arms: Iterable[str],
    batch_sizes: Sequence[int] = REPORT_BATCHES,
    seeds: Optional[Sequence[int]] = None,
    **common: Any,
) -> list[TrainingSettings]:
    """The settings of every training, the quickest batch sizes first.

    Args:
        arms: of `ARMS`.
        batch_sizes: images in a step.
        seeds: of every arm and batch size; None: `GRID_SEEDS`.
        common: other fields of `TrainingSettings`.

    Raises:
        UserError: a value is not allowed.
    """
    arms = list(arms)
    return [
        TrainingSettings(arm, batch_size, seed=seed, **common)
        for batch_size in sorted(batch_sizes, reverse=True)
        for seed in (seeds if seeds else GRID_SEEDS.get(batch_size, OTHER_SEEDS))
        for arm in arms
    ]


def run_grid(
    cells: Sequence[TrainingSettings],
    folder: Path,
    *,
    say: Callable[[str], None],
    progress: Callable[[str], Progress],
    data_dir: Optional[Path] = None,
    records: Sequence[FinishedRun] = (),
    command: str = "",
) -> list[str]:
    """Trains what is not finished, each in `folder`/name, and goes on with what was interrupted.

    Args:
        cells: in the order in which they run.
        folder: of all runs.
        say: takes a line.
        progress: makes what shows a training, from its name.
        data_dir: see `train`.
        records: of runs that are finished though their folders may be gone.
        command: what the user called, for the records.

    Returns:
        What failed, a line each; a failing training does not keep the others from running. One
        that another process is at is left to it, so that several can share a grid; in the end it
        is tried once more, as that process may have been stopped.

    Raises:
        UserError: the data are missing, or a run was recorded or begun with other settings.
    """
    recorded = {record.name: record.settings for record in records}
    for settings in cells:
        asked = settings.as_dict()
        difference = first_difference(asked, recorded.get(settings.name, asked))
        if difference:
            key, wanted, found = difference
            raise UserError(
                f"{settings.name} is recorded with {key} {found!r}, asked for is {wanted!r}; "
                "ask for the same (--arms, --batch-sizes and --seeds choose a part of the grid), "
                "or choose another --report"
            )
        check_same_settings(folder / settings.name, settings)
    for split in ("train", "test"):  # without them, every training would fail
        find_fashion_mnist(split, root=data_dir)
    problems: list[str] = []

    def is_left(head: str, settings: TrainingSettings) -> bool:
        """Trains, if need be; true where another process is at it."""
        finished = settings.name in recorded or (folder / settings.name / RESULT).exists()
        say(f"{head}: " + ("finished already" if finished else f"LR {settings.lr:g}"))
        if settings.name in recorded:
            return False
        try:
            result = train(
                settings,
                folder / settings.name,
                data_dir=data_dir,
                resume=True,
                progress=progress(settings.name),
                command=command,
            )
        except AlreadyLocked:
            say(f"{head}: another process is at it")
            return True
        except UserError as error:
            problems.append(f"{settings.name}: {error}")
            say(f"{head} FAILED: {error}")
        except RuntimeError as error:  # out of memory, for one
            logger.exception("%s failed", settings.name)
            problems.append(f"{settings.name}: {error}")
            say(f"{head} FAILED: {error}")
        else:
            if not finished:
                say(f"{head}: test accuracy {result['test_accuracy']:.2%}")
        return False

    jobs = [(f"[{n}/{len(cells)}] {cell.name}", cell) for n, cell in enumerate(cells, start=1)]
    for _ in range(2):
        jobs = [job for job in jobs if is_left(*job)]
    if jobs:
        say(f"left to other processes: {', '.join(settings.name for _, settings in jobs)}")
    return problems
