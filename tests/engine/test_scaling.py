"""Epochs, and the linear rule, computed by hand from 16 images at LR 0.02."""

import logging

import pytest
from detectron2.config import CfgNode

from ws_detectron.engine import load_config
from ws_detectron.engine.scaling import (
    describe_schedule,
    resolve_epochs,
    scale_config,
    scale_to_batch,
)
from ws_detectron.errors import ConfigError

SCHEDULE = """
SOLVER.BASE_LR 0.02 SOLVER.MAX_ITER 90000 SOLVER.STEPS (60000,80000) SOLVER.WARMUP_ITERS 1000
SOLVER.CHECKPOINT_PERIOD 7500 TEST.EVAL_PERIOD 7500 TEST.PRECISE_BN.NUM_ITER 200
""".split()


def config(batch: int, reference: int, world_size: int = 0) -> CfgNode:
    opts = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_IMS_PER_BATCH", reference]
    opts += ["SOLVER.REFERENCE_WORLD_SIZE", world_size]
    return load_config("", [*SCHEDULE, *map(str, opts)])


def schedule(cfg: CfgNode) -> tuple:
    s = cfg.SOLVER
    return (
        (s.IMS_PER_BATCH, pytest.approx(s.BASE_LR), s.MAX_ITER, tuple(s.STEPS), s.WARMUP_ITERS),
        (s.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER),
    )


def test_a_quarter_of_the_batch_takes_four_times_as_long_at_a_quarter_of_the_lr() -> None:
    cfg = config(4, 16)
    expected = ((4, 0.005, 360000, (240000, 320000), 4000), (30000, 30000, 800))
    assert schedule(scale_config(cfg, 1)) == expected
    assert schedule(cfg)[0][2] == 90000  # the given config is left alone


def test_a_larger_batch_and_rounding() -> None:
    # 16/48: a third
    expected = ((48, 0.06, 30000, (20000, 26667), 333), (2500, 2500, 67))
    assert schedule(scale_config(config(48, 16), 1)) == expected


def test_off_by_default_and_for_the_reference_batch() -> None:
    for reference in (0, 4):
        cfg = config(4, reference)
        assert scale_to_batch(cfg) == (cfg, [])
    assert load_config("").SOLVER.REFERENCE_IMS_PER_BATCH == 0


def test_never_stays_never_and_the_rest_at_least_one() -> None:
    cfg = config(1600, 16)
    cfg.TEST.EVAL_PERIOD = cfg.SOLVER.WARMUP_ITERS = 0
    cfg.TEST.PRECISE_BN.NUM_ITER = 2
    scaled = scale_config(cfg, 1)
    assert (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.WARMUP_ITERS) == (0, 0)
    assert scaled.TEST.PRECISE_BN.NUM_ITER == 1


def test_a_milestone_that_rounding_brings_to_the_end_is_dropped() -> None:
    cfg = config(160000, 16)  # 9 iterations, milestones at 6 and 8
    assert tuple(scale_config(cfg, 1).SOLVER.STEPS) == (6, 8)
    cfg = config(480000, 16)  # 3 iterations, milestones at 2 and 2.67
    assert tuple(scale_config(cfg, 1).SOLVER.STEPS) == (2,)


def test_processes_come_after_the_batch() -> None:
    """Meant for 16 images; 8 processes x 1 image asked for, and run on 2: 2 images."""
    scaled = scale_config(config(8, 16, world_size=8), 2)
    assert schedule(scaled)[0] == (2, 0.0025, 720000, (480000, 640000), 8000)
    assert scaled.SOLVER.REFERENCE_WORLD_SIZE == 2


def test_no_period_becomes_never_on_more_processes() -> None:
    cfg = config(16, 16, world_size=1)
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.WARMUP_ITERS = 1, 3, 0
    scaled = scale_config(cfg, 8)
    assert (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.CHECKPOINT_PERIOD) == (1, 1)
    assert scaled.SOLVER.WARMUP_ITERS == 0


@pytest.mark.parametrize("world_size", [0, 8])
def test_scaling_twice_is_scaling_once(world_size: int) -> None:
    once = scale_config(config(8, 16, world_size), 2)
    assert schedule(scale_config(once, 2)) == schedule(once)
    again = load_config("", ["SOLVER.IMS_PER_BATCH", "1"])
    again.merge_from_other_cfg(once)  # as a run's config.yaml is read
    assert schedule(scale_config(again, 2)) == schedule(once)


