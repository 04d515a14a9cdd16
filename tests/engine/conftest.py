"""A COCO-format data set and a Mask R-CNN small enough for a training step in a test."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ws_detectron.engine import load_config

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "quickstart" / "mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
_counter = itertools.count()


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A run sets up logging to the screen and to its folder, which other tests must not see."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "ws_detectron")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


@pytest.fixture
def coco_set(tmp_path: Path) -> Iterator[str]:
    """Name of a registered set of four 64-pixel images with one square each."""
    images, annotations = [], []
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(1, 5):
        image = np.full((64, 64, 3), 40 * i, np.uint8)
        image[16:48, 8 * i : 8 * i + 24] = 255
        cv2.imwrite(str(folder / f"{i}.png"), image)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
        box = [8 * i, 16, 24, 32]
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "bbox": box,
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [polygon],
            }
        )
    path = tmp_path / "annotations.json"
    categories = [{"id": 1, "name": "square"}]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    name = f"engine_test_{next(_counter)}"
    register_coco_instances(name, {}, str(path), str(folder))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def tiny_cfg(coco_set: str, tmp_path: Path) -> CfgNode:
    """The quick-start model at 64 pixels, for two iterations on `coco_set`."""
    cfg = load_config(str(BASE))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco_set,)
    cfg.INPUT.MASK_FORMAT = "polygon"
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    cfg.SOLVER.BASE_LR = 0.001
    cfg.TEST.EXPECTED_RESULTS = []
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    return cfg


@pytest.fixture
def keypoint_cfg(tiny_cfg: CfgNode, tmp_path: Path) -> CfgNode:
    """`tiny_cfg` with keypoints instead of masks: the left and right end of each square."""
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["categories"][0]["keypoints"] = ["left end", "right end"]
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        middle = y + height // 2
        annotation["keypoints"] = [x, middle, 2, x + width - 1, middle, 2]
        annotation["num_keypoints"] = 2
        del annotation["segmentation"]
    path.write_text(json.dumps(content))
    cfg = tiny_cfg
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [16]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    return cfg
