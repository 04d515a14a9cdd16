"""Each config is what its name says, and two of them differ in nothing else."""

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
