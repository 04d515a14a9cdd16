import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from small_coco import HEIGHT, WIDTH, prediction

from ws_detectron.errors import ConfigError, DataError, UserError
from ws_detectron.evaluation.drawing import (
    CAPTION_HEIGHT,
    CROWD_COLOUR,
    MARGIN,
    PAIR_MARGIN,
    annotated_objects,
    by_image_id,
    captioned,
    class_colour,
    draw_sheet,
    pair,
    predicted_objects,
    records_by_id,
    tile,
)

SIDE = 240  # twice the size of the images
BOX = (60, 20, 40, 40)


def test_ground_truth_has_classes_masks_and_crowds(dataset: str, tmp_path: Path) -> None:
    records = records_by_id(dataset, tmp_path)
    objects = annotated_objects(records[3], MetadataCatalog.get(dataset))
    assert objects.labels == ["class 1", "class 2", "class 3", "class 1 (crowd)"]
    assert objects.colours[3] == CROWD_COLOUR and objects.colours[0] == class_colour(0)
    np.testing.assert_array_equal(objects.boxes[1], [60, 20, 100, 60])
    for mask, area in zip(objects.masks, (600, 1600, 600, 750)):
        assert mask.shape == (HEIGHT, WIDTH) and mask.sum() == area


def test_predictions_have_classes_scores_and_the_colours_of_the_truth(
    dataset: str, tmp_path: Path
) -> None:
    metadata = MetadataCatalog.get(dataset)
    records_by_id(dataset, tmp_path)
    only_mask = prediction(1, 3, BOX, 0.456)
    del only_mask["bbox"]
    only_box = prediction(1, 1, BOX, 0.9)
    del only_box["segmentation"]
    objects = predicted_objects([only_mask, only_box], metadata)
    assert objects.labels == ["class 3 46", "class 1 90"]
    assert objects.colours == [class_colour(2), class_colour(0)]
    np.testing.assert_array_equal(objects.boxes, [[60, 20, 100, 60]] * 2)
    assert objects.masks[0].sum() == 1600 and objects.masks[1] is None
    with pytest.raises(DataError, match=f"category id 9, which data set {dataset}"):
        predicted_objects([prediction(1, 9, BOX, 0.5)], metadata)


def test_predictions_are_grouped_by_image_from_a_score_on() -> None:
    found = [prediction(n, 1, BOX, score) for score in (0.3, 0.5, 0.7) for n in (1, 2)]
    grouped = by_image_id(found, 0.5)
    assert {n: [entry["score"] for entry in grouped[n]] for n in (1, 2, 3)} == {
        1: [0.5, 0.7],
        2: [0.5, 0.7],
        3: [],
    }


def test_class_colours_are_bright_and_differ() -> None:
    colours = np.array([class_colour(n) for n in range(10)])
    assert (colours.max(axis=1) == 1).all()
    apart = np.abs(colours[:, None] - colours[None]).max(axis=2) + np.eye(10)
    assert apart.min() > 0.15


def test_a_pair_shows_truth_left_and_predictions_right(dataset: str, tmp_path: Path) -> None:
    metadata, record = MetadataCatalog.get(dataset), records_by_id(dataset, tmp_path)[1]
    found = [prediction(1, 2, BOX, 0.9)]
    picture = pair(record, found, metadata, note="note", longer_side=SIDE).astype(int)
    empty = pair({**record, "annotations": []}, [], metadata, note="note", longer_side=SIDE)
    changed = np.abs(picture - empty)[CAPTION_HEIGHT:].max(axis=2) > 10
    left, right = changed[:, : SIDE + MARGIN], changed[:, SIDE + MARGIN :]
    # masks, twice the size, inside of their boxes: (10, 10, 30, 20) and (60, 20, 40, 40)
    assert left[30:55, 30 + MARGIN : 75 + MARGIN].all()
    assert right[60:115, 130 + MARGIN : 195 + MARGIN].all()
    # and away from them and their labels nothing
    assert not left[90:].any() and not left[:, 150:].any()
    assert not right[:, : 110 + MARGIN].any() and not right[130:].any()


def test_captions_say_how_many_and_are_cut_where_too_long() -> None:
    white = np.full((20, 100, 3), 255, np.uint8)
    short, long = (captioned(white, text, 100, 20) for text in ("a", "a" * 300))
    assert short.shape == long.shape == (20 + CAPTION_HEIGHT + MARGIN, 100 + MARGIN, 3)
    assert (short < 128).any() and (long < 128).sum() > (short < 128).sum()
    # no letter is cut through at the right edge
    assert (long[:, -3:] == 255).all()


def test_tiles_stand_row_by_row() -> None:
    cells = [np.full((height, 5, 3), n, np.uint8) for n, height in enumerate((4, 6, 3))]
    sheet = tile(cells, columns=2)
    assert sheet.shape == (6 + 3, 10, 3)
    assert (sheet[:4, :5] == 0).all() and (sheet[4:6, :5] == 255).all()
    assert (sheet[:6, 5:] == 1).all()
    assert (sheet[6:, :5] == 2).all() and (sheet[6:, 5:] == 255).all()
    assert tile(cells[:1], columns=2).shape == (4, 5, 3)


def test_a_sheet_is_drawn_from_a_results_file(dataset: str, tmp_path: Path) -> None:
    path, output = tmp_path / "predictions.json", tmp_path / "new" / "sheet.png"
    entries = [prediction(n, 2, BOX, score) for n in (1, 2, 3) for score in (0.9, 0.3)]
    path.write_text(json.dumps(entries))
    draw_sheet(dataset, str(path), str(output), num_images=3)
    sheet = cv2.imread(str(output))[:, :, ::-1]
    width = 2 * (448 + MARGIN) + PAIR_MARGIN
    height = round(448 * HEIGHT / WIDTH) + CAPTION_HEIGHT + MARGIN
    assert sheet.shape == (2 * height, 2 * width, 3)
    draw_sheet(dataset, str(path), str(output), image_ids=[2])
    second = cv2.imread(str(output))[:, :, ::-1]
    np.testing.assert_array_equal(second, sheet[:height, width:])
    draw_sheet(dataset, str(path), str(output), image_ids=[2], score_threshold=0.95)
    assert not np.array_equal(second, cv2.imread(str(output))[:, :, ::-1])


def test_sheets_of_what_does_not_fit_are_refused(dataset: str, tmp_path: Path) -> None:
    path, output = tmp_path / "predictions.json", str(tmp_path / "sheet.png")
    path.write_text(json.dumps([prediction(1, 1, BOX, 0.9)]))
    with pytest.raises(ConfigError, match="'no_set' is not a registered data set"):
        draw_sheet("no_set", str(path), output)
    with pytest.raises(UserError, match=r"no image ids \[9\]"):
        draw_sheet(dataset, str(path), output, image_ids=[1, 9])
    broken = prediction(1, 1, BOX, 0.9)
    broken["segmentation"]["counts"] = "5"
    path.write_text(json.dumps([broken]))
    with pytest.raises(DataError, match="malformed RLE"):
        draw_sheet(dataset, str(path), output)
    path.write_text("[]")
    records = records_by_id(dataset, tmp_path)
    Path(records[2]["file_name"]).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read image .*2\.png"):
        draw_sheet(dataset, str(path), output)
    assert not Path(output).exists()
