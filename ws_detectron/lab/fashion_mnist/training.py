"""One training, from its first epoch or from its checkpoint, to its test accuracy.

Its folder is that of a run of a study. Every file is written atomically:

metrics.json        a line of JSON for each epoch; the last one of a finished training has its test
                    accuracy
run_record.json     settings, number of starts, machine and versions
checkpoint.pth      everything the next epoch depends on; deleted when the training is finished
model_best.pth      weights of the epoch with the best validation accuracy
misclassified.png   the test images that these misclassify with the highest confidence
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ws_detectron.checkpoint.reading import read_weight_file
from ws_detectron.errors import DivergedError, UserError
from ws_detectron.utils.command_line import progress
from ws_detectron.utils.environment import run_environment
from ws_detectron.utils.io import atomic_write, locked, write_json, write_text

from .files import load_splits
from .model import ORDERS, REPORT_GROUPS, VARIANTS, build_classifier

TRAIN_IMAGES = 50_000
DEFAULT_LRS = {2: 0.0015, 32: 0.02, 128: 0.05}
"""Batch size -> highest LR. Other sizes scale linearly from the nearest of these (by ratio)."""
SCHEDULES = ("cosine", "constant")
WARMUP = 0.1
"""Share of all steps during which the LR rises linearly."""
WEIGHT_DECAY = 5e-4
"""For parameters with more than one dimension; biases and norm layers have none."""
EVALUATION_BATCH = 200  # at 500 the features exceed the cache: 1.5 times as long per image

METRICS, RECORD, CHECKPOINT = "metrics.json", "run_record.json", "checkpoint.pth"
BEST_WEIGHTS, PICTURE = "model_best.pth", "misclassified.png"


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of one training; the defaults are the report's.

    Attributes:
        variant: a key of `VARIANTS`.
        batch_size: images per step; the last step of an epoch may have fewer.
        epochs: passes over the training images.
        lr: highest LR; None: `default_lr(batch_size)`.
        schedule: one of `SCHEDULES`.
        seed: for the split, the initial weights, the order of images and dropout.
        order: one of `ORDERS`.
        groups: of GN, a divisor of 32.
        images: training images, a multiple of 50; validation and test get a fifth each.
        device: "cpu" or "cuda".

    Raises:
        UserError: a number is not allowed; names the option.
    """

    variant: str
    batch_size: int
    epochs: int = 10
    lr: Optional[float] = None
    schedule: str = SCHEDULES[0]
    seed: int = 0
    order: str = ORDERS[0]
    groups: int = REPORT_GROUPS
    images: int = TRAIN_IMAGES
    device: str = "cpu"

    def __post_init__(self) -> None:
        _require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _require("seed", self.seed, self.seed >= 0, "0 or more")
        divisible = 50 <= self.images <= TRAIN_IMAGES and self.images % 50 == 0
        _require("images", self.images, divisible, f"a multiple of 50 up to {TRAIN_IMAGES}")
        least = 2 if VARIANTS[self.variant].norm == "BN" else 1
        rule = f"from {least} to the number of training images"
        _require("batch-size", self.batch_size, least <= self.batch_size <= self.images, rule)
        if self.images % self.batch_size == 1 < least:
            raise UserError(
                f"--batch-size {self.batch_size} leaves one image of {self.images} for the last "
                "batch, too few for the statistics of BN; choose another batch size"
            )
        if self.lr is None:
            object.__setattr__(self, "lr", default_lr(self.batch_size))
        _require("lr", self.lr, self.peak_lr > 0, "above 0")

    @property
    def peak_lr(self) -> float:
        """The highest LR."""
        assert self.lr is not None
        return self.lr

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch_size)

    def lr_at(self, step: int) -> float:
        """The LR of a step, counted from 0.

        "cosine": a linear rise over the first `WARMUP` of all steps, then half a cosine down to 0.
        """
        steps = self.steps_per_epoch * self.epochs
        warmup = max(1, round(WARMUP * steps))
        if self.schedule == "constant":
            return self.peak_lr
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def default_lr(batch_size: int) -> float:
    """The highest LR for a batch size, see `DEFAULT_LRS`."""
    nearest = min(DEFAULT_LRS, key=lambda known: abs(math.log(known / batch_size)))
    return DEFAULT_LRS[nearest] * batch_size / nearest


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"--{name} is {value}; allowed: {allowed}")


