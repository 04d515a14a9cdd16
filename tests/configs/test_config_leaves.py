"""Each config holds what its name says, and is listed in configs/README.md as it is."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from leaves import (
    BACKBONES,
    CONFIGS,
    FAIR_GN,
    IMAGES_PER_GPU,
    LEAVES,
    LR_OF_16_IMAGES,
    NORMS,
    SCHEDULES,
    TORCHVISION,
    Name,
    differing_keys,
    load,
    path_of,
)

from ws_detectron import add_ws_config, model_zoo

RGB_INPUT = ("RGB", [123.675, 116.280, 103.530], [58.395, 57.120, 57.375])
BGR_INPUT = ("BGR", [103.530, 116.280, 123.675], [1.0, 1.0, 1.0])


# studies/ holds files of tools/run_study.py, which name configs and are none
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_file_holds_known_keys_and_no_code(path: Path) -> None:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)


def test_the_tree_has_every_arm_at_every_batch_size() -> None:
    names = {Name.parse(leaf) for leaf in LEAVES}
    for arm in NORMS:
        for n in IMAGES_PER_GPU:
            assert Name(False, "mask_rcnn", "R_50", "1x", arm, n) in names
            assert (Name(True, "mask_rcnn", "R_50", "3x", arm, n) in names) == (arm != "frozen_bn")
    for backbone in BACKBONES:
        for schedule in SCHEDULES:
            assert Name(False, "mask_rcnn", backbone, schedule, "gn_ws", 2) in names
    assert len(LEAVES) == len(names), "two folders hold a leaf of the same name"


@pytest.mark.parametrize("leaf", LEAVES)
def test_model_is_what_the_name_says(leaf: str) -> None:
    name, model = Name.parse(leaf), load(leaf).MODEL
    resnets = model.RESNETS
    shape = resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP
    assert shape == BACKBONES[name.backbone][:3]
    assert not resnets.STRIDE_IN_1X1
    assert (resnets.NORM, model.FPN.NORM) == NORMS[name.arm][:2]
    builder = "build_ws_" if name.ws else "build_"
    assert name.detector == "retinanet" or not name.towers
    if name.detector == "retinanet":
        assert model.META_ARCHITECTURE == ("WSRetinaNet" if name.towers else "RetinaNet")
        assert model.RETINANET.NORM == (NORMS[name.arm][1] if name.towers else "")
        assert model.BACKBONE.NAME == f"{builder}retinanet_resnet_fpn_backbone"
        return
    panoptic = name.detector == "panoptic"
    assert model.META_ARCHITECTURE == ("PanopticFPN" if panoptic else "GeneralizedRCNN")
    assert model.BACKBONE.NAME == f"{builder}resnet_fpn_backbone"
    assert model.MASK_ON == (name.detector in ("mask_rcnn", "panoptic"))
    box, mask, prefix = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD, "WS" if name.ws else ""
    assert box.NAME == f"{prefix}FastRCNNConvFCHead"
    assert mask.NAME == f"{prefix}MaskRCNNConvUpsampleHead"
    assert (box.NORM, mask.NORM) == NORMS[name.arm][2:]
    assert (box.NUM_CONV, box.CONV_DIM, box.NUM_FC, box.FC_DIM) == (4, 256, 1, 1024)
    assert (mask.NUM_CONV, mask.CONV_DIM) == (4, 256)
    if panoptic:
        head = model.SEM_SEG_HEAD
        assert (head.NAME, head.NORM) == (f"{prefix}SemSegFPNHead", NORMS[name.arm][1])


@pytest.mark.parametrize("leaf", LEAVES)
def test_start_is_what_the_name_says(leaf: str) -> None:
    weights, cfg = Name.parse(leaf).weights, load(leaf)
    assert weights == cfg.MODEL.WEIGHTS
    assert cfg.MODEL.BACKBONE.FREEZE_AT == (2 if weights else 0)
    image = cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    assert image == (BGR_INPUT if weights == FAIR_GN else RGB_INPUT)


@pytest.mark.parametrize("leaf", LEAVES)
def test_schedule_follows_the_linear_rule(leaf: str) -> None:
    name, cfg = Name.parse(leaf), load(leaf)
    iterations, steps, period = SCHEDULES[name.schedule]
    solver = cfg.SOLVER
    images = solver.IMS_PER_BATCH
    assert solver.REFERENCE_WORLD_SIZE == 8
    assert images == 8 * name.images_per_gpu
    assert solver.BASE_LR == LR_OF_16_IMAGES[name.detector] * images / 16
    # as many images until each event as at 16 images per step
    assert solver.MAX_ITER * images == iterations * 16
    assert [step * images for step in solver.STEPS] == [step * 16 for step in steps]
    assert solver.WARMUP_ITERS * images == 1000 * 16
    assert solver.CHECKPOINT_PERIOD * images == period * 16
    # each checkpoint, the last one too, holds precise BN statistics and is evaluated
    assert solver.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD
    assert solver.MAX_ITER % solver.CHECKPOINT_PERIOD == 0
    assert cfg.TEST.PRECISE_BN.ENABLED
    assert cfg.TEST.PRECISE_BN.NUM_ITER * name.images_per_gpu == 400


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
def test_plain_arms_need_stock_detectron2_only(leaf: str) -> None:
    cfg = get_cfg()  # without add_ws_config
    cfg.merge_from_file(str(path_of(leaf)))
    assert "WS" not in cfg.MODEL
    assert not re.search(r"\bWS|build_ws|ws://", cfg.dump())


def test_no_two_leaves_are_the_same_experiment() -> None:
    seen: dict[str, str] = {}
    for leaf in LEAVES:
        text = load(leaf).dump()
        assert text not in seen, f"{leaf} and {seen[text]} are equal after merging"
        seen[text] = leaf


def test_model_zoo_finds_every_leaf() -> None:
    for leaf in LEAVES:
        path = path_of(leaf)
        found = Path(model_zoo.get_config_file(path.relative_to(CONFIGS).as_posix()))
        assert found.read_text() == path.read_text()


def readme_row(leaf: str) -> str:
    """The row of a leaf in the tables of configs/README.md, made from its merged config."""
    starts = {"": "random", TORCHVISION: "torchvision", FAIR_GN: "FAIR GN"}
    solver, weights = load(leaf).SOLVER, load(leaf).MODEL.WEIGHTS
    cells = [
        f"[{leaf}]({path_of(leaf).relative_to(CONFIGS).as_posix()})",
        f"{solver.IMS_PER_BATCH // solver.REFERENCE_WORLD_SIZE}",
        f"{solver.BASE_LR:g}",
        f"{solver.MAX_ITER:,}",
        " and ".join(f"{step:,}" for step in solver.STEPS),
        starts.get(weights, f"`{weights}`"),
    ]
    return f"| {' | '.join(cells)} |"


def test_readme_lists_every_leaf_as_it_is() -> None:
    lines = (CONFIGS / "README.md").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line.startswith("| [")]
    rows = [readme_row(leaf) for leaf in LEAVES]
    missing = "\n".join(row for row in rows if row not in listed)
    assert not missing, f"add or correct these rows in configs/README.md:\n{missing}"
    stale = "\n".join(line for line in listed if line not in rows)
    assert not stale, f"no config is like these rows of configs/README.md:\n{stale}"
    assert len(listed) == len(rows), "configs/README.md lists a config twice"
