"""Patches, wheel and decisions of the installer, on small made trees and without a network."""

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import install_detectron2 as installer
import pytest
from install_detectron2 import DEFAULT, RELEASES, InstallError, Release
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PATCH = """\
The reason.

--- a/detectron2/a.py
+++ b/detectron2/a.py
@@ -1,3 +1,2 @@ def f():
-x = f(np.int)
+x = f(int)
 y = 2
-z = 3
@@ -7 +6,2 @@
 last
+more
--- /dev/null
+++ b/detectron2/new.py
@@ -0,0 +1,2 @@
+one
+
"""
BEFORE = "x = f(np.int)\ny = 2\nz = 3\n\n\n\nlast\n"
AFTER = "x = f(int)\ny = 2\n\n\n\nlast\nmore\n"


RELEASE = RELEASES["0.5"]._replace(patches=("name",))


@pytest.fixture
def patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only patch that there is, instead of ours."""
    path = tmp_path / "0.5-name.patch"
    path.write_text(PATCH)
    monkeypatch.setattr(installer, "PATCHES", tmp_path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree" / "detectron2").mkdir(parents=True)
    (tmp_path / "tree" / "detectron2" / "a.py").write_text(BEFORE)
    return tmp_path / "tree"


def test_patch_changes_its_lines_and_makes_its_files(patch: Path, tree: Path) -> None:
    installer.apply_patch(patch, tree)
    assert (tree / "detectron2/a.py").read_bytes() == AFTER.encode()
    assert (tree / "detectron2/new.py").read_bytes() == b"one\n\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.py", BEFORE.replace("y = 2", "y = 3"), "a.py has other lines from line 1"),  # context
        ("a.py", BEFORE.replace("z = 3", "z = 4"), "a.py has other lines from line 1"),  # removed
        ("a.py", BEFORE.replace("last", "\nlast"), "a.py has other lines from line 7"),  # moved
        ("a.py", BEFORE.replace("2\n", "2\r\n"), "a.py has other lines from line 1"),
        ("a.py", None, "a.py is missing"),
        ("new.py", "", "new.py exists already"),
    ],
)
def test_patch_that_does_not_fit_is_refused(
    patch: Path, tree: Path, file: str, content: Any, message: str
) -> None:
    path = tree / "detectron2" / file
    path.write_bytes(content.encode()) if content is not None else path.unlink()
    with pytest.raises(InstallError, match=f"0.5-name.patch: detectron2/{message}"):
        installer.apply_patch(patch, tree)


def make_sdist(folder: Path) -> tuple[Path, Release]:
    """A source distribution with the folders that the build moves, and the release that it is."""
    root = folder / "made" / "detectron2_cdo-0.5"
    (root / "detectron2" / "projects").mkdir(parents=True)
    (root / "detectron2" / "a.py").write_text(BEFORE)
    (root / "LICENSE").write_text("the licence\n")
    (root / "tools").mkdir()
    (root / "tools" / "analyze_model.py").write_text("analyze()\n")
    for origin in installer.PROJECTS:
        (root / "projects" / origin).mkdir(parents=True)
        (root / "projects" / origin / "__init__.py").write_text("")
    path = folder / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root, root.name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, RELEASE._replace(sha256=digest)


def test_wheel_holds_the_patched_package_and_says_what_it_is(tmp_path: Path, patch: Path) -> None:
    sdist, release = make_sdist(tmp_path)
    tree = installer.build_tree(sdist, tmp_path, release)
    installer.run("-m", "wheel", "pack", "--dest-dir", str(tmp_path), str(tree))
    with zipfile.ZipFile(tmp_path / "detectron2-0.5+purepy-py3-none-any.whl") as archive:
        names = set(archive.namelist())
        info = "detectron2-0.5+purepy.dist-info"
        assert archive.read("detectron2/a.py") == AFTER.encode()
        assert archive.read(f"{info}/LICENSE") == b"the licence\n"
        # pip unpacks data/ into the environment
        scripts = "detectron2-0.5+purepy.data/data/share/detectron2/tools"
        assert archive.read(f"{scripts}/analyze_model.py") == b"analyze()\n"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    for project in ("point_rend", "deeplab", "panoptic_deeplab"):
        assert f"detectron2/projects/{project}/__init__.py" in names
    assert not any(name.startswith("projects/") for name in names)
    assert f"{info}/RECORD" in names
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", "0.5+purepy")
    assert metadata.get_payload().endswith("\nThe reason.\n")
    required = {canonicalize_name(Requirement(r).name) for r in metadata.get_all("Requires-Dist")}
    assert {"torch", "torchvision", "fvcore", "pycocotools"} <= required
    assert required.isdisjoint({"black", "future", "pydot"})


def test_every_patch_is_applied_and_begins_with_its_reason() -> None:
    applied = {path.name for release in RELEASES.values() for path in installer.patches(release)}
    assert applied == set(os.listdir(installer.PATCHES))
    for name in applied:
        start = f"detectron2 {name.partition('-')[0]}: "
        assert (installer.PATCHES / name).read_text().startswith(start)


def test_metadata_tell_patches_apart(patch: Path) -> None:
    before = installer.metadata(RELEASE)
    assert before == installer.metadata(RELEASE)
    patch.write_text(PATCH + "+two\n")
    assert installer.metadata(RELEASE) != before


def make_detectron2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, engine: str = "", own: str = ""
) -> str:
    """An importable package, of this script with the metadata `own`; returns its folder."""
    package = folder / "detectron2"
    for name in ("engine", "evaluation", "model_zoo", "modeling"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(engine if name == "engine" else "")
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")

    def distribution(name: str) -> Any:
        if not own:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=DEFAULT.version, read_text=lambda name: own)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return str(package)


@pytest.mark.parametrize("version", ["0.5", "0.6+cu118", "1.0"])
def test_finds_an_importable_detectron2_but_no_clone_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    make_detectron2(tmp_path / "clone", monkeypatch, "9.9")
    package = make_detectron2(tmp_path / "site", monkeypatch, version)
    monkeypatch.chdir(tmp_path / "clone")
    assert installer.usable_detectron2(DEFAULT) == f"detectron2 {version} at {package}"


BROKEN = "raise ImportError('undefined symbol: x')"


@pytest.mark.parametrize(
    ("version", "engine", "message"),
    [("0.4.1", "", "is 0.4.1, which is older than 0.5"), ("0.6", BROKEN, "cannot be imported")],
)
def test_refuses_an_old_or_broken_detectron2(
    tmp_path: Path, monkeypatch, capfd, version: str, engine: str, message: str
) -> None:
    package = make_detectron2(tmp_path, monkeypatch, version, engine)
    with pytest.raises(InstallError, match=f"^detectron2 at {package} {message}.*\n.*uninstall"):
        installer.usable_detectron2(DEFAULT)
    assert ("undefined symbol: x" in capfd.readouterr().err) is bool(engine)


@pytest.mark.parametrize(
    ("own", "engine", "used"),
    [
        (installer.metadata(DEFAULT), "", True),
        (installer.metadata(DEFAULT), BROKEN, False),
        (installer.metadata(RELEASES["0.5"]), "", False),
        ("of older patches", "", False),
    ],
    ids=["current", "broken", "other release", "other patches"],
)
def test_a_broken_or_other_build_of_ours_is_built_again(
    tmp_path: Path, monkeypatch, own: str, engine: str, used: bool
) -> None:
    make_detectron2(tmp_path, monkeypatch, "0.6", engine, own)
    assert (installer.usable_detectron2(DEFAULT) is not None) is used


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_without_detectron2_there_is_none_to_use(monkeypatch: pytest.MonkeyPatch, spec) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert installer.usable_detectron2(DEFAULT) is None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Command lines of Python, which are recorded instead of run."""
    recorded: list[tuple[str, ...]] = []
    monkeypatch.setattr(installer, "run", lambda *arguments: recorded.append(arguments))
    return recorded