def train(
    settings: TrainingSettings,
    folder: Path,
    *,
    data_dir: Optional[Path] = None,
    resume: bool = False,
    overwrite: bool = False,
    echo: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains, chooses the epoch with the best validation accuracy, and tests it once.

    All random numbers come from torch's global generators, whose states are saved after each epoch
    together with weights and momentum. So a run that was killed and resumed ends with the same
    metrics as an uninterrupted one: bit by bit on a CPU with the same number of threads.

    Args:
        settings: what to train.
        folder: for the files of the run.
        data_dir: see `folder` of `load_fashion_mnist`.
        resume: resume the run in `folder`, if any; a finished run is not trained again.
        overwrite: delete the run in `folder`, if any, and start anew.
        echo: called with a line after each epoch, once the epoch is saved.

    Returns:
        The last line of metrics.json, accuracies in %.

    Raises:
        DivergedError: the training loss is not finite.
        UserError: the data are missing or damaged, the device does not exist, `resume` and
            `overwrite` are both set, `folder` holds a run and neither is set, the run to resume
            has other settings, or another process trains there.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; allowed here: cpu")
    if resume and overwrite:
        raise UserError("--overwrite and --resume exclude each other; choose one")
    with locked(folder / ".lock", f"another process is training in {folder}"):
        if overwrite:
            for name in (METRICS, RECORD, CHECKPOINT, BEST_WEIGHTS, PICTURE):
                (folder / name).unlink(missing_ok=True)
        record = json.loads(_text(folder / RECORD) or '{"starts": 0}')
        if record["starts"]:
            _check_resumes(folder, settings, record["settings"], resume)
        rows = [json.loads(line) for line in _text(folder / METRICS).splitlines()]
        if not (rows and "test_accuracy" in rows[-1]):
            splits = load_splits(
                settings.seed, settings.images, settings.images // 5, data_dir, settings.device
            )
            environment = run_environment(settings.device)
            starts = record["starts"] + 1
            write_json(
                folder / RECORD, {"settings": asdict(settings), "starts": starts, **environment}
            )
            rows = _train(settings, folder, splits, echo)
        for path in folder.glob(f"*{CHECKPOINT}*"):  # also partial ones, of killed processes
            path.unlink()
    last: dict[str, Any] = rows[-1]
    return last


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _check_resumes(
    folder: Path, settings: TrainingSettings, found: dict[str, Any], resume: bool
) -> None:
    """Checks that the run in `folder` may be resumed; `found` are its settings."""
    if not resume:
        raise UserError(
            f"{folder} holds a training; resume it with --resume, delete it with --overwrite, "
            "or choose another --output"
        )
    for name, requested in asdict(settings).items():
        if found.get(name) != requested:
            raise UserError(
                f"{folder} holds a training with {name} {found.get(name)!r}, requested is "
                f"{requested!r}; choose another --output, or delete it with --overwrite"
            )


def _train(
    settings: TrainingSettings,
    folder: Path,
    splits: tuple[TensorDataset, TensorDataset, TensorDataset],
    echo: Callable[[str], object],
) -> list[dict[str, Any]]:
    """Trains from the checkpoint on, if there is one; returns the rows of metrics.json."""
    try:
        from ws_detectron.evaluation.figure_style import write_figure

        from .misclassified import draw_misclassified
    except ImportError as error:
        raise UserError(f"{error}; install it: pip install 'ws_detectron[lab]'") from error
    train_set, validation_set, test_set = splits
    torch.manual_seed(settings.seed)
    model: nn.Module = build_classifier(
        settings.variant, groups=settings.groups, order=settings.order
    ).to(settings.device)
    optimizer = build_optimizer(model, settings.peak_lr)
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0, "model": {}}
    if (folder / CHECKPOINT).exists():
        state = read_weight_file(folder / CHECKPOINT)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows, best = state["rows"], state["best"]
        torch.set_rng_state(state["random_state"])
        if settings.device == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"])

    while len(rows) < settings.epochs:
        row = _epoch(settings, len(rows) + 1, model, optimizer, train_set, validation_set)
        rows.append(row)
        if row["validation_accuracy"] > best["accuracy"]:  # the first of equal epochs
            weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
            best = {
                "epoch": row["epoch"], "accuracy": row["validation_accuracy"], "model": weights,
            }  # fmt: skip
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rows": rows,
            "best": best,
            "random_state": torch.get_rng_state(),
        }
        if settings.device == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state()
        _save(folder / CHECKPOINT, state)
        _write_rows(folder, rows)
        echo(
            f"epoch {row['epoch']}/{settings.epochs}: "
            f"train loss {row['total_loss']:.4f}, accuracy {row['train_accuracy']:.2f} %; "
            f"validation loss {row['validation_loss']:.4f}, "
            f"accuracy {row['validation_accuracy']:.2f} %; "
            f"{settings.steps_per_epoch * row['time']:.1f} s"
        )

    model.load_state_dict(best["model"])
    logits = predict(model, test_set)  # nothing else evaluates the test images
    test_loss, test_accuracy = metrics(logits, test_set.tensors[1])
    tested = {"test_loss": test_loss, "test_accuracy": test_accuracy, "best_epoch": best["epoch"]}
    _save(folder / BEST_WEIGHTS, best["model"])
    trained = f"{VARIANTS[settings.variant].title}, batch {settings.batch_size}"
    write_figure(draw_misclassified(trained, logits, *test_set.tensors), folder / PICTURE)
    rows = [*rows[:-1], {**rows[-1], **tested}]
    _write_rows(folder, rows)
    return rows


