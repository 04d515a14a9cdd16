from pathlib import Path

import cv2
import numpy as np
import pytest

from ws_detectron.errors import DataError, UserError
from ws_detectron.evaluation.inputs import (
    VIDEO_CODES,
    find_inputs,
    is_video,
    open_video,
    output_names,
    read_frames,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "clip.mp4", "notes.txt", "deep/c.jpeg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    return tmp_path / "in"


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_files_folders_and_patterns_are_found(folder: Path) -> None:
    assert names(find_inputs([str(folder)])) == ["a.JPG", "b.png", "clip.mp4", "c.jpeg"]
    assert names(find_inputs([str(folder / "*.png")])) == ["b.png"]
    assert names(find_inputs([str(folder / "**" / "*.j*")])) == ["c.jpeg"]
    # what is named itself is taken, whatever its ending; nothing is taken twice
    files = [str(folder / "notes.txt"), str(folder / "b.png"), str(folder / "[ab].*")]
    assert names(find_inputs(files)) == ["notes.txt", "b.png", "a.JPG"]


def test_what_names_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    for argument in (tmp_path / "none.png", folder / "*.gif"):
        with pytest.raises(UserError, match="names no file"):
            find_inputs([str(folder), str(argument)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"without images and videos \(.jpg"):
        find_inputs([str(tmp_path / "empty")])


def test_outputs_do_not_overwrite_each_other() -> None:
    paths = [Path("x/a.jpg"), Path("y/a.png"), Path("y/a.mp4"), Path("b.png")]
    found = output_names(paths, lambda path: ".mp4" if is_video(path) else ".png")
    assert found == ["a.png", "a_2.png", "a.mp4", "b.png"]


def frames() -> list[np.ndarray]:
    """Four frames of 65 x 49 pixels, red growing brighter."""
    pictures = [np.zeros((49, 65, 3), np.uint8) for _ in range(4)]
    for number, picture in enumerate(pictures):
        picture[:, :, 0] = 60 * number + 20
    return pictures


@pytest.mark.parametrize("ending", VIDEO_CODES)
def test_a_video_is_read_as_it_was_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"clip{ending}"
    with open_video(path, 8.0) as append:
        for frame in frames():
            append(frame)
    rate, found = read_frames(path)
    found = list(found)
    assert rate == pytest.approx(8) and len(found) == 4
    for read, frame in zip(found, frames()):
        assert read.shape == (48, 64, 3)  # codecs want even sizes
        np.testing.assert_allclose(read.mean(axis=(0, 1)), frame.mean(axis=(0, 1)), atol=12)
    assert names([*path.parent.iterdir()]) == [path.name]


def test_a_video_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_video(path, 8.0) as append:
        append(frames()[0])
        raise RuntimeError
    with pytest.raises(UserError, match="no frame"), open_video(path, 8.0):
        pass
    assert path.read_text() == "old" and names([*tmp_path.iterdir()]) == ["clip.mp4"]


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed endings are .mp4"):
        with open_video(tmp_path / "clip.gif", 8.0):
            pass


@pytest.mark.parametrize("content", [b"", b"no video", b"\0" * 5000])
def test_broken_videos_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read video {path}"):
        read_frames(path)


def test_without_a_rate_a_common_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.avi"
    with open_video(path, 8.0) as append:
        append(frames()[0])

    class Silent:
        """OpenCV's reader for a file that does not tell its rate."""

        def __init__(self, name: str) -> None:
            self._video = real(name)

        def __getattr__(self, name: str) -> object:
            return (lambda key: 0.0) if name == "get" else getattr(self._video, name)

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    assert read_frames(path)[0] == 25.0
