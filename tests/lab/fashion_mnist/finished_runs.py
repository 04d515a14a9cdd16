"""Folders as finished trainings leave them, without training."""

import json
from pathlib import Path

import numpy as np

from ws_detectron.lab.fashion_mnist.training_settings import TrainingSettings

ENVIRONMENT = {
    "date": "2026-01-02 03:04 UTC",
    "cpu": "A CPU",
    "gpu": "A GPU",
    "torch": "2.11.0",
    "python": "3.11.1",
}


def write_run(folder: Path, accuracy: float, seconds: float = 20.0, **settings: object) -> Path:
    """A run of two epochs and 100 test images with this test accuracy, in `folder`/name.

    Args:
        settings: of `TrainingSettings`; `variant` and `batch_size` at least.
    """
    chosen = TrainingSettings(**{"epochs": 2, "images": 500, **settings})  # type: ignore[arg-type]
    path = folder / chosen.name
    path.mkdir(parents=True)
    history = [
        {
            "epoch": epoch, "images": 500, "lr": 0.1, "train_loss": 1.0 / epoch,
            "train_accuracy": 0.5, "validation_loss": None, "validation_accuracy": 0.4 + epoch / 10,
            "seconds": seconds + epoch, "validation_seconds": 1.0,
        }
        for epoch in (1, 2)
    ]  # fmt: skip
    result = {
        "settings": chosen.as_dict(), "command": "python tools/train_fashion_mnist.py --all",
        "best_epoch": 2, "validation_accuracy": 0.6,
        "test_loss": 0.7, "test_accuracy": accuracy, "test_images": 100,
        "seconds_per_epoch": seconds + 1.5, "threads": 2, "environment": ENVIRONMENT,
    }  # fmt: skip
    (path / "history.json").write_text(json.dumps(history))
    (path / "result.json").write_text(json.dumps(result))
    logits = np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
    np.save(path / "test_logits.npy", logits)
    return path
