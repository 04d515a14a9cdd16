import logging
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from ws_detectron.errors import DataError, UserError
from ws_detectron.evaluation.inputs import (
    VIDEO_CODES,
    find_inputs,
    is_video,
    output_names,
    read_video,
    write_image,
    write_video,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "clip.mp4", "notes.txt", "deep/c.jpeg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    return tmp_path / "in"


NOWHERE = Path("no_output")


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_files_folders_and_patterns_are_found(folder: Path) -> None:
    assert names(find_inputs([str(folder)], NOWHERE)) == ["a.JPG", "b.png", "clip.mp4", "c.jpeg"]
    assert names(find_inputs([str(folder / "*.png")], NOWHERE)) == ["b.png"]
    assert names(find_inputs([str(folder / "**" / "*.j*")], NOWHERE)) == ["c.jpeg"]
    # what is named itself is taken, whatever its suffix; nothing is taken twice
    files = [str(folder / "notes.txt"), str(folder / "b.png"), str(folder / "[ab].*")]
    assert names(find_inputs(files, NOWHERE)) == ["notes.txt", "b.png", "a.JPG"]


def test_what_names_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    for argument in (tmp_path / "none.png", folder / "*.gif"):
        with pytest.raises(UserError, match="matches no file"):
            find_inputs([str(folder), str(argument)], NOWHERE)
    with pytest.raises(UserError, match="--input is empty"):
        find_inputs([""], NOWHERE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"without images and videos \(.jpg"):
        find_inputs([str(tmp_path / "empty")], NOWHERE)


STEMS = ["x", "X", "x_2", "x_3", "x_2_2", "X_2", "ß", "ss", "é", "e\u0301", "ı", ".", "a"]


@pytest.mark.parametrize("seed", range(30))
def test_names_are_distinct_on_every_file_system_and_stable(seed: int) -> None:
    source = random.Random(seed)
    stems, more = (source.choices(STEMS, k=source.randrange(12)) for _ in range(2))
    paths = [Path(f"{n}/{stem}.jpg") for n, stem in enumerate(stems)]
    found = output_names(paths, lambda path: ".png")
    folded = {unicodedata.normalize("NFC", name.casefold()) for name in found}
    assert len(folded) == len(found) == len(paths)
    assert found == output_names(paths, lambda path: ".png")
    # the first of a name has it, and keeps it when further files are drawn
    firsts: dict[str, int] = {}
    for number, path in enumerate(paths):
        firsts.setdefault(unicodedata.normalize("NFC", path.stem.casefold()), number)
    later = [Path(f"more/{n}/{stem}.jpg") for n, stem in enumerate(more)]
    longer = output_names(paths + later, lambda path: ".png")
    for number in firsts.values():
        assert found[number] == longer[number] == f"{paths[number].stem}.png"


def test_names_of_several_folders() -> None:
    paths = [Path(name) for name in ("a/x.png", "b/x.png", "b/x_2.png", "c/X.jpg", "x.mp4")]
    found = output_names(paths, lambda path: ".mp4" if is_video(path) else ".png")
    assert found == ["x.png", "x_3.png", "x_2.png", "X_4.png", "x.mp4"]


def test_many_files_of_one_name_take_no_time() -> None:
    found = output_names([Path(f"{n}/x.png") for n in range(20000)], lambda path: ".png")
    assert len(set(found)) == 20000


def test_what_lies_in_the_output_is_no_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out"
    for name in ("b.png", "images/1.png", "clip.mp4"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (tmp_path / "link").symlink_to(out)
    mine = ["a.JPG", "b.png", "clip.mp4", "c.jpeg"]
    for output in (out, tmp_path / "link", folder / "deep" / ".." / "out"):
        assert names(find_inputs([str(folder)], output)) == mine
        found = find_inputs([str(folder / "**" / "*.*g")], output)
        assert names(found) == ["b.png", "c.jpeg"]
    monkeypatch.chdir(folder)
    assert names(find_inputs(["."], Path("out"))) == mine
    # what is asked for by name, and folders within the output
    assert find_inputs([str(out / "b.png")], out) == [out / "b.png"]
    assert names(find_inputs(["deep", "deep/*"], Path("."))) == ["c.jpeg"]
    for argument, output in (
        (folder, folder),
        (folder / "*.png", folder),
        (out, out),
        (out, tmp_path / "link"),
    ):
        with pytest.raises(UserError, match="only files in --output .*choose another output"):
            find_inputs([str(argument)], output)
    # a video that is written into the folder of its input
    assert folder / "clip.mp4" not in find_inputs([str(folder)], folder / "clip.mp4")
    assert "clip.mp4" not in [str(path) for path in find_inputs(["."], Path("clip.mp4"))]


def test_a_file_under_two_names_is_taken_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = ["b.png", str(folder / "b.png"), "deep/../b.png", "./*.png"]
    assert find_inputs(arguments, NOWHERE) == [Path("b.png")]


def frames() -> list[np.ndarray]:
    """Four frames of 65 x 49 pixels, red growing brighter."""
    pictures = [np.zeros((49, 65, 3), np.uint8) for _ in range(4)]
    for number, picture in enumerate(pictures):
        picture[:, :, 0] = 60 * number + 20
    return pictures


@pytest.mark.parametrize("suffix", VIDEO_CODES)
def test_a_video_is_read_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"clip{suffix}"
    write_video(path, 8.0, frames())
    rate, _, found = read_video(path)
    found = list(found)
    assert rate == pytest.approx(8) and len(found) == 4
    for read, frame in zip(found, frames()):
        assert read.shape == (48, 64, 3)  # codecs want even sizes
        np.testing.assert_allclose(read.mean(axis=(0, 1)), frame.mean(axis=(0, 1)), atol=12)
    assert names([*path.parent.iterdir()]) == [path.name]


def test_a_video_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield frames()[0]
        raise RuntimeError

    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_video(path, 8.0, failing())
    with pytest.raises(UserError, match="no frame"):
        write_video(path, 8.0, [])
    assert path.read_text() == "old" and names([*tmp_path.iterdir()]) == ["clip.mp4"]


def test_a_video_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4" / "a").mkdir(parents=True)
    for name in ("file/clip.mp4", "folder.mp4"):
        with pytest.raises(UserError, match=f"cannot write {tmp_path / name}: "):
            write_video(tmp_path / name, 8.0, frames())
    with pytest.raises(UserError, match="allowed suffixes are .mp4"):
        write_video(tmp_path / "clip.gif", 8.0, frames())
    write_video(tmp_path / f"{'a' * 250}.mp4", 8.0, frames())


def test_a_video_that_is_cut_off_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "clip.avi"
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    write_video(path, 8.0, noise)
    with caplog.at_level(logging.WARNING):
        assert len(list(read_video(path)[2])) == 20
        assert not caplog.records
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert 0 < len(list(read_video(path)[2])) < 18
    assert f"{path} ends after" in caplog.text and "of 20 frames" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no video", b"\0" * 5000])
def test_broken_videos_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read video {path}"):
        read_video(path)


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    frames = [np.zeros((size, 16, 3), np.uint8) for size in (16, 32)]
    with pytest.raises(DataError, match=r"frames of \(16, 16, 3\) and \(32, 16, 3\)"):
        write_video(tmp_path / "video.mp4", 8.0, frames)
    assert not list(tmp_path.iterdir())


def test_pictures_are_written_as_they_are(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    write_image(tmp_path / "new" / "a.png", picture)
    found = cv2.imread(str(tmp_path / "new" / "a.png"))[:, :, ::-1]
    np.testing.assert_array_equal(found, picture)


def test_other_formats_and_unwritable_paths_are_refused(tmp_path: Path) -> None:
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"a\.gif: allowed suffixes are"):
        write_image(tmp_path / "a.gif", picture)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", picture)
