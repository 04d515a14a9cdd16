import subprocess
import sys
from pathlib import Path

import portalocker
import pytest

from ws_detectron.errors import UserError
from ws_detectron.utils.locking import AlreadyLocked, locked


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