def test_what_was_scaled_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ws_detectron"):
        scale_config(config(16, 16), 1)
        assert not caplog.records
        scale_config(config(4, 16), 1)
    (record,) = caplog.records
    for part in (
        "SOLVER.IMS_PER_BATCH is 4",
        "REFERENCE_IMS_PER_BATCH 16",
        "SOLVER.BASE_LR 0.02 -> 0.005",
        "SOLVER.MAX_ITER 90000 -> 360000",
        "SOLVER.STEPS (60000, 80000) -> (240000, 320000)",
    ):
        assert part in record.getMessage()


def test_frozen_stays_frozen() -> None:
    cfg = config(4, 16)
    cfg.freeze()
    assert scale_config(cfg, 1).is_frozen()


def in_epochs(epochs: int, batch: int, reference: int = 0) -> CfgNode:
    cfg = config(batch, reference)
    cfg.merge_from_list(["SOLVER.EPOCHS", epochs])
    return cfg


def test_epochs_keep_the_fractions_of_the_schedule() -> None:
    """60 images of which 4 make a step: 15 steps in an epoch, 180 in 12, of 90,000 before."""
    cfg = in_epochs(12, batch=4)
    resolved = resolve_epochs(cfg, images=60)
    # 2/3 and 8/9 of 180; 1/90; 1/12
    expected = ((4, 0.02, 180, (120, 160), 2), (15, 15, 200))
    assert schedule(resolved) == expected and resolved.SOLVER.EPOCHS == 0
    assert schedule(resolve_epochs(resolved, images=99)) == expected  # as after a resume
    assert schedule(cfg)[0][2] == 90000  # the given config is left alone


def test_epochs_are_scaled_from_the_batch_that_the_lr_is_for() -> None:
    """100 images: 62.5 steps of 16 images, 63 that 16 times as many steps of 1 image replace."""
    scaled = scale_config(resolve_epochs(in_epochs(10, batch=1, reference=16), images=100), 1)
    assert schedule(scaled)[0] == (1, 0.00125, 63 * 16, (42 * 16, 56 * 16), 16)


def test_a_few_epochs_are_evaluated_and_saved_once_each() -> None:
    """1/12 of 3 epochs of 15 steps would be 4 steps."""
    assert schedule(resolve_epochs(in_epochs(3, batch=4), images=60))[1][:2] == (15, 15)


def test_no_event_is_lost_in_a_short_training() -> None:
    """One image: 1/16 of a step is one step, and so is each period; 0 stays 0."""
    cfg = in_epochs(1, batch=16)
    cfg.SOLVER.WARMUP_ITERS = cfg.TEST.EVAL_PERIOD = 0
    assert schedule(resolve_epochs(cfg, images=1)) == ((16, 0.02, 1, (), 0), (1, 0, 200))


@pytest.mark.parametrize("epochs, images, iterations", [(-1, 60, 9), (1, 0, 9), (1, 60, 0)])
def test_epochs_of_nothing(epochs: int, images: int, iterations: int) -> None:
    cfg = in_epochs(epochs, batch=4)
    cfg.SOLVER.MAX_ITER = iterations
    with pytest.raises(ConfigError, match=f"EPOCHS is {epochs}, .* has {images} images; allowed"):
        resolve_epochs(cfg, images)


def test_a_schedule_in_words() -> None:
    cfg = resolve_epochs(in_epochs(12, batch=4), images=60)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine", "ours"), ("held_out",)
    text = describe_schedule(cfg, images=60)
    for part in (
        "60 images of mine, ours",
        "12 epochs of 15 steps, which are 180 steps of 4 images",
        "evaluated on held_out 12 times, every 15 steps (1 epochs)",
        "saved every 15 steps",
    ):
        assert part in text, text
    cfg.TEST.EVAL_PERIOD = 0
    assert "evaluated on held_out once, at the end" in describe_schedule(cfg, images=60)
    cfg.DATASETS.TEST = ()
    assert "evaluated" not in describe_schedule(cfg, images=60)
