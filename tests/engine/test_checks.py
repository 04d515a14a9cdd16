"""What a user can get wrong is found before a process starts, with path or key in the message."""

import json
import logging
import math
from pathlib import Path
from typing import Optional

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ws_detectron.engine import checks, load_config, loaders
from ws_detectron.engine.checks import Purpose
from ws_detectron.engine.prepare import prepare
from ws_detectron.errors import ConfigError, UserError


def config(*opts: object) -> CfgNode:
    return load_config("", ["MODEL.DEVICE", "cpu", *map(str, opts)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_says_how_to_use_the_cpu() -> None:
    with pytest.raises(ConfigError, match="MODEL.DEVICE cpu"):
        checks.check_device(get_cfg(), 1)


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    checks.check_device(get_cfg(), 2)
    with pytest.raises(UserError, match="--num-gpus is 8, but this machine has 2"):
        checks.check_device(get_cfg(), 8)


def test_no_process_at_all() -> None:
    with pytest.raises(UserError, match="--num-gpus is 0"):
        checks.check_device(config(), 0)


@pytest.mark.parametrize(
    "opts, part",
    [
        (["SOLVER.AMP.ENABLED", True], "SOLVER.AMP.ENABLED"),
        (["MODEL.RESNETS.NORM", "SyncBN"], "MODEL.RESNETS.NORM"),
        (["MODEL.FPN.NORM", "SyncBN"], "MODEL.FPN.NORM"),
        (["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NORM", "SyncBN"], "MODEL.ROI_MASK_HEAD.NORM"),
        (["MODEL.RESNETS.NORM", "nnSyncBN"], "nnSyncBN"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NORM", "SyncBN"], "RETINANET"),
    ],
)
def test_what_runs_on_gpus_only_is_refused_on_the_cpu(opts: list, part: str) -> None:
    checks.check_device(config(), 1)
    with pytest.raises(ConfigError, match=part):
        checks.check_device(config(*opts), 1)


def test_norm_of_a_part_that_the_model_has_not_is_nobodys_business() -> None:
    checks.check_device(config("MODEL.MASK_ON", False, "MODEL.ROI_MASK_HEAD.NORM", "SyncBN"), 1)


def test_missing_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is .*model.pth"):
        checks.check_weights(config("MODEL.WEIGHTS", path))
    path.touch()
    checks.check_weights(config("MODEL.WEIGHTS", path))
    checks.check_weights(config("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"))


@pytest.mark.parametrize(
    "opts, processes, message",
    [
        ("IMS_PER_BATCH 4", 2, None),
        ("IMS_PER_BATCH 0", 2, "SOLVER.IMS_PER_BATCH is 0; allowed: 1 or more"),
        ("IMS_PER_BATCH 3", 2, "SOLVER.IMS_PER_BATCH is 3.* 2 processes"),
        ("IMS_PER_BATCH 12 SOLVER.REFERENCE_WORLD_SIZE 8", 1, "REFERENCE_WORLD_SIZE"),
        ("REFERENCE_IMS_PER_BATCH -1", 1, "REFERENCE_IMS_PER_BATCH is -1"),
        ("IMS_PER_BATCH 8 SOLVER.ACCUMULATE_STEPS 2", 2, None),
        ("IMS_PER_BATCH 8 SOLVER.ACCUMULATE_STEPS 4", 2, None),
        ("IMS_PER_BATCH 8 SOLVER.ACCUMULATE_STEPS 3", 2, "STEPS is 3; .* the 4 image"),
        ("IMS_PER_BATCH 8 SOLVER.ACCUMULATE_STEPS 0", 2, "STEPS is 0; .* the 4 image"),
    ],
)
def test_batch_is_shared_out_equally(opts: str, processes: int, message: Optional[str]) -> None:
    cfg = config(*f"SOLVER.{opts}".split())
    if message is None:
        checks.check_batch(cfg, processes)
        return
    with pytest.raises(ConfigError, match=message):
        checks.check_batch(cfg, processes)


def test_unregistered_data_set_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="coco_2017_trian.*did you mean.*coco_2017_train"):
        checks.check_datasets("DATASETS.TRAIN", ["coco_2017_trian"])


def test_no_training_set() -> None:
    cfg = config("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.WEIGHTS", "")
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        loaders.build_train_loader(cfg)
    prepare(cfg, Purpose.EVALUATE)


def test_missing_folder_says_path_and_variable(coco_set: str, tmp_path: Path) -> None:
    checks.check_datasets("DATASETS.TRAIN", [coco_set])
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(UserError) as caught:
        checks.check_datasets("DATASETS.TRAIN", [coco_set])
    for part in (str(tmp_path / "annotations.json"), "DETECTRON2_DATASETS", "coco/annotations"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "architecture, part",
    [
        ("GeneralizedRCNN", "ROI_HEADS"),
        ("RetinaNet", "RETINANET"),
        ("WSRetinaNet", "RETINANET"),
    ],
)
def test_the_model_has_a_class_for_each_of_the_data(
    coco_set: str, architecture: str, part: str
) -> None:
    MetadataCatalog.get(coco_set).thing_classes = ["square", "circle"]
    cfg = config("DATASETS.TRAIN", f"('{coco_set}',)", f"MODEL.{part}.NUM_CLASSES", 2)
    cfg.MODEL.META_ARCHITECTURE = architecture
    loaders.check_classes(cfg.DATASETS.TRAIN, *checks.number_of_classes(cfg))
    cfg.MODEL[part].NUM_CLASSES = 1
    expected = f"{part}.NUM_CLASSES is 1, but {coco_set} has 2 classes: square, circle"
    with pytest.raises(ConfigError, match=expected):
        loaders.check_classes(cfg.DATASETS.TRAIN, *checks.number_of_classes(cfg))
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"  # its key is not known
    loaders.check_classes(cfg.DATASETS.TRAIN, *checks.number_of_classes(cfg))


def test_other_classes_in_the_test_set_are_warned_of(
    tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    train = "of_other_classes"
    MetadataCatalog.get(train).thing_classes = ["circle", "square"]
    try:
        tiny_cfg.DATASETS.TRAIN = (*tiny_cfg.DATASETS.TEST, train)
        with caplog.at_level(logging.WARNING, logger="ws_detectron"):
            loaders.build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0])
    finally:
        MetadataCatalog.remove(train)
    (record,) = [r for r in caplog.records if r.name.startswith("ws_detectron")]
    assert "classes square (1) and of_other_classes has circle, square (2)" in record.getMessage()


def test_more_classes_than_the_model_has_are_found_before_training(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    with pytest.raises(ConfigError, match="NUM_CLASSES is 0, but .* has 1 classes: square"):
        loaders.build_train_loader(tiny_cfg)


def test_scenes_need_no_file_before_they_are_made() -> None:
    name = "scenes_shapes_800_val"
    assert name in DatasetCatalog.list() and MetadataCatalog.get(name).json_file
    checks.check_datasets("DATASETS.TEST", [name])


def test_classes_alone_need_no_files(coco_set: str, tmp_path: Path) -> None:
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(UserError, match="annotations.json, which does not exist"):
        checks.check_datasets("--dataset", [coco_set])
    checks.check_datasets("--dataset", [coco_set], files=False)


def test_numbers_of_keypoints_are_the_same_everywhere(keypoint_cfg: CfgNode) -> None:
    checks.check_keypoints(keypoint_cfg, train=True)
    (name,) = keypoint_cfg.DATASETS.TEST
    head = keypoint_cfg.MODEL.ROI_KEYPOINT_HEAD
    cases = {
        f"NUM_KEYPOINTS is 17, but {name} .DATASETS.TRAIN. has 2": (17, [0.1] * 17),
        "KEYPOINT_OKS_SIGMAS has 3": (2, [0.1] * 3),
        "KEYPOINT_OKS_SIGMAS .empty: COCO's. has 17": (2, []),
        r"KEYPOINT_OKS_SIGMAS is \[0.1, 0\]; allowed: numbers above 0": (2, [0.1, 0]),
        "KEYPOINT_OKS_SIGMAS is .*nan": (2, [0.1, math.nan]),
        "KEYPOINT_OKS_SIGMAS is .*'a'": (2, [0.1, "a"]),
    }
    for message, (head.NUM_KEYPOINTS, keypoint_cfg.TEST.KEYPOINT_OKS_SIGMAS) in cases.items():
        with pytest.raises(ConfigError, match=message):
            prepare(keypoint_cfg)
    with pytest.raises(ConfigError, match="KEYPOINT_OKS_SIGMAS is"):
        prepare(keypoint_cfg, Purpose.EVALUATE)
    keypoint_cfg.MODEL.KEYPOINT_ON, keypoint_cfg.MODEL.MASK_ON = False, False
    prepare(keypoint_cfg)


def test_keypoints_of_sets_are_in_one_order(
    keypoint_cfg: CfgNode, tmp_path: Path, coco_set: str
) -> None:
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["categories"][0]["keypoints"].reverse()
    (tmp_path / "other.json").write_text(json.dumps(content))
    name = f"{coco_set}_other"
    register_coco_instances(name, {}, str(tmp_path / "other.json"), str(tmp_path / "images"))
    for key in ("TRAIN", "TEST"):
        with_other = keypoint_cfg.clone()
        with_other.DATASETS[key] = (coco_set, name)
        with pytest.raises(ConfigError, match=f"those of {name} .*in the same order"):
            checks.check_keypoints(with_other, train=True)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_keypoints_of_sets_without_a_file_are_in_their_metadata(keypoint_cfg: CfgNode) -> None:
    name = "keypoints_without_a_file"
    DatasetCatalog.register(name, list)
    keypoint_cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(ConfigError, match=f"{name}, which has no annotation file; its metadata"):
        checks.check_keypoints(keypoint_cfg, train=True)
    MetadataCatalog.get(name).keypoint_names = ["left end", "right end"]
    checks.check_keypoints(keypoint_cfg, train=True)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["left end", "right end"], None),
        (["head", "tail"], "head, tail"),
        (["left end", "tail"], "left end, tail"),
    ],
)
def test_keypoints_that_a_flip_would_mix_up_are_warned_of(
    keypoint_cfg: CfgNode,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    warned: str,
) -> None:
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["categories"][0]["keypoints"] = names
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    for flip in ("horizontal", "none"):
        keypoint_cfg.INPUT.RANDOM_FLIP = flip
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ws_detectron"):
            checks.check_keypoints(keypoint_cfg, train=True)
        found = [r.getMessage() for r in caplog.records if "RANDOM_FLIP" in r.getMessage()]
        assert len(found) == (warned is not None and flip == "horizontal")
        assert not found or warned in found[0]
