"""A resumed run follows its config, not that of the checkpoint."""

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import LRMultiplier

from .prepare import as_flat_dict
from .scaling import Change

logger = logging.getLogger(__name__)


class ConfigState:
    """Saves the config in checkpoints, so that a resumed run can log what has changed.

    Args:
        cfg: the scaled config of the run.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self.was_loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Full key -> value."""
        return as_flat_dict(self._cfg)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Logs the differences; the current config stays. Keys that one of them lacks are skipped,
        as they come with another version of detectron2."""
        self.was_loaded = True
        changes = [
            str(Change(key, state[key], value))
            for key, value in as_flat_dict(self._cfg).items()
            if key in state and state[key] != value and key != "OUTPUT_DIR"
        ]
        if changes:
            logger.warning(
                "The config has changed since the checkpoint that this run resumes from; the new "
                "values are used: %s",
                ", ".join(changes),
            )


def hyperparameters(trainer: DefaultTrainer) -> list[dict[str, Any]]:
    """LR, momentum, weight decay, ... of each parameter group of the optimizer."""
    groups = trainer.optimizer.param_groups
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def follow_config(
    trainer: DefaultTrainer, configured: list[dict[str, Any]], config_state: ConfigState
) -> None:
    """Resets optimizer and scheduler of a resumed trainer to the values of the config.

    A scheduler that is not detectron2's keeps its state, including the LR.

    Args:
        trainer: a trainer that has loaded a checkpoint.
        configured: its `hyperparameters` before the checkpoint was loaded.
        config_state: the config in the checkpoint.
    """
    groups, scheduler = trainer.optimizer.param_groups, trainer.scheduler
    if not isinstance(scheduler, LRMultiplier):
        for group, values in zip(groups, configured):
            group.update({k: v for k, v in values.items() if k not in ("lr", "initial_lr")})
        logger.warning(
            "LR and schedule are those of the checkpoint, not of the config: %s keeps them",
            type(scheduler).__name__,
        )
        return
    base_lrs = [values["initial_lr"] for values in configured]
    if scheduler.base_lrs != base_lrs and not config_state.was_loaded:
        logger.warning(
            "The checkpoint comes from a run with BASE_LR %g; this run uses the BASE_LR of its "
            "config, %g",
            scheduler.base_lrs[0],
            base_lrs[0],
        )
    for group, values in zip(groups, configured):
        group.update(values)
    scheduler.base_lrs = base_lrs
    if trainer.start_iter < trainer.max_iter:  # the schedule has no LR after its end
        for group, lr in zip(groups, scheduler.get_lr()):
            group["lr"] = lr