def test_usable_detectron2_stays_untouched(monkeypatch, capsys, calls) -> None:
    monkeypatch.setattr(
        installer, "usable_detectron2", lambda release: "detectron2 0.6 at /somewhere"
    )
    assert installer.main([]) == 0
    assert "using detectron2 0.6 at /somewhere, unchanged" in capsys.readouterr().out
    assert calls == []


@pytest.mark.parametrize(
    ("missing", "command"),
    [("torch", "pip install torch"), ("wheel", "pip install wheel"), ("pip", "ensurepip")],
)
def test_missing_prerequisite_is_named_with_a_command(
    monkeypatch: pytest.MonkeyPatch, missing: str, command: str
) -> None:
    names = {"pip", "torch", "torchvision", "setuptools", "wheel"} - {missing}
    found = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    with pytest.raises(InstallError, match=rf"^{missing} must be .*: \S+python\S* -m {command}$"):
        installer.check_prerequisites()


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.1+cu117")
    with pytest.raises(InstallError, match=r"torch 2\.0\.1\+cu117 .* 2\.1 or newer"):
        installer.check_prerequisites()


def test_other_content_under_the_right_name_is_refused(tmp_path, monkeypatch, capsys) -> None:
    def run(*arguments: str) -> None:
        target = Path(arguments[arguments.index("--dest") + 1])
        (target / "pb1_detectron2-0.6.tar.gz").write_bytes(b"malice")

    monkeypatch.setattr(installer, "usable_detectron2", lambda release: None)
    monkeypatch.setattr(installer, "run", run)
    assert installer.main([]) == 1
    error = capsys.readouterr().err
    digest = hashlib.sha256(b"malice").hexdigest()
    assert f"0.6.tar.gz has sha256 {digest}, expected {DEFAULT.sha256}" in error


