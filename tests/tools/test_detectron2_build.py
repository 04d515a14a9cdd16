"""Patches and wheel of the detectron2 build, on small made-up trees."""

import dataclasses
import hashlib
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from detectron2_build import wheel
from detectron2_build.patches import PATCHES, Patch, PatchError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ONCE = Patch(name="once", file="detectron2/a.py", reason="test", old="np.int)", new="int)")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "detectron2").mkdir()
    return tmp_path


def write(tree: Path, text: str) -> Path:
    path = tree / "detectron2" / "a.py"
    path.write_bytes(text.encode())
    return path


def test_patch_replaces_its_text_and_nothing_else(tree: Path) -> None:
    # \r\n and the missing last newline must survive: the source is patched byte for byte
    path = write(tree, "x = f(np.int)\r\ny = np.int64")
    ONCE.apply(tree)
    assert path.read_bytes() == b"x = f(int)\r\ny = np.int64"


def test_patch_replaces_all_of_its_count(tree: Path) -> None:
    path = write(tree, "np.int), np.int)")
    dataclasses.replace(ONCE, count=2).apply(tree)
    assert path.read_text() == "int), int)"


@pytest.mark.parametrize(("text", "found"), [("", 0), ("np.int) np.int)", 2)])
def test_patch_stops_at_any_other_number_of_matches(tree: Path, text: str, found: int) -> None:
    path = write(tree, text)
    with pytest.raises(PatchError, match=rf"once: detectron2/a\.py .* {found} times, expected 1"):
        ONCE.apply(tree)
    assert path.read_text() == text


def test_patch_of_a_missing_file_names_patch_and_file(tree: Path) -> None:
    with pytest.raises(PatchError, match=r"once: no file detectron2/a\.py"):
        ONCE.apply(tree)


def test_patch_makes_a_new_file_but_overwrites_none(tree: Path) -> None:
    patch = dataclasses.replace(ONCE, old="", new="text\n")
    patch.apply(tree)
    assert (tree / patch.file).read_bytes() == b"text\n"
    with pytest.raises(PatchError, match=r"once: detectron2/a\.py already exists"):
        patch.apply(tree)


def test_every_patch_has_a_name_of_its_own_and_a_reason() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert all(patch.reason and patch.old != patch.new for patch in PATCHES)


def make_sdist(folder: Path, source: str) -> Path:
    """A source distribution with the folders that the build moves."""
    root = folder / "made" / "detectron2_cdo-0.5"
    (root / "detectron2" / "projects").mkdir(parents=True)
    (root / "detectron2" / "__init__.py").write_text('__version__ = "0.5"\n')
    (root / "detectron2" / "a.py").write_text(source)
    (root / "detectron2" / "projects" / "__init__.py").write_text("")
    (root / "LICENSE").write_text("the licence\n")
    for origin in wheel.PROJECTS:
        (root / "projects" / origin).mkdir(parents=True)
        (root / "projects" / origin / "__init__.py").write_text("")
    path = folder / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root, root.name)
    return path


def test_wheel_holds_the_patched_package_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "PATCHES", (ONCE,))
    tree = wheel.assemble(make_sdist(tmp_path, "f(np.int)\n"), tmp_path)
    wheel.pack(tree, tmp_path / "wheels")
    with zipfile.ZipFile(tmp_path / "wheels/detectron2-0.5+purepy-py3-none-any.whl") as archive:
        names = set(archive.namelist())
        info = "detectron2-0.5+purepy.dist-info"
        assert archive.read("detectron2/a.py") == b"f(int)\n"
        assert archive.read(f"{info}/LICENSE") == b"the licence\n"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    for project in ("point_rend", "deeplab", "panoptic_deeplab"):
        assert f"detectron2/projects/{project}/__init__.py" in names
    assert not any(name.startswith("projects/") for name in names)
    assert f"{info}/RECORD" in names
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", "0.5+purepy")
    assert "- once (detectron2/a.py): test" in metadata.get_payload()
    assert wheel.fingerprint() in metadata.get_payload()
    required = {canonicalize_name(Requirement(r).name) for r in metadata.get_all("Requires-Dist")}
    assert {"torch", "torchvision", "fvcore", "pycocotools"} <= required
    assert required.isdisjoint({"black", "future", "pydot"})


def test_patch_that_does_not_fit_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "PATCHES", (ONCE,))
    with pytest.raises(PatchError, match="patch once"):
        wheel.assemble(make_sdist(tmp_path, "f(int)\n"), tmp_path)


def test_hash_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.tar.gz"
    path.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(wheel.BuildError, match=f"{digest}, expected {wheel.SDIST_SHA256}"):
        wheel.check_hash(path)
    monkeypatch.setattr(wheel, "SDIST_SHA256", digest)
    wheel.check_hash(path)


def test_fingerprint_tells_patch_lists_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    before = wheel.fingerprint()
    assert before == wheel.fingerprint()
    changed = dataclasses.replace(PATCHES[0], new=PATCHES[0].new + "# changed\n")
    monkeypatch.setattr(wheel, "PATCHES", (changed, *PATCHES[1:]))
    assert wheel.fingerprint() != before
