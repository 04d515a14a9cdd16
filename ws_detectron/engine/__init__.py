"""Training and evaluation runs: config, checks, processes, trainer."""

from .checks import check_run
from .config import as_flat_dict, load_config
from .launch import launch, started_by_torchrun
from .output_dir import delete_run
from .run import run
from .start import start
from .trainer import Trainer

__all__ = [
    "Trainer",
    "as_flat_dict",
    "check_run",
    "delete_run",
    "launch",
    "load_config",
    "run",
    "start",
    "started_by_torchrun",
]
