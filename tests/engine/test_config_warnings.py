"""Each warning is given where it belongs, with its remedy, and nowhere else."""

import logging

import pytest
from detectron2.config import CfgNode

from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.checks import find_warnings
from ws_detectron.model_zoo import config_names

COCO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_{}.yaml"
SCRATCH = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_{}.yaml"


def warned(name: str, *opts: object, world_size: int = 8) -> list[str]:
    return find_warnings(load_config(name, [*map(str, opts)]), world_size, images=0)


@pytest.mark.parametrize("variant", ["gn_ws", "gn", "sync_bn", "frozen_bn"])
def test_sound_configs_are_quiet(variant: str) -> None:
    for images in (1, 2, 8):
        assert warned(COCO.format(f"{variant}_{images}img")) == []


@pytest.mark.parametrize("images, found", [(1, 1), (2, 1), (8, 0)])
def test_trainable_bn_on_one_or_two_images(images: int, found: int) -> None:
    for name in (COCO, SCRATCH):
        got = warned(name.format(f"bn_{images}img"))
        assert len(got) == found
    if found:
        for part in ("MODEL.ROI_MASK_HEAD.NORM", f"{images} image", "GN", "SyncBN", "FrozenBN"):
            assert part in got[0]


def test_sync_bn_of_one_process_is_bn() -> None:
    options = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.0025]
    (text,) = warned(COCO.format("sync_bn_2img"), *options, world_size=1)
    assert "MODEL.RESNETS.NORM" in text and "2 image(s)" in text


def test_accumulation_does_not_hide_it() -> None:
    name = COCO.format("bn_8img")
    assert warned(name) == []
    (text,) = warned(name, "SOLVER.ACCUMULATE_STEPS", 4)
    assert "2 image(s)" in text and "4 parts" in text


def test_only_norms_that_the_model_has_count() -> None:
    retinanet = "COCO-Detection/retinanet_R_50_FPN_1x_gn_ws_1img.yaml"
    assert (
        warned(retinanet, "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN") == []
    )
    faster = "COCO-Detection/faster_rcnn_R_50_FPN_1x_gn_ws_1img.yaml"
    assert warned(faster, "MODEL.ROI_MASK_HEAD.NORM", "BN") == []
    assert len(warned(faster, "MODEL.ROI_BOX_HEAD.NORM", "BN")) == 1


def test_frozen_stages_without_weights() -> None:
    (text,) = warned(COCO.format("gn_ws_1img"), "MODEL.WEIGHTS", "")
    assert "FREEZE_AT is 2" in text and "MODEL.BACKBONE.FREEZE_AT 0" in text
    assert warned(SCRATCH.format("gn_ws_1img")) == []


def test_frozen_bn_without_weights() -> None:
    got = warned(COCO.format("frozen_bn_2img"), "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0)
    (text,) = got
    assert "MODEL.RESNETS.NORM" in text and "mean 0 and variance 1" in text and "GN" in text


@pytest.mark.parametrize(
    "lr, batch, part",
    [
        (0.02, 16, ""),
        (0.04, 16, ""),  # twice the rule: tuning
        (0.02, 4, "4 times"),  # a smaller batch, with the LR unchanged
        (0.02, 2, "8 times"),
        (0.0005, 16, "1/40 of"),
        (0.01, 8, ""),
        (0.0, 8, ""),  # a dry run
    ],
)
def test_lr_far_off_the_linear_rule(lr: float, batch: int, part: str) -> None:
    opts = ["SOLVER.BASE_LR", lr, "SOLVER.IMS_PER_BATCH", batch]
    got = warned(SCRATCH.format("gn_ws_2img"), *opts, world_size=1)
    assert len(got) == bool(part)
    if part:
        assert part in got[0] and f"{0.02 * batch / 16:g}" in got[0]
        assert "SOLVER.REFERENCE_IMS_PER_BATCH" in got[0]
        stated = [*opts, "SOLVER.REFERENCE_IMS_PER_BATCH", batch]
        assert warned(SCRATCH.format("gn_ws_2img"), *stated, world_size=1) == []


def test_ws_settings_that_nothing_reads() -> None:
    changed = ["MODEL.WS.GN_GROUPS", 16, "MODEL.WS.MODE", "bit"]
    (text,) = warned(COCO.format("gn_1img"), *changed)
    assert "MODEL.WS.MODE bit, MODEL.WS.GN_GROUPS 16: without effect" in text
    assert "MODEL.BACKBONE.NAME build_resnet_fpn_backbone, MODEL.ROI_BOX_HEAD.NAME" in text
    assert warned(COCO.format("gn_ws_1img"), *changed) == []
    head = ["MODEL.ROI_MASK_HEAD.NAME", "WSMaskRCNNConvUpsampleHead"]
    assert warned(COCO.format("gn_1img"), *changed, *head) == []
    for reader in (
        ["MODEL.META_ARCHITECTURE", "WSRetinaNet"],
        ["MODEL.SEM_SEG_HEAD.NAME", "WSSemSegFPNHead"],
    ):
        assert warned(COCO.format("gn_1img"), *changed, *reader) == []
    for key in ("BACKBONE.NAME", "META_ARCHITECTURE", "ROI_HEADS.NAME"):
        of_somebody = [f"MODEL.{key}", "Mine"]
        assert warned(COCO.format("gn_1img"), *changed, *of_somebody) == []


def test_a_model_with_more_classes_than_the_data() -> None:
    name = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"  # six classes
    (text,) = warned(name, "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    for part in ("is 80", "scenes_shapes_128_train has 6", "set MODEL.ROI_HEADS.NUM_CLASSES 6"):
        assert part in text, text
    of_somebody = ["MODEL.META_ARCHITECTURE", "Mine"]
    assert warned(name, "MODEL.ROI_HEADS.NUM_CLASSES", 80, *of_somebody) == []


@pytest.mark.parametrize(
    "iterations, period, part",
    [
        (60 * 1000 // 4, 100, ""),  # a thousand epochs
        (60 * 1000 // 4 + 1, 100, "set SOLVER.EPOCHS 100"),
        (1000, 1000, ""),
        (1000, 0, ""),
        (1000, 1001, "lower TEST.EVAL_PERIOD"),
    ],
)
def test_a_schedule_of_another_data_set(iterations: int, period: int, part: str) -> None:
    opts = ["SOLVER.MAX_ITER", iterations, "TEST.EVAL_PERIOD", period]
    cfg = load_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml", [*map(str, opts)])
    found = find_warnings(cfg, world_size=1, images=60)
    assert len(found) == bool(part) and part in "".join(found)


def test_every_coco_config_but_small_bn_is_quiet() -> None:
    for name in config_names():
        if name.startswith("COCO-"):
            loud = "_bn_1img" in name or "_bn_2img" in name or "_bn_ws_" in name
            loud = loud and "frozen" not in name and "sync" not in name and "8img" not in name
            assert bool(warned(name)) == loud, name


def test_quickstart_configs_are_quiet_or_about_bn() -> None:
    for name in config_names():
        if name.startswith("quickstart/mask_rcnn"):
            loud = "_bn_1img" in name or "_bn_ws_1img" in name
            assert len(warned(name, world_size=1)) == loud, name


def test_trainer_warns(tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    tiny_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        Trainer(tiny_cfg)
    assert any("would stay random" in record.getMessage() for record in caplog.records)
