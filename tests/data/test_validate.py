"""A valid file, and each error found in real files."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any, Callable

import pytest

from ws_detectron.data.validate import (
    ERROR,
    FIXED,
    WARNING,
    Validated,
    read_json,
    validate,
)
from ws_detectron.errors import DataError

WIDTH, HEIGHT = 96, 80
Content = dict[str, Any]


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@pytest.fixture
def content() -> Content:
    """Three images with two rectangles each."""
    boxes = [[10 + 5 * n, 12 + 3 * n, 30, 20] for n in range(6)]
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 1 + n // 2,
                "category_id": 1 + n % 2,
                "bbox": box,
                "area": 600,
                "iscrowd": 0,
                "segmentation": [rectangle(*box)],
            }
            for n, box in enumerate(boxes)
        ],
    }


def checked(content: Content, **options: Any) -> Validated:
    """Validated for a training with masks, with an unmodified input."""
    before = copy.deepcopy(content)
    result = validate(content, "a.json", **{"train": True, "masks": True, **options})
    assert repr(content) == repr(before)  # NaN is not equal to itself
    return result


def test_a_valid_file_has_no_finding_and_is_used_unchanged(content: Content) -> None:
    result = checked(content)
    assert result.findings == [] and result.broken == []
    assert all(a is b for a, b in zip(result.usable()["annotations"], content["annotations"]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("iscrowd", 2, "iscrowd must be 0 or 1"),
        ("iscrowd", [1], "iscrowd must be 0 or 1"),
        ("bbox", [1, 2, 3], "bbox must be"),
        ("bbox", [1, 2, 3, 4, 5], "bbox must be"),
        ("bbox", ["1", 2, 3, 4], "bbox must be"),
        ("bbox", "1 2 3 4", "bbox must be"),
        ("bbox", [math.nan, 1, 2, 3], "bbox must be"),
        ("bbox", [10**400, 1, 2, 3], "bbox must be"),
        ("bbox", [1e300, 1, 2, 3], "bbox must be"),
        ("bbox", [10, 10, -3, 4], "negative width or height"),
        ("segmentation", None, "there is no mask"),
        ("segmentation", [], "there is no mask"),
        ("segmentation", [[1, 2, 3, 4]], "no polygon has three corners"),
        ("segmentation", [["1", "2", "3", "4", "5", "6"]], "a polygon must be"),
        ("segmentation", [[1, 2, 3, 4, 5, math.nan]], "a polygon must be"),
        ("segmentation", [[1, 2, 3, 4, 5, math.inf]], "a polygon must be"),
        ("segmentation", [[1, 2, 3, 4, 5, 10**400]], "a polygon must be"),
        ("segmentation", [[[1, 2], [3, 4], [5, 6]]], "a polygon must be"),
        ("segmentation", [{"x": 1}], "a polygon must be"),
        ("segmentation", [None], "a polygon must be"),
        ("segmentation", [[1, 2, 3, 4, 5, 1e9]], "far outside"),
        ("segmentation", [[1, 2, 3, 4, 5, 6, 7]], "odd number of coordinates"),
        ("segmentation", "text", "list of polygons or an RLE"),
        ("segmentation", {"counts": "5"}, "list of polygons or an RLE"),
        ("segmentation", {"size": [1, 1], "counts": "1"}, "size of the RLE"),
        (
            "segmentation",
            {"size": [HEIGHT, WIDTH], "counts": [5, 6]},
            "run lengths that cover all pixels",
        ),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [-1, 7681]}, "run lengths"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [0.5, 7679.5]}, "run lengths"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": "5"}, "cover 5 pixels"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": 3}, "a list or text"),
        ("image_id", 99, "image_id is not an id in the file"),
        ("image_id", None, "image_id is not an id"),
        ("image_id", [1], "image_id is not an id"),
        ("image_id", True, "image_id is not an id"),
        ("category_id", 7, "category_id is not an id"),
        ("keypoints", "text", "keypoints must be"),
        ("keypoints", [1, 2], "keypoints must be"),
        ("keypoints", [1, 2, math.nan], "keypoints must be"),
        ("ignore", 1, "not a key of the COCO format"),
    ],
)
def test_what_cannot_be_used_is_named(content: Content, key: str, value: Any, message: str) -> None:
    content["annotations"][2][key] = value
    result = checked(content)
    (error,) = result.of(ERROR)
    assert message in str(error) and error.count == 1
    assert result.broken == [2]
    with pytest.raises(DataError) as caught:
        result.usable()
    message = str(caught.value)
    assert "a.json" in message and "annotations[2] (id 3)" in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("iscrowd", ..., 0),
        ("iscrowd", None, 0),
        ("iscrowd", "0", 0),
        ("iscrowd", False, 0),
        ("iscrowd", True, 1),
        ("iscrowd", 1.0, 1),
        ("area", ..., 600.0),
        ("area", None, 600.0),
        ("area", "600", 600.0),
        ("area", -1, 600.0),
        ("area", math.nan, 600.0),
        ("bbox", ..., [20, 18, 30, 20]),
        ("bbox", None, [20, 18, 30, 20]),
        ("bbox", [], [20, 18, 30, 20]),
        ("segmentation", rectangle(20, 18, 30, 20), [rectangle(20, 18, 30, 20)]),
        (
            "segmentation",
            [rectangle(20, 18, 30, 20), [1, 2, 3, 4], []],
            [rectangle(20, 18, 30, 20)],
        ),
        ("image_id", "2", 2),
        ("image_id", 2.0, 2),
        ("category_id", "1", 1),
    ],
)
def test_what_can_be_read_is_fixed_and_said(
    content: Content, key: str, value: Any, read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """`...` stands for a key that is not there."""
    content["annotations"][2][key] = value
    if value is ...:
        del content["annotations"][2][key]
    result = checked(content)
    (finding,) = result.findings
    assert finding.level == FIXED and "annotations[2] (id 3)" in str(finding)
    with caplog.at_level(logging.WARNING):
        entry = result.usable()["annotations"][2]
    assert entry[key] == read and type(entry[key]) is type(read)
    assert entry == {**content["annotations"][2], key: read}
    assert str(finding) in caplog.text


@pytest.mark.parametrize("counts", ["text", "list"])
def test_box_and_area_come_from_an_rle_too(content: Content, counts: str) -> None:
    """Column 10 from row 4 on, 5 pixels down: 10 * 80 + 4 zeros, 5 ones, the rest zeros."""
    runs = [10 * HEIGHT + 4, 5, HEIGHT * WIDTH - 10 * HEIGHT - 9]
    rle: Any = {"size": [HEIGHT, WIDTH], "counts": runs}
    if counts == "text":
        from pycocotools import mask as mask_util

        rle["counts"] = mask_util.frPyObjects(rle, HEIGHT, WIDTH)["counts"].decode()
    entry = content["annotations"][0]
    entry["segmentation"] = rle
    del entry["bbox"], entry["area"]
    read = checked(content).usable()["annotations"][0]
    assert read["bbox"] == [10, 4, 1, 5] and read["area"] == 5


@pytest.mark.parametrize(
    ("ids", "invalid"), [([1, 1, 2, 3, 4, 5], 1), ([None] * 6, 6), (["a", "b", "c", "d", 5, 6], 4)]
)
def test_ids_of_annotations_are_replaced(content: Content, ids: list[Any], invalid: int) -> None:
    for entry, own in zip(content["annotations"], ids):
        entry["id"] = own
    result = checked(content)
    assert [(f.level, f.count) for f in result.findings] == [(FIXED, invalid)]
    assert [a["id"] for a in result.usable()["annotations"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("value", "read"), [(96.0, 96), ("96", 96), ("96.0", 96)])
def test_sizes_are_converted_to_integers(content: Content, value: Any, read: int) -> None:
    for image in content["images"]:
        image["width"] = value
    result = checked(content)
    (finding,) = result.findings
    assert (finding.level, finding.count) == (FIXED, 3)
    assert [type(i["width"]) for i in result.usable()["images"]] == [int] * 3
    assert result.usable()["images"][0]["width"] == read


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("images", "width", None, "must be integers"),
        ("images", "width", 95.5, "must be integers"),
        ("images", "width", 0, "must be integers"),
        ("images", "height", 10**9, "must be integers"),
        ("images", "height", [3], "must be integers"),
        ("images", "file_name", None, "file_name must be text"),
        ("images", "file_name", 3, "file_name must be text"),
        ("images", "id", None, "need an id"),
        ("images", "id", [1], "need an id"),
        ("images", "id", True, "need an id"),
        ("images", "id", 10**400, "need an id"),
        ("images", "id", 2, "not unique"),
        ("categories", "id", 2, "not unique"),
        ("categories", "id", None, "need an id"),
        ("categories", "name", None, "name must be text"),
    ],
)
def test_images_and_categories_are_checked(
    content: Content, where: str, key: str, value: Any, message: str
) -> None:
    content[where][0][key] = value
    content["annotations"] = content["annotations"][2:]
    for entry in content["annotations"]:
        entry["category_id"] = 2
    assert any(message in error.what and f"{where}[" in str(error) for error in
               checked(content).of(ERROR))  # fmt: skip


def test_metrics_need_no_file_names_and_no_sizes(content: Content) -> None:
    for image in content["images"]:
        del image["file_name"], image["width"], image["height"]
    assert validate(content, "a.json").findings == []
    assert {e.what for e in validate(content, "a.json", load=True).of(ERROR)} == {
        "file_name must be text",
        "height and width must be integers from 1 to 200000",
    }


def test_ids_may_be_text_in_one_list_only(content: Content) -> None:
    """As the VIA annotation tool exports them."""
    for image in content["images"]:
        image["id"] = str(image["id"])
    result = checked(content)
    assert [(f.level, f.count) for f in result.findings] == [(FIXED, 6)]
    assert [a["image_id"] for a in result.usable()["annotations"]] == list("112233")
    content["images"][0]["id"] = 2  # with "2" there are two that an annotation's 2.0 could mean
    content["annotations"][0]["image_id"] = "1"
    assert checked(content).of(ERROR)


def test_boxes_are_no_fractions_and_no_corners(content: Content) -> None:
    fractions, corners = copy.deepcopy(content), copy.deepcopy(content)
    for entry in fractions["annotations"]:
        entry["bbox"] = [v / s for v, s in zip(entry["bbox"], (WIDTH, HEIGHT) * 2)]
    assert "fractions of the image" in checked(fractions).of(ERROR)[0].what
    for entry in corners["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x + 30, y + 30, x + w + 30, y + h + 30]
    for image in corners["images"]:
        image["width"] = image["height"] = 120
    assert "corners [x1, y1, x2, y2]" in checked(corners).of(ERROR)[0].what
    corners["annotations"][0]["bbox"] = [30, 30, 20, 10]  # one that cannot be corners
    assert "6 boxes exceed" in checked(corners).of(WARNING)[0].what


def test_what_is_left_out_of_a_training_is_counted(content: Content) -> None:
    content["annotations"][0]["bbox"] = [10, 10, 0, 20]
    content["annotations"][1]["bbox"] = [200, 10, 20, 20]
    findings = {f.what: str(f) for f in checked(content).of(WARNING)}
    assert "annotations[0] (id 1)" in findings["boxes without area, not trained on"]
    assert "annotations[1] (id 2)" in findings["boxes outside their images, not trained on"]
    assert checked(content, train=False, load=True).of(ERROR) == []


def test_a_training_without_objects_is_refused(content: Content) -> None:
    for entry in content["annotations"][:4]:
        entry["iscrowd"] = 1
    for entry in content["annotations"][4:]:
        entry["bbox"] = [300, 300, 5, 5]
    (error,) = checked(content).of(ERROR)
    assert "6 annotations, of which 4 crowds, 2 boxes outside" in error.what
    content["annotations"] = []
    assert "no object to train on: 0 annotations" in checked(content).of(ERROR)[0].what
    assert validate(content, "a.json", load=True).findings == []


def test_masks_as_rle_are_no_polygons(content: Content) -> None:
    content["annotations"][0]["segmentation"] = {
        "size": [HEIGHT, WIDTH],
        "counts": [HEIGHT * WIDTH],
    }
    content["annotations"][0]["bbox"] = [1, 1, 5, 5]
    assert "set it to bitmask" in checked(content, mask_format="polygon").of(ERROR)[0].what
    assert checked(content, mask_format="bitmask").findings == []
    content["annotations"][0]["iscrowd"] = 1  # crowds are not trained on
    assert checked(content, mask_format="polygon").findings == []


def test_masks_are_needed_where_they_are_asked_for(content: Content) -> None:
    for entry in content["annotations"]:
        del entry["segmentation"]
    assert checked(content, masks=False).findings == []
    (error,) = checked(content).of(ERROR)
    assert error.count == 6 and len(error.examples) == 3 and "and 3 more" in str(error)


def test_several_errors_make_a_list(content: Content) -> None:
    content["annotations"][0]["bbox"] = [1]
    content["annotations"][1]["segmentation"] = "text"
    with pytest.raises(DataError, match=r"a\.json:\n  - bbox must be .*\n  - segmentation must"):
        checked(content).usable()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "the lists images, annotations, categories are missing; it is a list.*swapped"),
        ("text", "not in COCO format"),
        ({"images": []}, "annotations, categories are missing"),
        ({"images": [], "categories": []}, "test-dev"),
        ({"images": [], "annotations": {}, "categories": []}, "annotations are missing"),
    ],
)
def test_content_without_the_lists_is_refused(broken: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.json .*{message}"):
        validate(broken, "a.json")


def test_annotations_may_be_missing_if_not_required(content: Content) -> None:
    del content["annotations"]
    assert validate(content, "a.json", load=True, require_annotations=False).findings == []


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_entries_are_objects(content: Content, kind: str) -> None:
    content[kind].append(3)
    assert f"{kind} must be objects" in {e.what for e in checked(content).of(ERROR)}


def test_text_of_a_file_is_shown_escaped(content: Content) -> None:
    content["annotations"][0]["bbox"] = "\x1b[31mred\n" * 1000
    with pytest.raises(DataError) as caught:
        checked(content).usable()
    assert "\x1b" not in str(caught.value) and "\\x1b[31m" in str(caught.value)
    assert len(str(caught.value)) < 300


ENCODINGS: list[tuple[Callable[[str], bytes], str]] = [
    (lambda text: text.encode("utf-8-sig"), ""),
    (lambda text: text.encode("utf-16"), ""),
    (lambda text: text.replace("red", "größe").encode("cp1252"), "not JSON in UTF-8: .*byte 0xf6"),
    (lambda text: text[:-5].encode(), "not JSON"),
    (lambda text: b"", "not JSON"),
    (lambda text: b"[" * 100_000, "not JSON .*recursion"),
    (lambda text: b"[" + b"9" * 5000 + b"]", "not JSON"),
]


@pytest.mark.parametrize(("encode", "message"), ENCODINGS)
def test_encodings_of_files(
    content: Content, tmp_path: Path, encode: Callable[[str], bytes], message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(encode(json.dumps(content, ensure_ascii=False)))
    if not message:
        assert read_json(path, "annotations") == content
        return
    with pytest.raises(DataError, match=f"annotations .*a.json are .*{message}"):
        read_json(path, "annotations")


def test_reading_a_large_file_is_said(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    caplog.set_level(logging.INFO, "ws_detectron")
    for limit, said in ((6, []), (5, [f"reading predictions {tmp_path}/a.json, 0 MB"])):
        monkeypatch.setattr("ws_detectron.data.validate.LARGE", limit)
        assert read_json(tmp_path / "a.json", "predictions") == [1, 2]
        assert caplog.messages == said


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no predictions file .*missing.json"):
        read_json(tmp_path / "missing.json", "predictions")
    with pytest.raises(DataError, match="cannot read annotations .*: Is a directory"):
        read_json(tmp_path, "annotations")
