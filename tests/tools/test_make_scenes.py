import json
import os
import subprocess
import sys
from pathlib import Path

import cv2

from ws_detectron.lab.scenes import SceneSpec, ensure_scenes

TOOL = Path(__file__).parents[2] / "tools" / "make_scenes.py"


def run(*args: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(TOOL), *args],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_scenes_summary_and_preview_are_made(tmp_path: Path) -> None:
    done = run(
        *"--kind shapes --image-size 64 --train 5 --val 3 --seed 4 --objects 1 2".split(),
        *"--object-scale 0.3 0.5 --min-visible 0.9".split(),
        *("--output", str(tmp_path / "out"), "--preview", str(tmp_path / "sheet.png")),
    )
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "out" / "scenes").glob("*/annotations.json"))
    names = [path.parent.name.rsplit("_", 1)[0] for path in files]
    assert names == ["shapes_64_train", "shapes_64_val"]
    for path, count in zip(files, (5, 3)):
        data = json.loads(path.read_text())
        assert len(data["images"]) == count
        assert data["info"]["spec"]["seed"] == 4
        assert data["info"]["spec"]["objects"] == [1, 2]
        assert data["info"]["spec"]["object_scale"] == [0.3, 0.5]
        assert data["info"]["spec"]["min_visible"] == 0.9
        assert str(path.parent) in done.stdout
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet is not None and sheet.std() > 10


def test_mistakes_end_with_one_line_and_status_2(tmp_path: Path) -> None:
    done = run("--object-scale", "0.5", "0.2", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: scenes: object_scale must be" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "python tools/make_scenes.py --kind shapes" in done.stdout


def test_a_preview_is_not_written_over_a_scene(tmp_path: Path) -> None:
    folder = ensure_scenes(SceneSpec.for_size("shapes", 64, "train", num_images=1), tmp_path)
    (image,) = folder.glob("images/*.png")
    before = image.read_bytes()
    scenes = ["--image-size", "64", "--train", "1", "--val", "0", "--output", str(tmp_path)]
    done = run(*scenes, "--preview", str(image))
    assert done.returncode == 2 and "is an input" in done.stderr
    assert image.read_bytes() == before
