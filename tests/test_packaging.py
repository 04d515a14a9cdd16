"""The wheel, its dependencies, and the pinned versions."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ws_detectron

ROOT = Path(__file__).parents[1]
# What a user of detectron2 has, and what pip must not choose for them; setup.py says why.
# triton comes with torch, where there is one for the machine
CHOSEN_BY_THE_USER = {"cv2", "detectron2", "torch", "torchvision", "triton"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built from a copy so that the repository stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("configs", "ws_detectron", "tools", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "ws_doctor.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if (ROOT / "README.md").exists():
        shutil.copy(ROOT / "README.md", source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "--quiet", "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def requirements(metadata: Message, extras: bool) -> set[str]:
    """Names of the unconditional dependencies, or of the extras' ones."""
    parsed = (Requirement(text) for text in metadata.get_all("Requires-Dist"))
    return {canonicalize_name(r.name) for r in parsed if ("extra" in str(r.marker)) is extras}


def test_wheel_holds_the_package_and_its_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    files = (p for p in (ROOT / "ws_detectron").rglob("*") if p.is_file())
    package = {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
    files = [p for kind in ("yaml", "py") for p in (ROOT / "configs").rglob(f"*.{kind}")]
    configs = {p.relative_to(ROOT).as_posix() for p in files}
    assert len(configs) > 10 and "configs/lazy/mask_rcnn_R_18_FPN_shapes_gn_ws.py" in configs
    assert "ws_detectron/py.typed" in package
    assert names == package | {"ws_doctor.py"} | {f"ws_detectron/{name}" for name in configs}


def test_doctor_runs_from_the_wheel_with_nothing_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        (entries,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        assert "ws-doctor = ws_doctor:main" in archive.read(entries).decode()
    command = [sys.executable, "-S", "-m", "ws_doctor"]  # -S: without site-packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.returncode == 1 and done.stderr == ""
    assert "problem: torch: not installed" in done.stdout


def test_installed_wheel_finds_its_configs_without_the_repository(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml"
    code = (
        "from ws_detectron import model_zoo\n"
        f"print(model_zoo.get_config_file({name!r}))\n"
        f"print(model_zoo.get_config({name!r}).MODEL.RESNETS.NORM)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, norm = done.stdout.split()[-2:]
    assert path == str(tmp_path / "site" / "ws_detectron" / "configs" / name)
    assert norm == "GN"


def test_metadata(metadata: Message) -> None:
    assert canonicalize_name(metadata["Name"]) == "ws-detectron"
    assert metadata["Version"] == ws_detectron.__version__
    assert metadata["Requires-Python"] == ">=3.9"
    assert {"dev", "export", "fast-eval", "lab", "plots", "slurm"} <= set(
        metadata.get_all("Provides-Extra")
    )


def test_dependencies_leave_the_users_choices_alone(metadata: Message) -> None:
    names = requirements(metadata, extras=False)
    assert names.isdisjoint(CHOSEN_BY_THE_USER)
    assert not any(name.startswith("opencv") for name in names)


def test_dependencies_are_what_the_package_imports(metadata: Message) -> None:
    imported = set()
    for path in (ROOT / "ws_detectron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    foreign = (
        imported - set(sys.stdlib_module_names) - {"ws_detectron", "ws_doctor"} - CHOSEN_BY_THE_USER
    )
    needed = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in foreign}
    declared = requirements(metadata, extras=False) | requirements(metadata, extras=True)
    assert needed <= declared


def test_installing_into_this_environment_wants_nothing_else(wheel: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--report", str(report), str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {i["metadata"]["name"] for i in json.loads(report.read_text())["install"]}
    assert {canonicalize_name(name) for name in wanted} <= {"ws-detectron"}


def test_setup_imports_nothing_but_the_standard_library_and_setuptools() -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"setuptools"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    parts = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in parts}


def test_constraints_pin_every_tool_and_not_detectron2(metadata: Message) -> None:
    wanted = {Requirement(text).name for text in metadata.get_all("Requires-Dist")}
    wanted |= {"torch", "torchvision", "setuptools", "wheel", "tensorboard"}
    assert {canonicalize_name(name) for name in wanted} <= set(pins())
    assert "detectron2" not in pins()


def test_pre_commit_runs_the_pinned_versions() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {"ruff-check", "ruff-format", "mypy"} <= {hook["id"] for hook in hooks}
    pinned = pins()
    for hook in hooks:
        for dependency in hook.get("additional_dependencies", []):
            name, version = dependency.split("==")
            assert version == pinned[canonicalize_name(name)], hook["id"]


def test_ci_runs_the_checks_and_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = script.read_text("utf-8").splitlines()
    assert {"set -euo pipefail", "make lint", "make test"} <= set(commands)
    assert not any(re.search(r"\|\||\|", line) for line in commands if line.startswith("make"))
