"""Each config is what its name says, and two of them differ in nothing else."""

import math
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from leaves import (
    BACKBONES,
    BIT,
    CONFIGS,
    IMAGES_PER_GPU,
    LEAVES,
    SCHEDULES,
    Name,
    differing_keys,
    flatten,
    load,
    path_of,
)

from ws_detectron import add_ws_config, model_zoo
from ws_detectron.engine import load_config
from ws_detectron.engine.scaling import resolve_epochs, scale_config

OWN_DATA = "own_data/mask_rcnn_R_50_FPN_gn_ws.yaml"
# studies/ holds files of tools/run_study.py, which name configs and are none
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_file_holds_known_keys_and_no_code(path: Path) -> None:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_is_what_its_name_says(leaf: str) -> None:
    values, says = flatten(load(leaf)), Name.parse(leaf).keys()
    assert {key: values[key] for key in says} == says
    # the last checkpoint is evaluated, too
    assert says["SOLVER.MAX_ITER"] % says["SOLVER.CHECKPOINT_PERIOD"] == 0


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_is_nothing_else(leaf: str) -> None:
    """What the name does not decide is as in one R-CNN, or one RetinaNet: so any two leaves
    differ in exactly the keys in which their names do."""
    name = Name.parse(leaf)
    detector = "retinanet" if name.detector == "retinanet" else "mask_rcnn"
    like = f"{detector}_R_50_FPN_1x_bn_2img"
    differing = differing_keys(load(leaf), load(like))
    assert differing <= name.keys().keys() | Name.parse(like).keys().keys()


def test_batches_stand_beside_each_other() -> None:
    """What is compared over the batch has all of them, and GN+WS has every backbone."""
    for leaf in LEAVES:
        if re.match("mask_rcnn_R_50_FPN_1x|scratch", leaf):
            assert {re.sub(r"\dimg", f"{n}img", leaf) for n in IMAGES_PER_GPU} <= set(LEAVES)
    for backbone in set(BACKBONES) - {BIT}:
        for schedule in SCHEDULES:
            assert f"mask_rcnn_{backbone}_FPN_{schedule}_gn_ws_2img" in LEAVES


def test_no_two_leaves_are_the_same_experiment() -> None:
    assert len({load(leaf).dump() for leaf in LEAVES}) == len(LEAVES)


@pytest.mark.parametrize("num_gpus", [1, 4, 16])
def test_other_numbers_of_gpus_keep_the_images_per_gpu(num_gpus: int) -> None:
    for leaf in LEAVES:
        cfg = load(leaf)
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_gpus)
        assert scaled.SOLVER.IMS_PER_BATCH == num_gpus * Name.parse(leaf).images_per_gpu
        assert scaled.SOLVER.BASE_LR == cfg.SOLVER.BASE_LR * num_gpus / 8
        assert scaled.SOLVER.MAX_ITER * num_gpus == cfg.SOLVER.MAX_ITER * 8


def test_half_the_gpus_and_half_the_images_are_one_schedule() -> None:
    half_the_gpus = DefaultTrainer.auto_scale_workers(load("mask_rcnn_R_50_FPN_1x_gn_ws_2img"), 4)
    half_the_images = load("mask_rcnn_R_50_FPN_1x_gn_ws_1img")
    assert differing_keys(half_the_gpus, half_the_images) == {
        "SOLVER.REFERENCE_WORLD_SIZE",
        "TEST.PRECISE_BN.NUM_ITER",
    }


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if not Name.parse(leaf).ws])
def test_leaves_without_ws_need_stock_detectron2_only(leaf: str) -> None:
    cfg = get_cfg()  # without add_ws_config
    cfg.merge_from_file(str(path_of(leaf)))
    assert "WS" not in cfg.MODEL
    assert not re.search(r"\bWS|build_ws|ws://", cfg.dump())


def test_model_zoo_finds_every_leaf() -> None:
    for leaf in LEAVES:
        path = path_of(leaf)
        found = Path(model_zoo.get_config_file(path.relative_to(CONFIGS).as_posix()))
        assert found.read_text() == path.read_text()


def test_the_base_for_own_data_is_the_coco_config_with_a_schedule_of_its_own() -> None:
    own, coco = model_zoo.get_config(OWN_DATA), load("mask_rcnn_R_50_FPN_1x_gn_ws_2img")
    schedule = {
        *("EPOCHS", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD", "BASE_LR"),
        *("IMS_PER_BATCH", "REFERENCE_IMS_PER_BATCH", "REFERENCE_WORLD_SIZE"),
    }
    expected = {f"SOLVER.{key}" for key in schedule} | {"TEST.EVAL_PERIOD"}
    assert differing_keys(own, coco) == expected


@pytest.mark.parametrize("images, iterations", [(100, 5000), (10_000, 500_000)])
@pytest.mark.parametrize("batch, processes", [(2, 1), (1, 1), (2, 4)])
def test_own_data_are_trained_for_100_epochs_at_every_batch(
    images: int, iterations: int, batch: int, processes: int
) -> None:
    """At 2 images per step: 100 epochs, LR 0.0025, 20 evaluations, the LR falls after 67 and 89."""
    cfg = load_config(OWN_DATA, ["SOLVER.IMS_PER_BATCH", str(batch)])
    cfg = scale_config(resolve_epochs(cfg, images), processes)
    solver, per_step = cfg.SOLVER, batch * processes
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (per_step, iterations * 2 // per_step)
    assert solver.BASE_LR == pytest.approx(0.00125 * per_step)
    falls = [step / solver.MAX_ITER for step in solver.STEPS]
    assert falls == pytest.approx([0.67, 0.89], rel=0.01)
    # one more where detectron2, which scales to the processes, rounds the period down
    assert math.ceil(solver.MAX_ITER / cfg.TEST.EVAL_PERIOD) in (20, 21)
