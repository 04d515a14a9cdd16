"""Training and evaluation runs.

In reading order: `prepare` (config), `launch` (processes), `run`, `trainer`; the other modules are
their parts.
"""

from .launch import launch, start, started_by_torchrun
from .loaders import build_train_loader
from .output_dir import delete_run
from .prepare import as_flat_dict, load_config
from .run import run, start_run
from .trainer import Trainer

__all__ = [
    "Trainer",
    "as_flat_dict",
    "build_train_loader",
    "delete_run",
    "launch",
    "load_config",
    "run",
    "start",
    "start_run",
    "started_by_torchrun",
]
