"""Loader errors name the file, from worker processes too."""

import itertools
import json
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image

from ws_detectron.data.images import read_annotated
from ws_detectron.engine.loaders import NamingMapper, build_test_loader, build_train_loader
from ws_detectron.errors import DataError


def test_loads_what_detectron2_loads(tiny_cfg: CfgNode) -> None:
    batch = next(iter(build_train_loader(tiny_cfg)))
    assert len(batch) == 2 and batch[0]["image"].shape == (3, 64, 64)
    assert len(batch[0]["instances"]) == 1
    files = [
        Path(b[0]["file_name"]).name for b in build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0])
    ]
    assert files == ["1.png", "2.png", "3.png", "4.png"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_unreadable_image_is_named(
    tiny_cfg: CfgNode, tmp_path: Path, damage: str, workers: int
) -> None:
    image = tmp_path / "images" / "3.png"
    content = image.read_bytes()
    image.unlink()
    if damage == "truncated":
        image.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        image.write_text("no image")
    tiny_cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(DataError) as caught:
        list(build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0]))
    message = str(caught.value)
    assert message.startswith((f"cannot read {image}: ", f"cannot read image {image}: "))
    assert "Traceback" not in message


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_mapper_that_fails_keeps_its_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.zeros((8, 8, 3), np.uint8))

    def transform(record: dict) -> dict:
        raise error("a bug of a transform")

    with pytest.raises(error, match="^a bug of a transform$") as caught:
        NamingMapper(transform)({"file_name": str(image)})
    assert caught.traceback[-1].name == "transform"
    assert f"failed on {image}" in caplog.text


def test_image_of_another_size_than_annotated_is_named(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "images" / "2.png"), np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(DataError, match="2.png"):
        list(build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_16_bits_and_turned_ones_are_refused_as_in_drawing(
    tiny_cfg: CfgNode, tmp_path: Path, workers: int
) -> None:
    tiny_cfg.DATALOADER.NUM_WORKERS = workers
    image = tmp_path / "images" / "3.png"
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][2]["height"] = 48
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    for write in (
        lambda: cv2.imwrite(str(image), deep),
        lambda: turned.save(image, format="JPEG", exif=exif),
    ):
        write()
        with pytest.raises(DataError) as drawn:
            read_annotated({"file_name": str(image), "height": 48, "width": 64})
        loaders = (
            build_train_loader(tiny_cfg),
            build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0]),
        )
        for loader in loaders:
            with pytest.raises(DataError) as caught:
                list(itertools.islice(loader, 10))
            assert str(caught.value) == str(drawn.value)


def test_label_maps_of_16_bits_are_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((8, 8, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels.png"), np.full((8, 8), 1000, np.uint16))
    record = {"file_name": "image.png", "sem_seg_file_name": "labels.png"}
    record = {key: str(tmp_path / name) for key, name in record.items()}
    with pytest.raises(DataError, match=r"labels.png: .*more than 8 bits"):
        NamingMapper(lambda record: record)(record)


@pytest.mark.parametrize("workers", [0, 1])
def test_boxes_without_masks_are_no_data_for_a_mask_head(
    tiny_cfg: CfgNode, tmp_path: Path, workers: int
) -> None:
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(content))
    tiny_cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(DataError, match=r"\d.png have boxes and no masks .* MODEL.MASK_ON is True"):
        next(iter(build_train_loader(tiny_cfg)))
    tiny_cfg.MODEL.MASK_ON = False
    assert len(next(iter(build_train_loader(tiny_cfg)))) == 2


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.target}'",)


def test_proposal_file_that_runs_code(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    path, proof = tmp_path / "proposals.pkl", tmp_path / "code_was_run"
    tiny_cfg.MODEL.LOAD_PROPOSALS = True
    name = tiny_cfg.DATASETS.TEST[0]
    tiny_cfg.DATASETS.PROPOSAL_FILES_TRAIN = tiny_cfg.DATASETS.PROPOSAL_FILES_TEST = (str(path),)
    for content in (Payload(proof), {"ids": [1], "boxes": [Payload(proof)]}):
        path.write_bytes(pickle.dumps(content))
        for build in (build_train_loader, lambda cfg: build_test_loader(cfg, name)):
            with pytest.raises(DataError, match="proposals.pkl is refused: it asks for .*system"):
                build(tiny_cfg)
    assert not proof.exists()
    boxes = np.array([[0, 0, 9, 9]], "f4")
    proposals = {
        "ids": [1, 2, 3, 4],
        "boxes": [boxes] * 4,
        "objectness_logits": [np.ones(1, "f4")] * 4,
        "bbox_mode": 0,
    }
    path.write_bytes(pickle.dumps(proposals))
    batch = next(iter(build_test_loader(tiny_cfg, name)))
    assert batch[0]["proposals"].proposal_boxes.tensor.tolist() == [[0, 0, 9, 9]]
