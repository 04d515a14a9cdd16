"""A registered data set of three images with ground truth drawn into them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from small_coco import HEIGHT, WIDTH, annotations

_counter = itertools.count()


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    """Its name; image n has n bright rectangles on grey, and image 3 a crowd."""
    boxes = [(10, 10, 30, 20), (60, 20, 40, 40), (15, 60, 20, 30)]
    objects = [(n, 1 + i, boxes[i]) for n in (1, 2, 3) for i in range(n)]
    truth = annotations(objects, crowds=[(3, 1, (80, 70, 30, 25))], images=3)
    folder = tmp_path / "images"
    folder.mkdir()
    for image in truth["images"]:
        picture = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        for annotation in truth["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, width, height = annotation["bbox"]
                picture[y : y + height, x : x + width] = 200
        cv2.imwrite(str(folder / image["file_name"]), picture)
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    name = f"evaluation_test_{next(_counter)}"
    register_coco_instances(name, {}, str(tmp_path / "annotations.json"), str(folder))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
