"""The installer's decisions, with made-up installations and without a network."""

import importlib.metadata
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import install_detectron2 as installer
import pytest
from detectron2_build.wheel import SDIST_SHA256, VERSION


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Records pip's command lines instead of running pip."""
    recorded: list[tuple[str, ...]] = []

    def pip(*arguments: str, folder: Optional[Path] = None) -> None:
        recorded.append(arguments)

    monkeypatch.setattr(installer, "pip", pip)
    return recorded


def make_detectron2(folder: Path, version: str, engine: str = "") -> None:
    """An importable package with the subpackages that the installer looks at."""
    for name in ("engine", "evaluation", "model_zoo", "modeling"):
        (folder / "detectron2" / name).mkdir(parents=True)
        (folder / "detectron2" / name / "__init__.py").write_text("")
    (folder / "detectron2" / "engine" / "__init__.py").write_text(engine)
    (folder / "detectron2" / "__init__.py").write_text(f"__version__ = {version!r}\n")


@pytest.mark.parametrize("version", ["0.5", "0.6", "0.6+cu118", "1.0"])
def test_finds_an_importable_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    make_detectron2(tmp_path, version)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert installer.find_detectron2() == (version, str(tmp_path / "detectron2"))


def test_refuses_an_old_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_detectron2(tmp_path, "0.4.1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(installer.InstallError, match=r"0\.4\.1 at .* older than 0\.5.*\n.*uninst"):
        installer.find_detectron2()


def test_refuses_a_broken_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_detectron2(tmp_path, "0.6", engine="raise ImportError('undefined symbol: x')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(installer.InstallError, match="ImportError: undefined symbol: x\n.*uninst"):
        installer.find_detectron2()


def test_a_clone_in_the_current_folder_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_detectron2(tmp_path / "clone", "9.9")
    make_detectron2(tmp_path / "site", "0.6")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert installer.find_detectron2() == ("0.6", str(tmp_path / "site" / "detectron2"))


def test_usable_detectron2_stays_untouched(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calls: list[tuple[str, ...]],
) -> None:
    found = ("0.6", "/somewhere/detectron2")
    monkeypatch.setattr(installer, "usable_detectron2", lambda: found)
    assert installer.main([]) == 0
    assert "using detectron2 0.6 at /somewhere/detectron2, unchanged" in capsys.readouterr().out
    assert calls == []


def pretend_installed(monkeypatch: pytest.MonkeyPatch, version: str, mark: str) -> None:
    distribution = SimpleNamespace(version=version, read_text=lambda name: f"patches ({mark})")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(installer, "fingerprint", lambda: "current")


@pytest.mark.parametrize(
    ("version", "mark", "used"),
    [
        (VERSION, "current", True),
        (VERSION, "older", False),
        ("0.6", "older", True),  # not built by this script
    ],
)
def test_only_a_build_of_ours_with_other_patches_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, version: str, mark: str, used: bool
) -> None:
    pretend_installed(monkeypatch, version, mark)
    monkeypatch.setattr(installer, "find_detectron2", lambda: (version, "/x"))
    assert (installer.usable_detectron2() is not None) is used


@pytest.mark.parametrize(("version", "ours"), [(VERSION, True), ("0.6", False)])
def test_only_a_build_of_ours_that_broke_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, version: str, ours: bool
) -> None:
    def find() -> None:
        raise installer.InstallError("No module named 'fvcore'")

    pretend_installed(monkeypatch, version, "current")
    monkeypatch.setattr(installer, "find_detectron2", find)
    if ours:
        assert installer.usable_detectron2() is None
    else:
        with pytest.raises(installer.InstallError, match="fvcore"):
            installer.usable_detectron2()


def test_without_detectron2_there_is_none_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(installer, "find_detectron2", lambda: None)
    assert installer.usable_detectron2() is None


@pytest.mark.parametrize("missing", ["torch", "torchvision", "setuptools", "wheel"])
def test_missing_prerequisite_is_named_with_a_command(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(installer.InstallError, match=rf"^{missing} must be .*: \S+python\S* -m"):
        installer.check_prerequisites()


def test_missing_pip_is_named_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(installer.InstallError, match="^pip must be .* -m ensurepip"):
        installer.check_prerequisites()


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.1+cu117")
    with pytest.raises(installer.InstallError, match=r"torch 2\.0\.1\+cu117 .* 2\.1 or newer"):
        installer.check_prerequisites()


def prepare_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with everything but detectron2."""
    monkeypatch.setattr(installer, "usable_detectron2", lambda: None)
    monkeypatch.setattr(installer, "check_prerequisites", lambda: None)


def test_other_content_under_the_right_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_failure(monkeypatch)

    def pip(*arguments: str, folder: Optional[Path] = None) -> None:
        if arguments[0] == "download":
            target = Path(arguments[arguments.index("--dest") + 1])
            (target / "detectron2_cdo-0.5.tar.gz").write_bytes(b"malice")

    monkeypatch.setattr(installer, "pip", pip)
    assert installer.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: detectron2_cdo-0.5.tar.gz has sha256")
    assert SDIST_SHA256 in error


def test_failing_pip_ends_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_failure(monkeypatch)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    assert installer.main([]) == 1
    assert capsys.readouterr().err.startswith("error: `pip ")


@pytest.mark.parametrize(
    ("version", "fetched"), [("23.2.1", False), ("26.2", False), ("26.3", True)]
)
def test_download_pins_the_hash_and_avoids_pip_that_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[str, ...]],
    version: str,
    fetched: bool,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(installer.InstallError, match="instead of one"):
        installer.download(tmp_path)  # the recorded pip leaves no file
    assert [call[0] for call in calls] == (["install"] if fetched else []) + ["download"]
    assert (tmp_path / "requirement.txt").read_text() == (
        f"detectron2-cdo==0.5 --hash=sha256:{SDIST_SHA256}\n"
    )


def test_installs_the_wheel_from_the_folder_and_never_from_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(installer, "check_prerequisites", lambda: None)
    monkeypatch.setattr(installer, "download", lambda folder: folder)
    monkeypatch.setattr(installer, "assemble", lambda sdist, folder: folder)
    monkeypatch.setattr(installer, "pack", lambda tree, folder: None)
    installer.build_and_install(tmp_path / "wheels", tmp_path / "constraints.txt")
    dependencies, own = calls
    assert dependencies[:3] == ("install", "--constraint", str(tmp_path / "constraints.txt"))
    # torch is the user's choice; listing it could replace it
    assert not any(r.startswith(("torch", "detectron2")) for r in dependencies[1:])
    assert own[-1] == "detectron2==0.5+purepy"
    assert {"--no-index", "--no-deps"} < set(own)
    assert own[own.index("--find-links") + 1] == str(tmp_path / "wheels")


@pytest.mark.parametrize("present", [True, False])
def test_adds_opencv_only_where_there_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[str, ...]],
    present: bool,
) -> None:
    monkeypatch.setattr(installer, "check_prerequisites", lambda: None)
    monkeypatch.setattr(installer, "download", lambda folder: folder)
    monkeypatch.setattr(installer, "assemble", lambda sdist, folder: folder)
    monkeypatch.setattr(installer, "pack", lambda tree, folder: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if present else None)
    installer.build_and_install(None, None)
    assert ("opencv-python-headless" in calls[0]) is not present
