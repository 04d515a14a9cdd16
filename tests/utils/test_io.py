import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import portalocker
import pytest
import torch

from ws_detectron.errors import UserError, WriteError, exit_on_user_error
from ws_detectron.utils.io import (
    AlreadyLocked,
    atomic_write,
    check_folder,
    csv_text,
    locked,
    refuse_overwrite,
    write_json,
    write_text,
    writing,
)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old ±\n")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text("utf-8") == "old ±\n"
    with atomic_write(path, "wb") as file:
        file.write(b"\x00new")
        assert path.read_text("utf-8") == "old ±\n"
    assert path.read_bytes() == b"\x00new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="mode must be 'w' or 'wb', got 'a'"),
        atomic_write(tmp_path / "file", "a"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_json_ends_with_a_line_feed(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, None]}, indent=2)
    assert path.read_text().endswith("}\n") and json.loads(path.read_text()) == {"a": [1, None]}


def test_csv_is_read_back() -> None:
    rows = [["a", "b"], ["x, y", 'say "1"'], ["", "two\nlines"]]
    text = csv_text(rows)
    assert "\r" not in text and list(csv.reader(text.splitlines(keepends=True))) == rows


def test_names_as_long_as_they_can_be_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)  # 254 bytes; file systems allow 255
    write_text(path, "a")
    assert path.read_text() == "a"


def test_no_input_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in" / "a.png"
    write_text(source, "photo")
    (tmp_path / "link.png").symlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    os.link(source, tmp_path / "A.PNG")
    monkeypatch.chdir(tmp_path)
    inputs = [None, "", "detectron2://a.pkl", "a\0b", "none.png", source]
    for output in (
        source,
        "in/a.png",
        "./in/../in//a.png",
        "new/../in/a.png",
        "link.png",
        "folder/a.png",
        "A.PNG",
    ):
        with pytest.raises(UserError, match="is an input.* would overwrite; choose another"):
            refuse_overwrite(["new.png", output], inputs)
    refuse_overwrite(["new.png", "in/b.png", "none.png", tmp_path / "in"], inputs)
    for link in ("link.png", Path("link.png")):
        with pytest.raises(UserError, match=r"^link.png is an input \(.*in/a.png\)"):
            refuse_overwrite(link, inputs)


def test_folders_that_cannot_be_written_into_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    for name in ("file", "file/new", "broken/new"):
        with pytest.raises(UserError, match=rf"{name}: .* is not a folder; choose another"):
            check_folder(tmp_path / name)
    check_folder(tmp_path / "new" / "newer")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"new: no permission to write to {tmp_path}"):
        check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^no space left on device while writing {tmp_path}/a$"):
        with writing(tmp_path / "a"):
            raise OSError(28, "No space left on device", "somewhere")

    class KnownError(UserError, OSError):
        pass

    with pytest.raises(KnownError, match="^known$"), writing("a"):
        raise KnownError("known")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_with_the_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(WriteError) as caught, atomic_write(path):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"{os.strerror(number).lower()} while writing {path}"
    assert (caught.value.errno, caught.value.strerror) == (number, os.strerror(number))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_what_torch_says_of_a_full_disk(tmp_path: Path) -> None:
    """Its own error masks that of the file."""

    class Full:
        def __init__(self) -> None:
            self.left = 1000

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

        def flush(self) -> None:
            pass

    path = tmp_path / "weights.pth"
    with pytest.raises(WriteError, match="^no space left on device while writing .*/weights.pth$"):
        with atomic_write(path, "wb"):
            torch.save({"x": torch.zeros(10000)}, Full())
    assert not [*tmp_path.iterdir()]


def test_other_errors_of_the_body_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file.txt"):
        (tmp_path / "missing").read_text()
    with pytest.raises(KeyError, match="key"), atomic_write(tmp_path / "file.txt"):
        raise KeyError("key")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.txt", tmp_path / "file" / "more" / "x.txt"):
        with pytest.raises(WriteError, match=f"^cannot write {path}: "):
            write_text(path, "text")


def test_tools_say_that_the_disk_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    """For every writer and every error that follows."""
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/log.txt")
        except OSError:
            raise RuntimeError("unexpected pos 66877248 vs 66877136")  # noqa: B904
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no space left on device while writing /data/log.txt\n"
    with pytest.raises(RuntimeError, match="pos"), exit_on_user_error():
        raise RuntimeError("unexpected pos")


def test_a_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "lock"
    with locked(path, "busy"):
        with pytest.raises(AlreadyLocked, match="^busy$"), locked(path, "busy"):
            pass
    with locked(path, "busy"):
        pass


def test_a_process_that_inherits_the_file_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "busy") as file:
        heir = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[file.fileno()]
        )
    try:
        with pytest.raises(AlreadyLocked), locked(path, "busy"):
            pass
    finally:
        heir.communicate(b"\n")
    with locked(path, "busy"):
        pass


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise portalocker.LockException("no locks available")

    monkeypatch.setattr(portalocker, "lock", refuse)
    with locked(tmp_path / "lock", "busy") as file:
        assert file.fileno() >= 0
    assert f"{tmp_path / 'lock'} cannot be locked (no locks available)" in caplog.text


def test_errors_inside_are_not_taken_for_those_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the body"), locked(tmp_path / "lock", "busy"):
        raise OSError("of the body")


def test_a_folder_in_which_no_lock_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*/file/lock: "):
        with locked(tmp_path / "file" / "lock", "busy"):
            pass
