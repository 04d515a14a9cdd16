"""Turns epochs into iterations, and scales LR and schedule to the batch and to the number of
processes, by the linear rule.

Source: Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677): k times the images per
step need k times the LR and 1/k of the iterations, so that a run sees as many images as before.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ws_detectron.errors import ConfigError

logger = logging.getLogger(__name__)

# numbers of iterations, which decrease with a larger batch
ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD")
PERIODS = ("TEST.EVAL_PERIOD", "TEST.PRECISE_BN.NUM_ITER")


def resolve_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """Replaces SOLVER.EPOCHS by iterations.

    With E epochs of N images and B images per step (SOLVER.REFERENCE_IMS_PER_BATCH, from which
    `scale_config` scales, or else SOLVER.IMS_PER_BATCH), a schedule of M iterations becomes one of
    M' = ceil(E N / B), with all its other events at the same fractions of it, but evaluations and
    checkpoints no more often than once an epoch:

    ==============================================  ======================
    SOLVER.MAX_ITER                                 M'
    SOLVER.STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD,  x M' / M, rounded up
    TEST.EVAL_PERIOD
    ==============================================  ======================

    SOLVER.EPOCHS becomes 0: a run's `config.yaml` keeps its length when its data change.

    Args:
        cfg: not modified; returned as it is if SOLVER.EPOCHS is 0.
        images: number of images to train on, N.

    Raises:
        ConfigError: SOLVER.EPOCHS is negative, or there is no image or no iteration.
    """
    solver = cfg.SOLVER
    if solver.EPOCHS == 0:
        return cfg
    if solver.EPOCHS < 0 or solver.MAX_ITER < 1 or not images:
        raise ConfigError(
            f"SOLVER.EPOCHS is {solver.EPOCHS}, SOLVER.MAX_ITER {solver.MAX_ITER}, and "
            f"DATASETS.TRAIN has {images} images; allowed: an EPOCHS of 1 or more with images and "
            "a MAX_ITER above 0, of which milestones, warm-up and periods are fractions, or 0 to "
            "train for MAX_ITER iterations"
        )
    length = math.ceil(
        solver.EPOCHS * images / (solver.REFERENCE_IMS_PER_BATCH or solver.IMS_PER_BATCH)
    )

    def same_fraction(iterations: int) -> int:
        return -(-iterations * length // solver.MAX_ITER)  # exact, unlike a product of floats

    values = _rescaled(cfg, same_fraction, (*ITERATIONS, "TEST.EVAL_PERIOD"))
    epoch = math.ceil(length / solver.EPOCHS)
    for key in ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"):
        if values.get(key):
            values[key] = max(values[key], epoch)
    return _changed(cfg, {**values, "SOLVER.EPOCHS": 0})


def describe_schedule(cfg: CfgNode, images: int) -> str:
    """One line on a training: its images, epochs, steps, evaluations and checkpoints.

    Args:
        cfg: scaled to the batch and to the processes.
        images: number of images to train on.
    """
    solver, sets = cfg.SOLVER, cfg.DATASETS
    steps, period, per_epoch = solver.MAX_ITER, cfg.TEST.EVAL_PERIOD, images / solver.IMS_PER_BATCH
    parts = [
        f"training on {images:,} images of {', '.join(sets.TRAIN)}",
        f"{_amount(steps / per_epoch)} epochs of {_amount(per_epoch)} steps, which are {steps:,} "
        f"steps of {solver.IMS_PER_BATCH} images",
    ]
    if sets.TEST:
        often = "once, at the end"
        if 0 < period < steps:
            often = f"{math.ceil(steps / period)} times, every {period:,} steps "
            often += f"({_amount(period / per_epoch)} epochs)"
        parts.append(f"evaluated on {', '.join(sets.TEST)} {often}")
    parts.append(f"saved every {solver.CHECKPOINT_PERIOD:,} steps")
    return "; ".join([*parts, "from step 20 on, the log has the time left (eta)"])


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


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

    values = {
        "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * batch / reference,
        **_rescaled(cfg, fewer, (*ITERATIONS, *PERIODS)),
        "SOLVER.REFERENCE_IMS_PER_BATCH": batch,
    }
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


def before_end(steps: Iterable[int], iterations: int) -> tuple[int, ...]:
    """The milestones before the end of a schedule; detectron2 refuses others, which rounding can
    produce."""
    return tuple(step for step in steps if step < iterations)


def _rescaled(cfg: CfgNode, rescale: Callable[[int], int], keys: Iterable[str]) -> dict[str, Any]:
    """The values of `keys`, and the milestones, each rescaled."""
    values: dict[str, Any] = {key: rescale(attrgetter(key)(cfg)) for key in keys}
    steps = map(rescale, cfg.SOLVER.STEPS)
    return {**values, "SOLVER.STEPS": before_end(steps, values["SOLVER.MAX_ITER"])}


def _changed(cfg: CfgNode, values: dict[str, Any]) -> CfgNode:
    """A copy with other values, frozen if `cfg` is."""
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([item for pair in values.items() for item in pair])
    if cfg.is_frozen():
        changed.freeze()
    return changed
