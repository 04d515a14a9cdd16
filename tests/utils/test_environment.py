"""The environment that is recorded with measurements."""

import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest

import ws_detectron
from ws_detectron.utils.environment import environment, package_version


def test_machine_date_and_versions() -> None:
    found = environment(["torch", "no-such-distribution"])
    assert found["torch"] == version("torch") and "no-such-distribution" not in found
    assert found["python"] == platform.python_version()
    assert found["ws_detectron"] == package_version()
    written = datetime.strptime(found["date"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - written).total_seconds()) < 3600
    assert found["cores"] >= 1 and re.search(r"\w", found["cpu"])


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the package in it, in place of the imported one."""
    package = tmp_path / "clone" / "ws_detectron"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(ws_detectron, "__file__", str(package / "__init__.py"))
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    return package.parent


def test_a_clone_tells_its_commit_and_whether_code_differs_from_it(clone: Path) -> None:
    told = f"{ws_detectron.__version__}, commit {git(clone, 'rev-parse', '--short=12', 'HEAD')}"
    (clone / "output").write_text("untracked")
    assert package_version() == told
    (clone / "ws_detectron" / "__init__.py").write_text("changed = True")
    assert package_version() == f"{told} with changes"


def test_an_installed_package_tells_no_commit_of_the_repository_around_it(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clone / "venv" / "site-packages" / "ws_detectron"
    site.mkdir(parents=True)
    monkeypatch.setattr(ws_detectron, "__file__", str(site / "__init__.py"))
    assert package_version() == ws_detectron.__version__


def test_version_alone_without_git(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(clone))
    assert package_version() == ws_detectron.__version__


def test_version_alone_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(ws_detectron, "__file__", str(tmp_path / "ws_detectron" / "__init__.py"))
    assert package_version() == ws_detectron.__version__
