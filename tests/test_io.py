import csv
import errno
import json
import os
from pathlib import Path

import pytest
import torch

from ws_detectron.errors import WriteError, exit_on_user_error
from ws_detectron.io import atomic_write, csv_text, write_json, write_text


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


def test_json_ends_with_a_line_feed_and_refuses_nan_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, None]}, indent=2)
    assert path.read_text().endswith("}\n") and json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"), allow_nan=False)
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_csv_is_read_back() -> None:
    rows = [["a", "b"], ["x, y", 'say "1"'], ["", "two\nlines"]]
    text = csv_text(rows)
    assert "\r" not in text and list(csv.reader(text.splitlines(keepends=True))) == rows


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
    """Its own error hides the file's."""

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
        with pytest.raises(WriteError, match=f"while writing {path}$"):
            write_text(path, "text")


def test_tools_say_that_the_disk_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever wrote, and whatever came of it."""
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/log.txt")
        except OSError:
            raise RuntimeError("unexpected pos 66877248 vs 66877136")  # noqa: B904
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no space left on device while writing /data/log.txt\n"
    with pytest.raises(RuntimeError, match="pos"), exit_on_user_error():
        raise RuntimeError("unexpected pos")