def _epoch(
    settings: TrainingSettings,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: TensorDataset,
    validation_set: TensorDataset,
) -> dict[str, Any]:
    """Trains and validates an epoch, counted from 1; returns its row of metrics.json."""
    end = epoch * settings.steps_per_epoch
    lrs = [settings.lr_at(step) for step in range(end - settings.steps_per_epoch, end)]
    title = f"epoch {epoch}/{settings.epochs}"
    start = time.perf_counter()
    loss, accuracy = train_epoch(model, optimizer, train_set, settings.batch_size, lrs, title)
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise DivergedError(
            f"{title}: the training loss is {loss}; choose a lower --lr than {settings.lr:g}"
        )
    validation = metrics(predict(model, validation_set), validation_set.tensors[1])
    return {
        "iteration": end - 1,
        "epoch": epoch,
        "lr": lrs[-1],
        "total_loss": loss,
        "train_accuracy": accuracy,
        "validation_loss": validation[0],
        "validation_accuracy": validation[1],
        "time": seconds / len(lrs),
    }


def _save(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path, "wb") as file:
        torch.save(state, file)


def _write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_text(folder / METRICS, "".join(f"{json.dumps(row)}\n" for row in rows))


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, the recipe of all variants; the report does not name its."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TensorDataset,
    batch_size: int,
    lrs: Sequence[float],
    title: Optional[str] = None,
) -> tuple[float, float]:
    """Trains on every image once, in an order drawn from torch's global generator.

    Args:
        lrs: the LR of each step.
        title: of the progress; None: none is shown.

    Returns:
        Loss and accuracy over all images, each computed in its own training step, with dropout.
    """
    model.train()
    order = torch.randperm(len(data)).to(data.tensors[0].device)
    outputs = []  # metrics are computed at the end: at every step they would make a GPU wait
    steps = order.split(batch_size)
    for chosen, lr in zip(steps if title is None else progress(steps, title, "step"), lrs):
        images, labels = data[chosen]
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(images)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        outputs.append(logits.detach())
    return metrics(torch.cat(outputs), data.tensors[1][order])


def predict(model: nn.Module, data: TensorDataset) -> torch.Tensor:
    """Logits (N, 10) of the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images) for images in data.tensors[0].split(EVALUATION_BATCH)])


def metrics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in % of logits (N, 10) for labels (N,)."""
    accuracy = 100 * int((logits.argmax(1) == labels).sum()) / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy
