"""Scales LR and schedule to the batch and to the number of processes, by the linear rule.

Source: Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677): k times the images per
step need k times the LR and 1/k of the iterations, so that a run sees as many images as before.
"""

import logging
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

logger = logging.getLogger(__name__)

# numbers of iterations, which decrease with a larger batch
ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD")
PERIODS = ("TEST.EVAL_PERIOD", "TEST.PRECISE_BN.NUM_ITER")


def scale_config(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scales a config to its batch and to the number of processes.

    First to the batch: unless SOLVER.REFERENCE_IMS_PER_BATCH is 0 or equals SOLVER.IMS_PER_BATCH,
    LR and schedule are scaled from the former to the latter, and the changes are logged. Then to
    the processes: by detectron2's `auto_scale_workers`, which SOLVER.REFERENCE_WORLD_SIZE controls.

    Both references are updated, so scaling again is a no-op, and a run's `config.yaml` can be run
    again.

    Args:
        cfg: not modified.
        world_size: processes in the job.
    """
    scaled, changes = scale_to_batch(cfg)
    if changes:
        logger.info(
            "SOLVER.IMS_PER_BATCH is %d, SOLVER.REFERENCE_IMS_PER_BATCH %d; scaled: %s",
            cfg.SOLVER.IMS_PER_BATCH,
            cfg.SOLVER.REFERENCE_IMS_PER_BATCH,
            ", ".join(changes),
        )
    of_job = DefaultTrainer.auto_scale_workers(scaled, world_size)
    # detectron2 rounds down to 0, which means "never"
    values = {
        key: 1
        for key in (*ITERATIONS, *PERIODS)
        if attrgetter(key)(scaled) and not attrgetter(key)(of_job)
    }
    if of_job.SOLVER.REFERENCE_IMS_PER_BATCH:
        values["SOLVER.REFERENCE_IMS_PER_BATCH"] = of_job.SOLVER.IMS_PER_BATCH
    return _changed(of_job, values)


def scale_to_batch(cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    """Scales from SOLVER.REFERENCE_IMS_PER_BATCH to SOLVER.IMS_PER_BATCH.

    ===========================================  ==================================
    SOLVER.BASE_LR                               x batch / reference
    SOLVER.MAX_ITER, STEPS, WARMUP_ITERS         x reference / batch, rounded
    SOLVER.CHECKPOINT_PERIOD, TEST.EVAL_PERIOD   the same
    TEST.PRECISE_BN.NUM_ITER                     the same; at least 1
    ===========================================  ==================================

    Args:
        cfg: not modified.

    Returns:
        The scaled config, or `cfg` itself if there is nothing to scale, and the changes,
        such as "SOLVER.BASE_LR 0.02 -> 0.005".
    """
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    if reference in (0, batch):
        return cfg, []

    def fewer(iterations: int) -> int:
        # 0 stays 0: no period, no warm-up
        return max(1, round(iterations * reference / batch)) if iterations else 0

    values: dict[str, Any] = {"SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * batch / reference}
    values.update({key: fewer(attrgetter(key)(cfg)) for key in (*ITERATIONS, *PERIODS)})
    values["SOLVER.STEPS"] = before_end(
        [fewer(step) for step in cfg.SOLVER.STEPS], values["SOLVER.MAX_ITER"]
    )
    values["SOLVER.REFERENCE_IMS_PER_BATCH"] = batch
    return _changed(cfg, values), list_changes(
        {key: attrgetter(key)(cfg) for key in values}, values
    )


def list_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """ "KEY before -> after" for each key of both whose value differs."""
    return [
        f"{key} {before[key]} -> {value}"
        for key, value in after.items()
        if key in before and before[key] != value
    ]


def before_end(steps: Sequence[int], iterations: int) -> tuple[int, ...]:
    """The milestones before the end of a schedule; detectron2 refuses others, which rounding can
    produce."""
    return tuple(step for step in steps if step < iterations)


def _changed(cfg: CfgNode, values: dict[str, Any]) -> CfgNode:
    """A copy with other values, frozen if `cfg` is."""
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([item for pair in values.items() for item in pair])
    if cfg.is_frozen():
        changed.freeze()
    return changed
