"""Images in many formats, written by hand or by other libraries than the one that reads them."""

import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.utils import logger as detectron2_logger
from PIL import Image

from ws_detectron.data.images import (
    check_image_file,
    image_findings,
    missing_images,
    read_annotated,
    read_rgb,
)
from ws_detectron.errors import DataError

# 16-bit values from black to white
DEEP = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
GREY = (DEEP >> 8).astype(np.uint8)
COLOUR = np.dstack([GREY, GREY[::-1], 255 - GREY])


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey.png", DEEP),
        ("grey.tif", DEEP),
        ("grey.pgm", DEEP),
        ("float.tif", (DEEP / 65535).astype(np.float32)),
        ("whole.tif", DEEP.astype(np.int32)),
    ],
)
def test_more_than_8_bits_are_refused(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / name
    if pixels.dtype == np.int32:
        Image.fromarray(pixels).save(path)
    else:
        cv2.imwrite(str(path), pixels)
    with pytest.raises(DataError, match=rf"{name}.* more than 8 bits .*convert it to 8 bits"):
        read_rgb(path)


@pytest.mark.parametrize("name", ["colour.png", "colour.tif"])
def test_colour_of_16_bits_is_scaled_to_the_high_byte(name: str, tmp_path: Path) -> None:
    deep = np.dstack([DEEP, DEEP[::-1], 65535 - DEEP])
    cv2.imwrite(str(tmp_path / name), deep[:, :, ::-1])
    np.testing.assert_array_equal(read_rgb(tmp_path / name), (deep >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.png", "L", 0),
        ("a.png", "LA", 0),
        ("a.png", "RGB", 0),
        ("a.png", "RGBA", 0),
        ("a.png", "P", 51),
        ("a.tif", "CMYK", 1),
        ("a.jpg", "CMYK", 8),
        ("a.jpg", "RGB", 8),
        ("a.png", "1", 0),
    ],
)
def test_8_bits_are_read_in_every_mode(
    name: str, mode: str, tolerance: float, tmp_path: Path
) -> None:
    picture = np.dstack([GREY] * 3)
    if mode == "1":
        picture = np.where(picture > 127, 255, 0).astype(np.uint8)
    Image.fromarray(picture).convert(mode).save(tmp_path / name)
    assert np.abs(read_rgb(tmp_path / name).astype(int) - picture).max() <= tolerance


def test_of_several_frames_the_first_is_read_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", detectron2_logger.Counter())
    first = Image.fromarray(COLOUR)
    for name in ("pages.tif", "frames.png"):
        first.save(tmp_path / name, save_all=True, append_images=[first.rotate(180)] * 2)
    with caplog.at_level(logging.WARNING):
        for name in ("pages.tif", "frames.png"):
            np.testing.assert_array_equal(read_rgb(tmp_path / name), COLOUR)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'pages.tif'} has 3 frames or pages; the first of each file is used"
    ]


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(COLOUR).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-100])
    (tmp_path / "\x1b[31mred\n.png").touch()
    reasons = {
        "empty.png": "it is empty or not an image",
        "text.jpg": "it is empty or not an image",
        "folder.png": "not a regular file",
        "pipe.png": "not a regular file",
        "cut.jpg": "runcated",
        "none.jpg": "No such file",
        "a\0b.png": "null byte",
        "\x1b[31mred\n.png": "it is empty or not an image",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason) as caught:
            read_rgb(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"cannot read image {tmp_path}/") and "\x1b" not in message


def test_huge_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a.png: .*exceeds limit"):
        read_rgb(tmp_path / "a.png")


def test_only_the_header_is_read_for_the_check(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    check_image_file(tmp_path / "cut.png")
    with pytest.raises(DataError, match="cut.png"):
        read_rgb(tmp_path / "cut.png")


def test_the_size_is_that_of_the_record(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[274] = 6  # orientation: a quarter turn
    Image.fromarray(COLOUR).save(path, exif=exif)  # stored as 64 x 48, seen as 48 x 64
    assert read_annotated({"file_name": path, "width": 48, "height": 64}).shape == (64, 48, 3)
    assert read_annotated({"file_name": path}).shape == (64, 48, 3)
    with pytest.raises(DataError, match=r"a.jpg has 48 x 64 .* width 64 and height 48 .*EXIF"):
        read_annotated({"file_name": path, "width": 64, "height": 48})
    with pytest.raises(DataError, match=r"width 10 and height 48; correct"):
        read_annotated({"file_name": path, "width": 10, "height": 48})


def test_missing_images_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("1.png", "sub/2.png"):
        (tmp_path / name).touch()
    images = [{"file_name": name} for name in ("1.png", "sub/2.png", "nowhere/3.png")]
    assert missing_images(images, tmp_path) == ["nowhere/3.png"]


def test_images_without_a_name_are_reported_by_the_validator_alone(tmp_path: Path) -> None:
    images = [{"id": 1}, {"id": 2, "file_name": "none.png", "width": 4, "height": 4}]
    (finding,) = image_findings(images, tmp_path)
    assert str(finding) == "images are not in the folder: images[1] ('none.png')"
