"""One training, from its first epoch or from its checkpoint, to its test accuracy.

Its folder holds these files, each written atomically:

settings.json     the settings it was started with
environment.json  machine and versions at its start and at each resume
history.json      one entry per epoch
checkpoint.pt     everything the next epoch depends on; deleted when the training is finished
weights.pth       of the epoch with the best validation accuracy
test_logits.npy   (images, 10) float32, computed with these weights
result.json       written last: the training is finished if it exists
"""

import json
import logging
import time
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import IO, Any, Optional

import numpy as np
import torch
from torch import nn

from ws_detectron.checkpoint.reading import read_weight_file
from ws_detectron.errors import UserError
from ws_detectron.utils.environment import environment, utc_now
from ws_detectron.utils.io import atomic_write, write_json
from ws_detectron.utils.locking import locked

from .loop import (
    Progress,
    Schedule,
    build_optimizer,
    compile_model,
    metrics,
    predict,
    train_epoch,
)
from .model import build_classifier
from .training_data import TrainingData, check_test_data, load_test_data, load_training_data
from .training_settings import RECIPE, TrainingSettings, first_difference, with_current_names

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "ws_detectron")
SETTINGS, ENVIRONMENT = "settings.json", "environment.json"
HISTORY, RESULT = "history.json", "result.json"
CHECKPOINT, WEIGHTS, TEST_LOGITS = "checkpoint.pt", "weights.pth", "test_logits.npy"
_FILES = (RESULT, WEIGHTS, TEST_LOGITS, CHECKPOINT, HISTORY, ENVIRONMENT, SETTINGS)
"""In the order in which they are deleted: the result first, as it says that the others exist."""


