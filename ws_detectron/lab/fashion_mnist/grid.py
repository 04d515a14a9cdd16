"""The grid of the report: variants x batch sizes x seeds, one training after another."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import UserError
from ws_detectron.utils.locking import AlreadyLocked

from .accuracy_results import FinishedRun
from .files import find_fashion_mnist
from .loop import Progress
from .training import RESULT, check_same_settings, train
from .training_settings import TrainingSettings, first_difference

logger = logging.getLogger(__name__)

REPORT_BATCHES = (2, 32, 128)
GRID_SEEDS = {2: (0,)}
"""Batch size -> seeds. An epoch at batch 2 takes several times as long as at the others."""
OTHER_SEEDS = (0, 1, 2)


def grid(
    variants: Iterable[str],
    batch_sizes: Sequence[int] = REPORT_BATCHES,
    seeds: Optional[Sequence[int]] = None,
    **common: Any,
) -> list[TrainingSettings]:
    """The settings of every run, the fastest batch sizes first.

    Args:
        variants: keys of `VARIANTS`.
        batch_sizes: images per step.
        seeds: for every variant and batch size; None: `GRID_SEEDS`.
        common: other fields of `TrainingSettings`.

    Raises:
        UserError: a value is not allowed.
    """
    variants = list(variants)
    return [
        TrainingSettings(variant, batch_size, seed=seed, **common)
        for batch_size in sorted(batch_sizes, reverse=True)
        for seed in (seeds if seeds else GRID_SEEDS.get(batch_size, OTHER_SEEDS))
        for variant in variants
    ]


def run_grid(
    runs: Sequence[TrainingSettings],
    folder: Path,
    *,
    echo: Callable[[str], None],
    progress: Callable[[str], Progress],
    data_dir: Optional[Path] = None,
    records: Sequence[FinishedRun] = (),
    command: str = "",
) -> list[str]:
    """Trains all runs that are not finished, each in `folder`/name; resumes interrupted ones.

    A failed run does not stop the others. A run that another process trains is skipped, so that
    several processes can share a grid; at the end it is tried once more, as that process may have
    been killed.

    Args:
        runs: in the order of training.
        folder: for the folders of all runs.
        echo: called with each line of output.
        progress: makes what shows a training, given its name.
        data_dir: see `train`.
        records: finished runs, whose folders may not exist.
        command: the user's command line, for the records.

    Returns:
        The failures, one line each.

    Raises:
        UserError: the data are missing, or a run was recorded or started with other settings.
    """
    recorded = {record.name: record.settings for record in records}
    for settings in runs:
        wanted = settings.as_dict()
        difference = first_difference(wanted, recorded.get(settings.name, wanted))
        if difference:
            key, requested, stored = difference
            raise UserError(
                f"{settings.name} is recorded with {key} {stored!r}, requested is {requested!r}; "
                "request the same (--variants, --batch-sizes and --seeds select a part of the "
                "grid), or choose another --report"
            )
        check_same_settings(folder / settings.name, settings)
    for split in ("train", "test"):  # without them, every training would fail
        find_fashion_mnist(split, root=data_dir)
    failures: list[str] = []

    def train_one(head: str, settings: TrainingSettings) -> bool:
        """Trains, unless the run is finished; returns False if another process trains it."""
        finished = settings.name in recorded or (folder / settings.name / RESULT).exists()
        echo(f"{head}: " + ("already finished" if finished else f"LR {settings.lr:g}"))
        if settings.name in recorded:
            return True
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
            echo(f"{head}: another process is training it")
            return False
        except (UserError, RuntimeError) as error:  # such as out of memory
            if not isinstance(error, UserError):
                logger.exception("%s failed", settings.name)
            failures.append(f"{settings.name}: {error}")
            echo(f"{head} FAILED: {error}")
        else:
            if not finished:
                echo(f"{head}: test accuracy {result['test_accuracy']:.2%}")
        return True

    left = [(f"[{n}/{len(runs)}] {settings.name}", settings) for n, settings in enumerate(runs, 1)]
    for _ in range(2):
        left = [job for job in left if not train_one(*job)]
    if left:
        echo(f"left to other processes: {', '.join(settings.name for _, settings in left)}")
    return failures
