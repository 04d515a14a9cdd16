"""tools/check_dataset.py as a user runs it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluated_model import IN_PROCESS  # noqa: F401  the fixtures register it
from PIL import Image

from ws_detectron.evaluation.coco_eval import load_annotations

TOOL = "check_dataset.py"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def content(evaluation_files: Any) -> dict[str, Any]:
    return json.loads(evaluation_files.annotations.read_text())


def test_a_valid_data_set(call_tool: Call, evaluation_files: Any, content: dict) -> None:
    status, output, _ = call_tool(
        TOOL, evaluation_files.annotations, "--images", evaluation_files.images
    )
    assert status == 0
    assert f"images    {len(content['images'])}, 0 of them without an object" in output
    assert f"objects   {len(content['annotations'])}, and 0 crowds" in output
    assert "errors: none" in output and "fixed when read: none" in output


def test_errors_are_counted_and_a_usable_file_is_written(
    call_tool: Call, content: dict, tmp_path: Path
) -> None:
    entries = content["annotations"]
    entries[0]["bbox"] = "\x1b[31m1 2 3 4"
    del entries[1]["iscrowd"], entries[2]["iscrowd"]
    path, fixed = tmp_path / "a.json", tmp_path / "fixed.json"
    path.write_text(json.dumps(content))
    status, output, _ = call_tool(TOOL, path, "--output", fixed)
    assert status == 1
    assert "errors: 1\n       1 bbox must be" in output and "\\x1b[31m1 2" in output
    assert "\x1b" not in output
    assert "fixed when read: 2\n       2 iscrowd is missing" in output
    assert f"{len(entries) - 1} annotations, 1 removed" in output
    expected = copy.deepcopy(entries[1:])
    for entry in expected:
        entry["iscrowd"] = 0
    assert load_annotations(fixed)["annotations"] == expected
    assert call_tool(TOOL, fixed)[0] == 0


def test_images_are_checked(call_tool: Call, content: dict, tmp_path: Path) -> None:
    """One is missing, one is not an image, one has an EXIF orientation, one has 16 bits."""
    names = [image["file_name"] for image in content["images"]]
    for name in names[1:]:
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / names[1]).write_text("no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / names[2], exif=exif)
    Image.new("I;16", (64, 64)).save(tmp_path / names[3])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    status, output, _ = call_tool(TOOL, path, "--images", tmp_path)
    assert status == 1 and "errors: 4" in output
    assert f"1 images are not in the folder: images[0] ('{names[0]}')" in output
    assert "(images 48 x 64)" in output
    assert "2 images cannot be read: images[1]" in output and "16" in output


def test_masks_are_needed_where_some_have_one(
    call_tool: Call, content: dict, tmp_path: Path
) -> None:
    del content["annotations"][0]["segmentation"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert call_tool(TOOL, path)[0] == 1
    assert call_tool(TOOL, path, "--task", "bbox")[0] == 0
    status, _, errors = call_tool(TOOL, path, "--output", path)
    assert status == 2 and "is an input" in errors


def test_a_folder_that_does_not_exist_is_named(call_tool: Call, evaluation_files: Any) -> None:
    status, _, error = call_tool(TOOL, evaluation_files.annotations, "--images", "/mistyped")
    assert status == 2 and "--images /mistyped is not a folder" in error
