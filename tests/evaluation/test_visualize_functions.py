import csv
import json
import logging
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from small_coco import HEIGHT, WIDTH, prediction, rle

from ws_detectron.errors import DataError, UserError
from ws_detectron.evaluation import visualize
from ws_detectron.evaluation.drawing import (
    FALSE,
    HEAD_HEIGHT,
    MISSED_OBJECT,
    NOT_EVALUATED,
    SIDE,
    TRUE,
)
from ws_detectron.evaluation.image_errors import CORRECT, MISSED
from ws_detectron.evaluation.inputs import read_video, write_image, write_video
from ws_detectron.evaluation.visualize import Drawing, visualize_dataset, visualize_inputs

BOXES = [(10, 10, 30, 20), (60, 20, 40, 40), (15, 60, 20, 30)]
CLASSES = {1: "class 1", 2: "class 2"}
# image 1: all found; image 2: half; image 3: nothing
FOUND = [prediction(1, 1, BOXES[0], 0.9), prediction(2, 1, BOXES[0], 0.9)]


def test_a_data_set_is_drawn_and_evaluated(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = visualize_dataset(dataset, FOUND, output, num_images=1, each=True)
    assert f"{CORRECT} 2" in summary and f"{MISSED} 4" in summary
    rows = list(csv.DictReader((output / "image_ap.csv").read_text().splitlines()))
    assert [row["image_id"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["AP"]) == pytest.approx(100)
    assert float(rows[1]["AP"]) == pytest.approx(100 * 51 / 101, abs=1e-3)
    errors = json.loads((output / "errors.json").read_text())
    assert errors["task"] == "segm" and errors["counts"][MISSED] == 4
    assert cv2.imread(str(output / "errors.png")) is not None and not list(output.glob("*.svg"))

    each = [below_the_title(output / "images" / f"{n}.png") for n in (1, 2, 3)]
    for name, number in (("best", 0), ("worst", 2), ("first", 0)):
        np.testing.assert_array_equal(below_the_title(output / f"{name}.png"), each[number])


def below_the_title(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[HEAD_HEIGHT:]


def test_captions_and_marks_say_what_is_found(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image 3 has three objects and a crowd: one is found, one prediction is false."""
    found = [
        prediction(3, 1, BOXES[0], 0.9),
        prediction(3, 3, BOXES[1], 0.8),
        prediction(3, 1, (82, 72, 9, 9), 0.7),  # on the crowd
        prediction(3, 1, BOXES[0], 0.2),  # below the threshold
        prediction(1, 2, (60, 60, 20, 20), 0.9),
    ]
    sheets, marks = {}, []

    def sheet(pairs: list, title: str) -> np.ndarray:
        sheets[title] = pairs
        return np.zeros((9, 9, 3), np.uint8)

    def entries(image: np.ndarray, *given: object) -> np.ndarray:
        marks.append(given[-1])
        return image

    monkeypatch.setattr(visualize, "contact_sheet", sheet)
    monkeypatch.setattr(visualize, "draw_entries", entries)
    visualize_dataset(dataset, found, tmp_path, num_images=3)
    title, *_ = sheets
    assert title == f"{dataset}, first images: masks matched at IoU ≥ 0.5, score ≥ 50 %"
    (one, alone), _, (truth, predicted) = sheets[title]
    assert one[1] == "1.png: 1 object\n0 found, 1 not found"
    assert alone[1] == "1 of 1 prediction drawn, score ≥ 50 %\n0 correct, 1 false; AP of all 0"
    assert truth[1] == "3.png: 3 objects\n1 found, 2 not found, 1 crowd"
    lines = predicted[1].split("\n")
    assert lines[0] == "3 of 4 predictions drawn, score ≥ 50 %"
    assert lines[1].startswith("1 correct, 1 false; AP of all ")
    assert marks[4:6] == [
        [TRUE, MISSED_OBJECT, MISSED_OBJECT, NOT_EVALUATED],
        [TRUE, FALSE, NOT_EVALUATED],
    ]


def test_predictions_without_masks_are_drawn(dataset: str, tmp_path: Path) -> None:
    boxes = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in FOUND]
    visualize_dataset(dataset, boxes, tmp_path, num_images=2)
    assert json.loads((tmp_path / "errors.json").read_text())["task"] == "bbox"


def test_one_prediction_without_a_mask_leaves_boxes_to_be_asked_for(
    dataset: str, tmp_path: Path
) -> None:
    found = [FOUND[0], {k: v for k, v in FOUND[1].items() if k != "segmentation"}]
    with pytest.raises(DataError, match="segm needs masks everywhere: entry 1 .*--task bbox"):
        visualize_dataset(dataset, found, tmp_path / "out")
    summary = visualize_dataset(dataset, found, tmp_path / "out", task="bbox")
    assert summary.startswith("Box predictions")


@pytest.mark.parametrize("change", ["rotated", "resized", "deep", "cut off", "missing"])
def test_images_that_cannot_be_read_or_differ_are_skipped_and_named(
    change: str, dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "images" / "1.png"
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    if change == "rotated":  # AP would be 100, with masks stretched over the upright image
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(pixels).save(path, format="JPEG", exif=exif)
    elif change == "resized":
        cv2.imwrite(str(path), pixels[:50])
    elif change == "cut off":
        path.write_bytes(path.read_bytes()[:50])
    elif change == "missing":
        path.unlink()
    else:
        cv2.imwrite(str(path), np.full((HEIGHT, WIDTH), 1000, np.uint16))
    with caplog.at_level(logging.WARNING):
        summary = visualize_dataset(dataset, FOUND, tmp_path / "out", num_images=1, each=True)
    assert summary.endswith(f"\n1 could not be read and were skipped: {path}")
    reason = {"rotated": "EXIF", "resized": "correct the annotations", "deep": "more than 8 bits"}
    # once, though it is on two sheets; these are filled with other images
    assert caplog.text.count("skipped: ") == 1
    assert str(path) in caplog.text and reason.get(change, "cannot read") in caplog.text
    assert {p.name for p in (tmp_path / "out" / "images").iterdir()} == {"2.png", "3.png"}
    second = below_the_title(tmp_path / "out" / "images" / "2.png")
    np.testing.assert_array_equal(below_the_title(tmp_path / "out" / "best.png"), second)


def test_a_data_set_is_not_written_over(dataset: str, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = content()
    with pytest.raises(UserError, match=r"images/1.png is an input"):
        visualize_dataset(dataset, FOUND, tmp_path, each=True)
    with pytest.raises(UserError, match=r"/images is an input"):
        visualize_dataset(dataset, FOUND, tmp_path / "images")
    (tmp_path / "errors.json").symlink_to(tmp_path / "annotations.json")
    with pytest.raises(UserError, match=r"errors.json is an input \(.*annotations.json\)"):
        visualize_dataset(dataset, FOUND, tmp_path)
    (tmp_path / "errors.json").unlink()
    (tmp_path / "image_ap.csv").write_text(json.dumps(FOUND))
    mine = str(tmp_path / "image_ap.csv")
    with pytest.raises(UserError, match=r"image_ap.csv is an input"):
        visualize_dataset(dataset, FOUND, tmp_path, predictions_name=mine)
    (tmp_path / "image_ap.csv").unlink()
    assert content() == before


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
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = tmp_path / "in"
    write_image(inputs / "a.png", with_square(10))
    (inputs / "broken.png").write_bytes((inputs / "a.png").read_bytes()[:80])
    (inputs / "broken.mp4").write_text("no video")
    write_video(inputs / "clip.avi", 4.0, map(with_square, (10, 30, 50)))
    with caplog.at_level(logging.WARNING):
        summary = visualize_inputs(
            [str(inputs)], tmp_path / "out", Drawing(lambda: find_bright, CLASSES, longer_side=SIDE)
        )
    assert summary.startswith("drawn 2 of 4 files: ")
    assert "\n4 detections in 4 images (score ≥ 50 %), " in summary
    skipped = ", ".join(str(inputs / name) for name in ("broken.mp4", "broken.png"))
    assert summary.endswith(f"\n2 could not be read and were skipped: {skipped}")
    for name in ("broken.png", "broken.mp4"):
        assert f"{inputs / name}" in caplog.text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "clip.mp4"}

    drawn = cv2.imread(str(tmp_path / "out" / "a.png"))[:, :, ::-1].astype(int)
    assert drawn.shape == (SIDE * 60 // 80, SIDE, 3)
    plain = cv2.resize(with_square(10), drawn.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    changed = np.abs(drawn - plain).max(axis=2) > 10
    assert changed[150:200, 70:150].all() and not changed[250:].any()
    assert not changed[:80, :40].any()  # the doubtful object is below the threshold

    rate, _, frames = read_video(tmp_path / "out" / "clip.mp4")
    frames = list(frames)
    assert rate == pytest.approx(4) and len(frames) == 3
    green = [frame[:, :, 1].astype(int) for frame in frames]  # the colour of the first class
    centres = [np.nonzero((g > 110).sum(axis=0) > 60)[0].mean() / 5.6 for g in green]
    np.testing.assert_allclose(centres, [20, 40, 60], atol=4)


def place_of(picture: np.ndarray) -> np.ndarray:
    """x, y of the middle of the box of the only object, which is bright green."""
    green = picture[:, :, 1].astype(int) - picture[:, :, 2]
    return np.array([np.nonzero((green > 60).any(axis=axis))[0].mean() for axis in (0, 1)])


def with_low_square() -> np.ndarray:
    """Taller than wide; the square is at (20, 75) and covers 20 x 20 pixels."""
    image = np.full((100, 61, 3), 60, np.uint8)
    image[65:85, 10:30] = (200, 0, 0)
    return image


def test_drawings_have_the_orientation_of_the_input(tmp_path: Path) -> None:
    """Also of a photo and an animation of a phone that is held upright; five times its size."""
    upright, inputs = Image.fromarray(with_low_square()), tmp_path / "in"
    inputs.mkdir()
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(inputs / "a.png", exif=exif)
    upright.save(inputs / "b.gif", save_all=True, append_images=[Image.new("RGB", (61, 100))])
    upright.save(inputs / "c.gif")
    (inputs / "broken.gif").write_text("GIF89a")

    def find(image: np.ndarray) -> list[dict]:
        return find_bright(image)[:1] if image.max() > 150 else []

    draw = Drawing(lambda: find, CLASSES, longer_side=500)
    summary = visualize_inputs([str(inputs)], tmp_path / "out", draw)
    assert summary.startswith("drawn 3 of 4 files") and "\n3 detections in 4 images" in summary
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "b.mp4", "c.png"}
    first, second = read_video(tmp_path / "out" / "b.mp4")[2]
    assert first.shape == (500, 304, 3) and second.mean() < 10  # codecs want even sizes
    pictures = [cv2.imread(str(tmp_path / "out" / name))[:, :, ::-1] for name in ("a.png", "c.png")]
    for picture in (*pictures, first):
        assert picture.shape[0] == 500 and picture.shape[1] in (304, 305)
        np.testing.assert_allclose(place_of(picture) / 5, (19.5, 74.5), atol=3)


def test_drawings_have_the_size_of_the_input_or_that_asked_for() -> None:
    for side, asked, hint in ((448, None, False), (447, None, True), (30, 60, False)):
        draw = Drawing(lambda: lambda image: [], CLASSES, longer_side=asked)
        assert draw(np.zeros((side, side // 2, 3), np.uint8)).shape[0] == (asked or side)
        assert ("1 image of less than 448" in draw.summary()) is hint


def test_an_output_that_looks_like_a_file_is_one(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", with_square(10))
    write_video(tmp_path / "clip.avi", 4.0, [with_square(10)])

    def draw(output: str, *names: str) -> None:
        paths = [str(tmp_path / name) for name in names]
        visualize_inputs(paths, tmp_path / output, Drawing(lambda: find_bright, CLASSES))

    for output in ("new/one.png", "one.JPG"):
        draw(output, "a.png")
        assert cv2.imread(str(tmp_path / output)).shape == (60, 80, 3)
    cases = {
        "must be a single image": ("many.png", "a.png", "clip.avi"),
        "is an image, so --input must be a single image": ("one.png", "clip.avi"),
        "allowed suffixes are": ("one.gif", "a.png"),
        "a.png is an input": ("a.png", "a.png"),
        "is not a folder": ("a.png/one.png", "a.png"),
    }
    for words, (output, *names) in cases.items():
        with pytest.raises(UserError, match=words):
            visualize_inputs(
                [str(tmp_path / name) for name in names],
                tmp_path / output,
                Drawing(never_built, CLASSES),
            )
    (tmp_path / "folder.png").mkdir()
    draw("folder.png", "a.png")
    assert [path.name for path in (tmp_path / "folder.png").iterdir()] == ["a.png"]


def never_built() -> visualize.Predict:
    raise AssertionError("what is wrong is known before the model is built")


class Screen:
    """Stands in for OpenCV's windows, which the headless build has not; `keys` are pressed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, keys: list[int]) -> None:
        self.shown: list[np.ndarray] = []
        monkeypatch.setenv("DISPLAY", ":0")
        for name in ("namedWindow", "setWindowTitle", "destroyAllWindows"):
            monkeypatch.setattr(cv2, name, lambda *_: None, raising=False)
        monkeypatch.setattr(cv2, "imshow", lambda _, picture: self.shown.append(picture))
        monkeypatch.setattr(cv2, "waitKey", lambda _: keys[len(self.shown) - 1])
        monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)


def test_without_an_output_drawings_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "a.png", with_square(10))
    write_video(tmp_path / "b.avi", 4.0, map(with_square, (10, 30, 50)))
    write_image(tmp_path / "c.png", with_square(10))
    screen = Screen(monkeypatch, [ord("n"), -1, 27])
    draw = Drawing(lambda: find_bright, CLASSES, longer_side=480)
    summary = visualize_inputs([str(tmp_path)], None, draw)
    assert summary.startswith("3 detections in 3 images")  # Esc at the second frame
    places = [place_of(picture[:, :, ::-1])[0] / 6 for picture in screen.shown]  # 80 to 480
    np.testing.assert_allclose(places, [19.5, 19.5, 39.5], atol=3)
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="no display .*--output"):
        visualize_inputs([str(tmp_path)], None, Drawing(never_built, CLASSES))


def test_a_camera_is_shown_or_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "camera.avi"
    write_video(path, 4.0, map(with_square, (10, 30, 50)))
    opened, capture = [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda n: opened.append(n) or capture(str(path)))
    screen = Screen(monkeypatch, [-1, ord("q")])
    summary = visualize.visualize_webcam(1, None, Drawing(lambda: find_bright, CLASSES))
    assert summary.startswith("2 detections in 2 images") and opened == [1]
    assert len(screen.shown) == 2

    def interrupted(image: np.ndarray) -> list[dict]:
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt
        time.sleep(0.6)  # a frame is due each 0.25 s
        return find_bright(image)

    seen: list[np.ndarray] = []
    output = tmp_path / "new" / "drawn.mp4"
    summary = visualize.visualize_webcam(0, output, Drawing(lambda: interrupted, CLASSES))
    assert summary.startswith(f"drawn: {output}\n2 detections in 2 images")
    with pytest.raises(UserError, match="drawn.png of --webcam must end in .mp4"):
        visualize.visualize_webcam(0, tmp_path / "drawn.png", Drawing(never_built, CLASSES))
    monkeypatch.undo()
    assert len(list(read_video(output)[2])) >= 4
    with pytest.raises(DataError, match="cannot read camera 99"):
        visualize.visualize_webcam(99, output, Drawing(never_built, CLASSES))


def test_a_video_goes_into_a_video(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.avi", 4.0, [with_square(10)])
    write_image(tmp_path / "a.png", with_square(10))
    output = tmp_path / "out.mkv"
    visualize_inputs([str(tmp_path / "clip.avi")], output, Drawing(lambda: find_bright, CLASSES))
    assert len(list(read_video(output)[2])) == 1
    for arguments in (["a.png"], ["clip.avi", "out.mkv"]):
        paths = [str(tmp_path / name) for name in arguments]
        with pytest.raises(UserError, match="must be a single video"):
            visualize_inputs(paths, tmp_path / "new.mp4", Drawing(lambda: find_bright, CLASSES))


def test_photos_are_not_written_over(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_image(photos / "a.png", with_square(10))
    write_video(photos / "clip.mp4", 4.0, [with_square(10)])
    (tmp_path / "link").symlink_to(photos)
    before = {path: path.read_bytes() for path in photos.iterdir()}

    def draw(arguments: list[Path], output: Path) -> None:
        visualize_inputs(
            [str(path) for path in arguments], output, Drawing(lambda: find_bright, CLASSES)
        )

    files = [photos / "a.png", photos / "clip.mp4"]
    for arguments, output in (
        ([photos], photos),
        ([photos], tmp_path / "link"),
        (files, photos),
        (files, tmp_path / "link"),
        (files[:1], tmp_path / "other" / ".." / "photos"),
        (files[1:], files[1]),
        (files[1:], tmp_path / "link" / "clip.mp4"),
    ):
        with pytest.raises(UserError, match="choose another output"):
            draw(arguments, output)
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_drawings_are_not_drawn_again(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    photos = [folder / name for name in ("a/x.png", "b/x.png", "b/x_2.png")]
    for left, photo in zip((10, 30, 50), photos):
        write_image(photo, with_square(left))
    for _ in range(2):
        summary = visualize_inputs(
            [str(folder)], folder / "out", Drawing(lambda: find_bright, CLASSES, longer_side=SIDE)
        )
        assert summary.startswith("drawn 3 of 3 files")
        assert {p.name for p in (folder / "out").iterdir()} == {"x.png", "x_2.png", "x_3.png"}
    places = {}
    for path in (folder / "out").iterdir():
        green = cv2.imread(str(path))[:, :, 1].astype(int)
        places[path.name] = np.nonzero((green > 110).sum(axis=0) > 60)[0].mean() / 5.6
    assert places == pytest.approx({"x.png": 20, "x_3.png": 40, "x_2.png": 60}, abs=4)


def test_names_are_shown_escaped_and_labels_are_no_formulas(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = "\x1b[31mred\n\udcff.png", r"$\foo$.png"
    write_image(tmp_path / "in" / good, with_square(10))
    (tmp_path / "in" / bad).write_text("no image")
    classes = {1: r"$\foo$", 2: "a\n\udcffb"}
    with caplog.at_level(logging.WARNING):
        summary = visualize_inputs(
            [str(tmp_path / "in")],
            tmp_path / "out",
            Drawing(lambda: find_bright, classes, score_threshold=0),
        )
    assert r"\x1b[31mred\n\udcff.png" in summary and "\x1b" not in summary + caplog.text
    assert "\udcff" not in summary + caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == [good]


def test_an_output_that_is_a_file_is_refused(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out is not a folder; choose another output"):
        visualize_dataset(dataset, FOUND, tmp_path / "out")
    for output in ("out", "out/clip.mp4"):
        (tmp_path / "in.mp4").touch()
        with pytest.raises(UserError, match="out is not a folder; choose another output"):
            visualize_inputs(
                [str(tmp_path / "in.mp4")],
                tmp_path / output,
                Drawing(lambda: find_bright, CLASSES),
            )


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="none of the 1 files could be read"):
        visualize_inputs(
            [str(tmp_path / "a.png")], tmp_path / "out", Drawing(lambda: find_bright, CLASSES)
        )


@pytest.mark.parametrize("what", ["own loader", "not yet made"])
def test_images_are_those_of_the_loader(dataset: str, tmp_path: Path, what: str) -> None:
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    kept = metadata.as_dict()
    content = Path(kept["json_file"]).read_bytes()
    name, made = f"{dataset}_{what}", tmp_path / "made.json"

    def load() -> list[dict]:
        made.write_bytes(content)
        return records

    if what == "own loader":
        made.write_bytes(content)
        kept.pop("image_root")
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**{**kept, "name": name, "json_file": str(made)})
    try:
        assert "skipped" not in visualize_dataset(name, FOUND, tmp_path / "out")
        assert (tmp_path / "out" / "first.png").is_file()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
