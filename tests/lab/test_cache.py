import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ws_detectron.lab.cache import cache_root


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/a/b", "/x", "/a/b"),
        ("~/mine", "/x", "/home/someone/mine"),
        ("", "/x", "/x/ws_detectron"),
        (None, "/x", "/x/ws_detectron"),
        (None, "", "/home/someone/.cache/ws_detectron"),
        (None, None, "/home/someone/.cache/ws_detectron"),
    ],
)
def test_root_follows_the_variables_in_order(
    own: str, xdg: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("WS_DETECTRON_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected.replace("/home/someone", str(tmp_path)))


def test_user_without_a_home_gets_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("WS_DETECTRON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_root().is_absolute() and cache_root().name == "ws_detectron"


def test_a_home_that_cannot_be_written_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WS_DETECTRON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    assert cache_root() == Path(tempfile.gettempdir()) / "ws_detectron"
    made = tmp_path / ".cache" / "ws_detectron"
    made.mkdir(parents=True)  # what is there already can be read
    assert cache_root() == made


def test_an_empty_home_is_none(tmp_path: Path) -> None:
    """Not the root folder, in which root can make anything: for the caches of other libraries."""
    script = (
        "import ws_detectron, os, pwd\n"
        "from ws_detectron.lab.cache import cache_root\n"
        "print(cache_root(), os.path.expanduser('~'), pwd.getpwuid(os.getuid()).pw_dir, sep='|')"
    )
    variables = ("WS_DETECTRON_CACHE", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in variables}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "HOME": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    root, home, expected = done.stdout.strip().split("|")
    assert home == expected
    assert root in (f"{home}/.cache/ws_detectron", f"{tempfile.gettempdir()}/ws_detectron")
