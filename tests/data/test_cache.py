from pathlib import Path

import pytest

from ws_detectron.data.cache import cache_root


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
    own: str, xdg: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("WS_DETECTRON_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_user_without_a_home_gets_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("WS_DETECTRON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_root().is_absolute() and cache_root().name == "ws_detectron"
