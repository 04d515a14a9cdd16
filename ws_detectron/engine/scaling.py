"""LR and schedule scaled to the batch and to the number of processes, by the linear rule.

Source of the rule: Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677): with k times
the images per step, k times the LR and a k-th of the iterations, so that a run sees as many images.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

logger = logging.getLogger(__name__)

# numbers of iterations: all become fewer with a larger batch
ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD")
PERIODS = ("TEST.EVAL_PERIOD", "TEST.PRECISE_BN.NUM_ITER")


@dataclass(frozen=True)
class Change:
    """A key that the rule changed."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def scale_config(cfg: CfgNode, world_size: int) -> CfgNode:
    """The config for the batch that it asks for, on this many processes.

    First the batch: where SOLVER.REFERENCE_IMS_PER_BATCH is neither 0 nor SOLVER.IMS_PER_BATCH,
    LR and schedule are for the former and are scaled to the latter; what changed is logged. Then
    the processes: detectron2's own `auto_scale_workers`, which SOLVER.REFERENCE_WORLD_SIZE
    controls.

    Both references become what they were scaled to, so scaling twice does no harm, and a run's
    `config.yaml` can be run again.

    Args:
        cfg: left as it is.
        world_size: processes in the job.
    """
    scaled, changes = scale_to_batch(cfg)
    if changes:
        logger.info(
            "SOLVER.IMS_PER_BATCH is %d, SOLVER.REFERENCE_IMS_PER_BATCH %d; scaled: %s",
            cfg.SOLVER.IMS_PER_BATCH,
            cfg.SOLVER.REFERENCE_IMS_PER_BATCH,
            ", ".join(map(str, changes)),
        )
    scaled = DefaultTrainer.auto_scale_workers(scaled, world_size)
    if scaled.SOLVER.REFERENCE_IMS_PER_BATCH not in (0, scaled.SOLVER.IMS_PER_BATCH):
        scaled = _changed(scaled, {"SOLVER.REFERENCE_IMS_PER_BATCH": scaled.SOLVER.IMS_PER_BATCH})
    return scaled


def scale_to_batch(cfg: CfgNode) -> tuple[CfgNode, list[Change]]:
    """Scales from SOLVER.REFERENCE_IMS_PER_BATCH to SOLVER.IMS_PER_BATCH.

    ===========================================  ==================================
    SOLVER.BASE_LR                               x batch / reference
    SOLVER.MAX_ITER, STEPS, WARMUP_ITERS         x reference / batch, rounded
    SOLVER.CHECKPOINT_PERIOD, TEST.EVAL_PERIOD   the same
    TEST.PRECISE_BN.NUM_ITER                     the same; at least 1
    ===========================================  ==================================

    Args:
        cfg: left as it is.

    Returns:
        The scaled config, or `cfg` itself where nothing is to be scaled, and what changed.
    """
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    if reference in (0, batch):
        return cfg, []

    def fewer(iterations: int) -> int:
        # 0 means "never" for a period and "at once" for a warm-up, and stays
        return max(1, round(iterations * reference / batch)) if iterations else 0

    values: dict[str, Any] = {"SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * batch / reference}
    for key in (*ITERATIONS, *PERIODS):
        values[key] = fewer(_value(cfg, key))
    values["SOLVER.STEPS"] = before_end(
        [fewer(step) for step in cfg.SOLVER.STEPS], values["SOLVER.MAX_ITER"]
    )
    values["SOLVER.REFERENCE_IMS_PER_BATCH"] = batch
    changes = [Change(key, _value(cfg, key), value) for key, value in values.items()]
    return _changed(cfg, values), [change for change in changes if change.before != change.after]


def before_end(steps: Sequence[int], iterations: int) -> tuple[int, ...]:
    """The milestones that a schedule reaches; one at its very end, where rounding may bring it, is
    refused by detectron2."""
    return tuple(step for step in steps if step < iterations)


def _value(cfg: CfgNode, key: str) -> Any:
    node = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _changed(cfg: CfgNode, values: dict[str, Any]) -> CfgNode:
    """A copy with other values, frozen if `cfg` is."""
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([word for pair in values.items() for word in pair])
    if cfg.is_frozen():
        changed.freeze()
    return changed
