import csv
import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from small_coco import prediction, rle

from ws_detectron.data.preview import write_png
from ws_detectron.errors import UserError
from ws_detectron.evaluation.drawing import records_by_id
from ws_detectron.evaluation.error_kinds import CORRECT, MISSED
from ws_detectron.evaluation.inputs import open_video, read_frames
from ws_detectron.evaluation.visualize import LEAST_SIDE, visualize_dataset, visualize_inputs

BOXES = [(10, 10, 30, 20), (60, 20, 40, 40), (15, 60, 20, 30)]
# image 1: all found; image 2: half; image 3: nothing
FOUND = [prediction(1, 1, BOXES[0], 0.9), prediction(2, 1, BOXES[0], 0.9)]


def test_a_data_set_is_drawn_and_judged(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = visualize_dataset(dataset, FOUND, output, num_images=1, each=True)
    assert f"{CORRECT} 2" in summary and f"{MISSED} 4" in summary
    rows = list(csv.DictReader((output / "image_ap.csv").read_text().splitlines()))
    assert [row["image_id"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["AP"]) == pytest.approx(100)
    assert float(rows[1]["AP"]) == pytest.approx(100 * 51 / 101, abs=1e-3)
    errors = json.loads((output / "errors.json").read_text())
    assert errors["task"] == "segm" and errors["counts"][MISSED] == 4
    assert (output / "errors.svg").is_file() and cv2.imread(str(output / "errors.png")) is not None

    pictures = {name: cv2.imread(str(output / f"{name}.png")) for name in ("best", "worst")}
    each = [cv2.imread(str(output / "images" / f"{n}.png")) for n in (1, 2, 3)]
    np.testing.assert_array_equal(pictures["best"], each[0])
    np.testing.assert_array_equal(pictures["worst"], each[2])
    np.testing.assert_array_equal(cv2.imread(str(output / "first.png")), each[0])


def test_boxes_alone_can_be_drawn(dataset: str, tmp_path: Path) -> None:
    boxes = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in FOUND]
    visualize_dataset(dataset, boxes, tmp_path, num_images=2)
    assert json.loads((tmp_path / "errors.json").read_text())["task"] == "bbox"


def test_images_that_cannot_be_read_are_passed_over(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(records_by_id(dataset)[1]["file_name"])
    path.write_bytes(path.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        visualize_dataset(dataset, FOUND, tmp_path / "out", num_images=2, each=True)
    assert f"passed over: cannot read image {path}" in caplog.text
    # the sheets are filled with others
    assert cv2.imread(str(tmp_path / "out" / "best.png")) is not None
    assert {p.name for p in (tmp_path / "out" / "images").iterdir()} == {"2.png", "3.png"}


def find_bright(image: np.ndarray) -> list[dict]:
    """Stands in for a model: one object on the bright pixels, and a doubtful one elsewhere."""
    rows, columns = np.nonzero(image[:, :, 0] > 150)
    box = (int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
    entries = [prediction(0, 1, box, 0.8), prediction(0, 2, (0, 0, 5, 5), 0.2)]
    for entry in entries:
        entry["segmentation"] = rle(entry["bbox"], *image.shape[:2])
    return entries


def with_square(left: int) -> np.ndarray:
    image = np.full((60, 80, 3), 60, np.uint8)
    image[20:40, left : left + 20] = (200, 0, 0)
    return image


def test_images_and_videos_are_drawn_and_broken_ones_reported(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records_by_id(dataset)  # gives the metadata its class names
    inputs = tmp_path / "in"
    write_png(inputs / "a.png", with_square(10))
    (inputs / "broken.png").write_bytes((inputs / "a.png").read_bytes()[:80])
    (inputs / "broken.mp4").write_text("no video")
    with open_video(inputs / "clip.avi", 4.0) as append:
        for left in (10, 30, 50):
            append(with_square(left))
    metadata = MetadataCatalog.get(dataset)
    with caplog.at_level(logging.WARNING):
        summary = visualize_inputs([str(inputs)], tmp_path / "out", find_bright, metadata)
    assert "drawn 2 of 4 files; 2 could not be read" in summary
    for name in ("broken.png", "broken.mp4"):
        assert f"{inputs / name}" in caplog.text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "clip.mp4"}

    drawn = cv2.imread(str(tmp_path / "out" / "a.png"))[:, :, ::-1].astype(int)
    assert drawn.shape == (LEAST_SIDE * 60 // 80, LEAST_SIDE, 3)
    plain = cv2.resize(with_square(10), drawn.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    changed = np.abs(drawn - plain).max(axis=2) > 10
    assert changed[150:200, 70:150].all() and not changed[250:].any()
    assert not changed[:80, :40].any()  # the doubtful object is below the threshold

    rate, frames = read_frames(tmp_path / "out" / "clip.mp4")
    frames = list(frames)
    assert rate == pytest.approx(4) and len(frames) == 3
    green = [frame[:, :, 1].astype(int) for frame in frames]  # the colour of the first class
    centres = [np.nonzero((g > 110).sum(axis=0) > 60)[0].mean() / 5.6 for g in green]
    np.testing.assert_allclose(centres, [20, 40, 60], atol=4)


def test_a_video_goes_into_a_video(dataset: str, tmp_path: Path) -> None:
    records_by_id(dataset)
    with open_video(tmp_path / "clip.avi", 4.0) as append:
        append(with_square(10))
    write_png(tmp_path / "a.png", with_square(10))
    metadata = MetadataCatalog.get(dataset)
    output = tmp_path / "out.mkv"
    visualize_inputs([str(tmp_path / "clip.avi")], output, find_bright, metadata)
    assert len(list(read_frames(output)[1])) == 1
    for arguments in (["a.png"], ["clip.avi", "out.mkv"]):
        paths = [str(tmp_path / name) for name in arguments]
        with pytest.raises(UserError, match="must be a single video"):
            visualize_inputs(paths, tmp_path / "new.mp4", find_bright, metadata)


def test_nothing_readable_is_an_error(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="none of the 1 files could be read"):
        visualize_inputs(
            [str(tmp_path / "a.png")], tmp_path / "out", find_bright, MetadataCatalog.get(dataset)
        )
