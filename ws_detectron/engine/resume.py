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
    """The config as a part of checkpoints, so that a resumed run can log what has changed since.

    Args:
        cfg: that of the run, scaled.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self.was_loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Full key -> value."""
        return as_flat_dict(self._cfg)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Logs what differs; the present config stays. A key that one of them lacks is new or gone
        with a version of detectron2, and left out."""
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
    """LR, momentum, weight decay, ... of each group of the optimizer's parameters."""
    groups = trainer.optimizer.param_groups
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def follow_config(
    trainer: DefaultTrainer, configured: list[dict[str, Any]], config_state: ConfigState
) -> None:
    """Sets optimizer and scheduler, whose states were loaded, to the values of the config.

    A scheduler that is not detectron2's keeps its state, and with it its LR.

    Args:
        trainer: resumed.
        configured: its `hyperparameters` before that.
        config_state: of the checkpoint.
    """
    groups, scheduler = trainer.optimizer.param_groups, trainer.scheduler
    if not isinstance(scheduler, LRMultiplier):
        for group, values in zip(groups, configured):
            group.update({k: v for k, v in values.items() if k not in ("lr", "initial_lr")})
        logger.warning(
            "LR and schedule are those of the checkpoint, whatever the config says: %s keeps them",
            type(scheduler).__name__,
        )
        return
    base_lrs = [values["initial_lr"] for values in configured]
    if scheduler.base_lrs != base_lrs and not config_state.was_loaded:
        logger.warning(
            "The checkpoint, which does not hold its config, is of a run with BASE_LR %g; "
            "this one resumes with that of the config, %g",
            scheduler.base_lrs[0],
            base_lrs[0],
        )
    for group, values in zip(groups, configured):
        group.update(values)
    scheduler.base_lrs = base_lrs
    if trainer.start_iter < trainer.max_iter:  # there is no LR behind the end of the schedule
        for group, lr in zip(groups, scheduler.get_lr()):
            group["lr"] = lr