def test_failing_pip_ends_with_a_message(monkeypatch, capsys) -> None:
    monkeypatch.setattr(installer, "usable_detectron2", lambda release: None)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    assert installer.main([]) == 1
    assert capsys.readouterr().err.startswith("error: `python -m pip ")


@pytest.mark.parametrize(("version", "fetched"), [("23.2.1", False), ("26.3", True)])
@pytest.mark.parametrize(
    ("number", "sdist"), [("0.5", "detectron2-cdo==0.5"), ("0.6", "pb1-detectron2==0.6")]
)
def test_download_pins_the_hash_and_avoids_pip_that_refuses(
    tmp_path: Path, monkeypatch, calls: list, number: str, sdist: str, version: str, fetched: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(InstallError, match="instead of one"):
        installer.download(tmp_path, RELEASES[number])  # nothing is run, so there is no file
    older = str(tmp_path / "older" / "pip")
    assert [call[:2] for call in calls[:-1]] == ([("-m", "pip")] if fetched else [])
    assert calls[-1][:2] == ((older, "download") if fetched else ("-m", "pip"))
    assert (tmp_path / "requirement.txt").read_text() == (
        f"{sdist} --hash=sha256:{RELEASES[number].sha256}\n"
    )


@pytest.mark.parametrize(
    ("release", "version", "with_opencv"),
    [([], "0.6+purepy", True), (["--release", "0.5"], "0.5+purepy", False)],
)
def test_installs_the_wheel_from_the_folder_and_never_from_an_index(
    tmp_path: Path, monkeypatch, calls: list, release: list, version: str, with_opencv: bool
) -> None:
    monkeypatch.setattr(installer, "check_prerequisites", lambda: None)
    monkeypatch.setattr(installer, "download", lambda folder, release: folder)
    monkeypatch.setattr(installer, "build_tree", lambda sdist, folder, release: folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if with_opencv else None)
    monkeypatch.setattr(installer, "usable_detectron2", lambda release: None)
    options = ["--wheel-dir", tmp_path / "wheels", "--constraint", tmp_path / "constraints.txt"]
    assert installer.main([*map(str, options), *release]) == 0
    _, dependencies, own = calls
    constraint = ("--constraint", str(tmp_path / "constraints.txt"))
    assert dependencies[:5] == ("-m", "pip", "install", *constraint)
    # torch is the user's choice; listing it could replace it
    assert not any(r.startswith(("torch", "detectron2")) for r in dependencies[3:])
    assert ("opencv-python-headless" in dependencies) is not with_opencv
    assert own[-1] == f"detectron2=={version}"
    assert {"--no-index", "--no-deps"} < set(own)
    assert own[own.index("--find-links") + 1] == str(tmp_path / "wheels")


WARNED = """
import detectron2.modeling
from detectron2.data.detection_utils import annotations_to_instances
from pycocotools import mask
import numpy
square = mask.encode(numpy.ones((4, 4), numpy.uint8, order="F"))
object = {"bbox": [0, 0, 4, 4], "bbox_mode": 0, "category_id": 0, "segmentation": square}
annotations_to_instances([object], (4, 4), mask_format="bitmask")
"""


@pytest.mark.skipif(
    "purepy" not in importlib.metadata.version("detectron2"), reason="another build of detectron2"
)
def test_this_build_imports_and_reads_masks_without_a_warning() -> None:
    done = subprocess.run([sys.executable, "-c", WARNED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
