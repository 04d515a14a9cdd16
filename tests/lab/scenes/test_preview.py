from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util

from ws_detectron.errors import UserError
from ws_detectron.evaluation.drawing import write_png
from ws_detectron.lab.scenes.dataset import register_scenes
from ws_detectron.lab.scenes.preview import contact_sheet, draw_annotations
from ws_detectron.lab.scenes.scene import SceneSpec

NAME = "scenes_of_the_preview_test"


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[str]:
    spec = SceneSpec(image_size=64, num_images=3, object_scale=(0.3, 0.6))
    register_scenes(NAME, spec, tmp_path)
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_sheet_has_a_cell_per_image_and_the_rest_white(registered: str) -> None:
    records = DatasetCatalog.get(registered)
    sheet = contact_sheet(registered, records, columns=2, cell=100)
    assert sheet.shape == (200, 200, 3) and sheet.dtype == np.uint8
    assert (sheet[100:, 100:] == 255).all()
    for top, left in ((0, 0), (0, 100), (100, 0)):
        assert sheet[top : top + 100, left : left + 100].std() > 5


def test_only_masks_boxes_and_labels_are_coloured(registered: str) -> None:
    record = DatasetCatalog.get(registered)[0]
    drawn = draw_annotations(registered, record, 256).astype(int)
    image = cv2.imread(record["file_name"])[:, :, ::-1].repeat(4, axis=0).repeat(4, axis=1)
    changed = np.abs(drawn - image).max(axis=2) > 8
    near_box = np.zeros((256, 256), dtype=bool)
    covered = np.zeros((256, 256), dtype=bool)
    for annotation in record["annotations"]:
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        mask = mask.repeat(4, axis=0).repeat(4, axis=1)
        assert changed[mask].mean() > 0.8
        covered |= mask
        # labels are within 30 pixels of their box
        x, y, width, height = (int(4 * value) for value in annotation["bbox"])
        near_box[max(y - 30, 0) : y + height + 30, max(x - 30, 0) : x + width + 30] = True
    assert not changed[~near_box].any()
    assert covered.any()


def test_large_images_are_scaled_down(registered: str) -> None:
    record = DatasetCatalog.get(registered)[0]
    assert draw_annotations(registered, record, 32).shape == (32, 32, 3)


def test_pictures_are_written_as_they_are(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    write_png(tmp_path / "new" / "a.png", picture)
    found = cv2.imread(str(tmp_path / "new" / "a.png"))[:, :, ::-1]
    np.testing.assert_array_equal(found, picture)


def test_other_formats_and_unwritable_paths_are_refused(tmp_path: Path) -> None:
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"a\.jpg: .* must end in \.png"):
        write_png(tmp_path / "a.jpg", picture)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "file" / "a.png", picture)