def train(
    settings: TrainingSettings,
    folder: Path,
    *,
    data_dir: Optional[Path] = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
    command: str = "",
) -> dict[str, Any]:
    """Trains, chooses the epoch with the best validation accuracy, and tests it once.

    All random numbers come from torch's global generators, whose states are saved after each epoch
    together with weights and momentum. So a run that was killed and resumed ends with the same
    metrics as an uninterrupted one: bit by bit on a CPU with the same number of threads.

    Args:
        settings: what to train.
        folder: for the files of the run.
        data_dir: see `root` of `find_fashion_mnist`.
        resume: resume the run in `folder`, if any; a finished run is not trained again.
        overwrite: delete the run in `folder`, if any, and start anew.
        progress: receives the progress.
        command: the user's command line, for the record.

    Returns:
        The content of result.json.

    Raises:
        UserError: the data are missing or damaged, the device does not exist, `resume` and
            `overwrite` are both set, `folder` holds a run and neither is set, the run to resume
            has other settings, or another process trains there.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; allowed here: cpu")
    if resume and overwrite:
        raise UserError("--overwrite and --resume exclude each other; choose one")
    with run_lock(folder):
        if overwrite:
            _delete_run(folder)
        if not resume and (folder / SETTINGS).exists():
            raise UserError(
                f"{folder} holds a training; resume it with --resume, delete it with --overwrite, "
                "or choose another --output"
            )
        if check_same_settings(folder, settings) and (folder / RESULT).exists():
            finished: dict[str, Any] = read_json(folder / RESULT) or {}
            _clean_up(folder)
            return finished
        data = load_training_data(
            data_dir, settings.seed, settings.images, settings.held_out, settings.device
        )
        check_test_data(data_dir)
        write_json(folder / SETTINGS, settings.as_dict(), allow_nan=False)
        starts = [*(read_json(folder / ENVIRONMENT) or []), _environment()]
        write_json(folder / ENVIRONMENT, starts)
        run = _Run(settings, data)
        checkpoint = folder / CHECKPOINT
        if checkpoint.exists():
            run.load_state_dict(read_weight_file(checkpoint), str(checkpoint))
        progress = progress or Progress()
        while len(run.history) < settings.epochs:
            record = run.train_epoch(progress)
            with atomic_write(checkpoint, "wb") as file:
                torch.save(run.state_dict(), file)
            write_json(folder / HISTORY, run.history, allow_nan=False)
            progress.end_epoch(record)
        write_json(folder / HISTORY, run.history, allow_nan=False)
        return _finish(run, folder, data_dir, command, starts)


class _Run:
    """Model, optimizer, history, and the best weights so far."""

    def __init__(self, settings: TrainingSettings, data: TrainingData) -> None:
        self.settings, self.data = settings, data
        torch.manual_seed(settings.seed)
        self.model: nn.Module = build_classifier(
            settings.variant, groups=settings.groups, order=settings.order
        ).to(settings.device)
        assert settings.lr is not None
        self.optimizer = build_optimizer(self.model, settings.lr)
        self.steps_per_epoch = -(-settings.images // settings.batch_size)
        steps = self.steps_per_epoch * settings.epochs
        self.schedule = Schedule(settings.schedule, settings.lr, steps)
        self.compiled = compile_model(self.model, settings.device) if settings.compile else None
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self.best_state: dict[str, torch.Tensor] = {}

    def train_epoch(self, progress: Progress) -> dict[str, Any]:
        """Trains and validates the next epoch; returns its entry in the history."""
        settings, done = self.settings, len(self.history)
        progress.begin_epoch(done + 1, settings.epochs, settings.images)
        start = time.perf_counter()
        trained = train_epoch(
            self.model,
            self.optimizer,
            self.schedule,
            self.data.train,
            settings.batch_size,
            done * self.steps_per_epoch,
            progress=progress,
            amp=settings.amp,
            compiled=self.compiled,
        )
        middle = time.perf_counter()
        held_out = self.data.validation
        validated = metrics(predict(self.model, held_out, settings.amp), held_out.labels)
        record = {
            "epoch": done + 1,
            "images": settings.images,
            "lr": self.schedule.at((done + 1) * self.steps_per_epoch - 1),
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "validation_loss": validated.loss,
            "validation_accuracy": validated.accuracy,
            "seconds": middle - start,
            "validation_seconds": time.perf_counter() - middle,
        }
        best = self.history[self.best_epoch - 1]["validation_accuracy"] if self.best_epoch else -1.0
        self.history.append(record)
        if validated.accuracy > best:  # the first of equal epochs
            self.best_epoch = done + 1
            self.best_state = {
                name: value.detach().to("cpu", copy=True)
                for name, value in self.model.state_dict().items()
            }
        return record

    def state_dict(self) -> dict[str, Any]:
        state = {
            "settings": self.settings.as_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "random_state": torch.get_rng_state(),
            "threads": torch.get_num_threads(),
        }
        if self.settings.device == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = state["history"]
            self.best_epoch, self.best_state = state["best_epoch"], state["best_state"]
            torch.set_rng_state(state["random_state"])
            if "cuda_random_state" in state:
                torch.cuda.set_rng_state(state["cuda_random_state"])
            threads = state["threads"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{source} is not a checkpoint of this training ({error}); delete its folder to "
                "train anew"
            ) from error
        if self.settings.device == "cpu" and threads != torch.get_num_threads():
            logger.warning(
                "%s was made with %d threads and is resumed with %d: the last digits will differ "
                "from those of an uninterrupted training (OMP_NUM_THREADS sets the number)",
                source,
                threads,
                torch.get_num_threads(),
            )


def _environment() -> dict[str, Any]:
    return {**environment(PACKAGES), "threads": torch.get_num_threads()}


def _finish(
    run: _Run,
    folder: Path,
    data_dir: Optional[Path],
    command: str,
    starts: list[dict[str, Any]],
) -> dict[str, Any]:
    """Tests the best weights and writes the outcome; nothing else evaluates the test images."""
    settings, data = run.settings, run.data
    run.model.load_state_dict(run.best_state)
    test = load_test_data(data_dir, settings.held_out, data.mean, data.std, settings.device)
    logits = predict(run.model, test, settings.amp)
    tested = metrics(logits, test.labels)
    result = {
        "settings": settings.as_dict(),
        "recipe": RECIPE,
        "command": command,
        "best_epoch": run.best_epoch,
        "validation_accuracy": run.history[run.best_epoch - 1]["validation_accuracy"],
        "test_loss": tested.loss,
        "test_accuracy": tested.accuracy,
        "test_images": len(test),
        "seconds_per_epoch": median(record["seconds"] for record in run.history),
        "pixel_mean": data.mean,
        "pixel_std": data.std,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "threads": torch.get_num_threads(),
        "environment": starts[0],
        "resumed": starts[1:],
        "finished": utc_now(),
    }
    with atomic_write(folder / WEIGHTS, "wb") as file:
        torch.save(run.best_state, file)
    with atomic_write(folder / TEST_LOGITS, "wb") as file:
        np.save(file, logits.cpu().numpy())
    write_json(folder / RESULT, result, allow_nan=False)
    _clean_up(folder)
    return result


def run_lock(folder: Path) -> AbstractContextManager[IO[Any]]:
    """A lock that only one process at a time can hold, so that only one trains in `folder`.

    Raises:
        AlreadyLocked: another process holds it.
    """
    return locked(folder / ".lock", f"another process is training in {folder}")


def read_json(path: Path, remedy: str = "delete its folder to train anew") -> Optional[Any]:
    """The content of a JSON file, None if there is no file.

    Args:
        path: of the file.
        remedy: ends the message about a damaged file.

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
    """Whether `folder` holds a run; if so, it must have the same settings.

    Raises:
        UserError: its settings differ; names one of them.
    """
    found = read_json(folder / SETTINGS)
    if found is None:
        return False
    difference = first_difference(settings.as_dict(), with_current_names(found))
    if difference:
        name, requested, stored = difference
        raise UserError(
            f"{folder} holds a training with {name} {stored!r}, requested is {requested!r}; choose "
            "another --output, or delete the folder"
        )
    return True


def _delete_run(folder: Path) -> None:
    """Deletes the files of a run, if any; the folder and other files in it stay."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    _clean_up(folder)


def _clean_up(folder: Path) -> None:
    """Deletes what a finished run does not need, and partial files of killed processes."""
    for name in _FILES:
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
