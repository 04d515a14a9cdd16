"""One training from its first epoch, or from where it stopped, to its test accuracy."""

import logging
import time
from pathlib import Path
from statistics import median
from typing import Any, Optional

import torch
from torch import nn

from ws_detectron.errors import UserError
from ws_detectron.utils.environment import environment, utc_now
from ws_detectron.utils.io import write_json

from .epoch_progress import Progress
from .loop import compile_model, metrics, predict, train_epoch
from .model import build_classifier
from .recipe import RECIPE, Schedule, build_optimizer
from .run_files import (
    CHECKPOINT,
    ENVIRONMENT,
    HISTORY,
    RESULT,
    SETTINGS,
    check_same_settings,
    clean_up,
    delete_run,
    load_checkpoint,
    read_json,
    run_lock,
    save_checkpoint,
    save_outcome,
)
from .training_data import TrainingData, check_test_data, load_test_data, load_training_data
from .training_settings import TrainingSettings

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "ws_detectron")


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
    """Trains, chooses the epoch with the best validation accuracy, and tests that one once.

    Everything random comes from torch's global generators, whose states are saved after each epoch
    together with weights and momentum. So a run that was killed and resumed ends with the same
    figures as one that was not; on a CPU with the same number of threads, with the same bits.

    Args:
        folder: of the run's files, see `run_files`.
        data_dir: `root` of `find_fashion_mnist`.
        resume: go on with the run in `folder`, if there is one; of a run that has ended, its
            result is returned.
        overwrite: delete the run in `folder`, if there is one, and begin anew.
        command: what the user called, for the record.

    Returns:
        The content of result.json.

    Raises:
        UserError: the data are not there or wrong, `folder` holds a run and neither `resume` nor
            `overwrite` is set, or both are, or the run to be resumed has other settings, another
            process trains there, or there is no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; allowed here: cpu")
    if resume and overwrite:
        raise UserError("--overwrite cannot be with --resume")
    with run_lock(folder):
        if overwrite:
            delete_run(folder)
        if not resume and (folder / SETTINGS).exists():
            raise UserError(
                f"{folder} holds a training; resume it by --resume, choose another --output-dir, "
                "or delete it by --overwrite"
            )
        if check_same_settings(folder, settings) and (folder / RESULT).exists():
            finished: dict[str, Any] = read_json(folder / RESULT) or {}
            clean_up(folder)
            return finished
        data = load_training_data(
            data_dir, settings.seed, settings.images, settings.held_out, settings.device
        )
        check_test_data(data_dir)
        write_json(folder / SETTINGS, settings.as_dict(), allow_nan=False)
        starts = [*(read_json(folder / ENVIRONMENT) or []), _environment()]
        write_json(folder / ENVIRONMENT, starts)
        run = _Run(settings, data)
        checkpoint = load_checkpoint(folder)
        if checkpoint is not None:
            run.load_state_dict(checkpoint, str(folder / CHECKPOINT))
        while len(run.history) < settings.epochs:
            record = run.train_epoch(progress or Progress())
            save_checkpoint(folder, run.state_dict())
            write_json(folder / HISTORY, run.history, allow_nan=False)
            (progress or Progress()).end_epoch(record)
        write_json(folder / HISTORY, run.history, allow_nan=False)
        return _finish(run, folder, data_dir, command, starts)


class _Run:
    """Model, optimizer, history and best weights so far."""

    def __init__(self, settings: TrainingSettings, data: TrainingData) -> None:
        self.settings, self.data = settings, data
        torch.manual_seed(settings.seed)
        self.model: nn.Module = build_classifier(
            settings.arm, groups=settings.groups, order=settings.order
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
        """The next epoch and its validation; returns its entry in the history."""
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
        if validated.accuracy > best:  # of equal epochs the first
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
                "from those of a training without interruption (OMP_NUM_THREADS sets the number)",
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
    """The only place where the test images are looked at."""
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
    save_outcome(folder, run.best_state, logits.cpu().numpy(), result)
    return result
