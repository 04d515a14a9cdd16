"""The files of one training, each written atomically.

settings.json     what was asked for
environment.json  machine and versions of each start, the first and those that resumed it
history.json      one entry for each epoch
checkpoint.pt     all that the next epoch depends on; removed when the training has ended
weights.pth       of the epoch with the best validation accuracy
test_logits.npy   (images, 10) float32, of these weights
result.json       written last: where it is, the training has ended
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np
import torch

from ws_detectron.checkpoint.reading import read_weight_file
from ws_detectron.errors import UserError
from ws_detectron.utils.io import atomic_write, write_json
from ws_detectron.utils.locking import locked

from .training_settings import TrainingSettings, first_difference

SETTINGS, ENVIRONMENT = "settings.json", "environment.json"
HISTORY, RESULT = "history.json", "result.json"
CHECKPOINT, WEIGHTS, TEST_LOGITS = "checkpoint.pt", "weights.pth", "test_logits.npy"
_LOCK = ".lock"


def run_lock(folder: Path) -> AbstractContextManager[IO[Any]]:
    """Keeps two processes from training in one folder, for as long as it is entered.

    Raises:
        AlreadyLocked: another process does.
    """
    return locked(folder / _LOCK, f"another process is training in {folder}")


def read_json(path: Path, remedy: str = "delete its folder to train anew") -> Optional[Any]:
    """None where there is no such file.

    Args:
        path: of the file.
        remedy: what the user can do about a damaged one.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; {remedy}") from error


def check_same_settings(folder: Path, settings: TrainingSettings) -> bool:
    """Whether `folder` holds a run, which must have the same settings.

    Raises:
        UserError: its settings differ; names one of them.
    """
    found = read_json(folder / SETTINGS)
    if found is None:
        return False
    difference = first_difference(settings.as_dict(), found)
    if difference:
        name, wanted, there = difference
        raise UserError(
            f"{folder} holds a training with {name} {there!r}, asked for is {wanted!r}; choose "
            "another --output-dir, or delete the folder"
        )
    return True


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    with atomic_write(folder / CHECKPOINT, "wb") as file:
        torch.save(content, file)


def load_checkpoint(folder: Path) -> Optional[dict[str, Any]]:
    """None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / CHECKPOINT
    return read_weight_file(path) if path.exists() else None


def save_outcome(
    folder: Path, weights: dict[str, Any], logits: np.ndarray, result: dict[str, Any]
) -> None:
    """Ends a run: weights, logits, then the result; the checkpoint goes."""
    with atomic_write(folder / WEIGHTS, "wb") as file:
        torch.save(weights, file)
    with atomic_write(folder / TEST_LOGITS, "wb") as file:
        np.save(file, logits)
    write_json(folder / RESULT, result, allow_nan=False)
    clean_up(folder)


def delete_run(folder: Path) -> None:
    """Deletes the files of a run, if there is one; the folder and other files in it stay."""
    (folder / RESULT).unlink(missing_ok=True)  # first, as it says that the others are complete
    for name in (WEIGHTS, TEST_LOGITS, CHECKPOINT, HISTORY, ENVIRONMENT, SETTINGS):
        (folder / name).unlink(missing_ok=True)
    clean_up(folder)


def clean_up(folder: Path) -> None:
    """Removes what a finished run does not need, and what killed processes left half-written."""
    for name in (CHECKPOINT, SETTINGS, ENVIRONMENT, HISTORY, RESULT, WEIGHTS, TEST_LOGITS):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
