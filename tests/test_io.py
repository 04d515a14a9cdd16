import csv
import json
from pathlib import Path

import pytest

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
