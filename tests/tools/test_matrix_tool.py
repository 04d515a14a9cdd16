"""Cells, their environments and the table of the test matrix, without installing anything."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import test_matrix as matrix

REPORT = """\
<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>
"""


class Machine:
    """Answers what the tool runs: interpreters, `make set-up` and pytest."""

    def __init__(self) -> None:
        self.environments: list[dict[str, str]] = []
        self.pytest: list[list[str]] = []
        self.broken = ""  # the torch that cannot be installed
        self.status = 0  # of pytest

    def run(self, command: list[str], **_: Any) -> Any:
        if command[1] == "-c":
            return SimpleNamespace(returncode=0, stdout=f"{command[0].removeprefix('python')}.4\n")
        if command[:2] == ["make", "set-up"]:
            found = dict(variable.split("=", 1) for variable in command[2:])
            found["pins"] = Path(found["CONSTRAINTS"]).read_text()
            self.environments.append(found)
            failed = f"torch=={self.broken}\n" in found["pins"]
            return SimpleNamespace(returncode=2 if failed else 0)
        (report,) = (a.partition("=")[2] for a in command if a.startswith("--junit-xml"))
        Path(report).write_text(REPORT)
        self.pytest.append(command)
        return SimpleNamespace(returncode=self.status)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(matrix, "subprocess", SimpleNamespace(run=machine.run, PIPE=-1))
    return machine


def run(folder: Path, *arguments: str) -> int:
    return matrix.main(["--output", str(folder), *arguments])


def rows(folder: Path) -> list[list[str]]:
    table = pd.read_csv(folder / "matrix.csv", dtype=str)
    assert (folder / "README.md").read_text().count("\n| 3.") == len(table)
    return table[[*matrix.CELL, "result", "passed", "failed", "skipped"]].to_numpy().tolist()


def test_each_cell_has_its_own_environment(tmp_path: Path, machine: Machine) -> None:
    one = ["--python", "python3.12", "--torch", "2.11.0"]
    assert run(tmp_path, *one, "--", "tests/layers", "tests/engine") == 0
    assert [e["DETECTRON2"] for e in machine.environments] == ["0.5", "0.6"]
    assert {e["PYTHON"] for e in machine.environments} == {"python3.12"}
    first, second = (Path(e["VENV"]) for e in machine.environments)
    assert first != second and not first.parent.exists()
    assert machine.pytest[0][0] == str(first / "bin" / "python")
    assert machine.pytest[0][-2:] == ["tests/layers", "tests/engine"]
    paths = "tests/layers tests/engine"
    assert rows(tmp_path) == [
        ["3.12.4", "2.11.0", release, paths, "passed", "4", "3", "3"] for release in ("0.5", "0.6")
    ]


@pytest.mark.parametrize(("python", "pinned"), [("python3.10", False), ("python3.11", True)])
def test_pins_are_those_of_constraints_but_for_torch(
    tmp_path: Path, machine: Machine, python: str, pinned: bool
) -> None:
    run(tmp_path, "--python", python, "--torch", "2.11.0", "--detectron2", "0.6")
    pins = machine.environments[0]["pins"].splitlines()
    assert "torch==2.11.0" in pins
    assert ("yacs==0.1.8" in pins) is pinned
    own = (matrix.ROOT / "constraints.txt").read_text().splitlines()
    missing = {line.partition("==")[0] for line in set(own) - set(pins) if "==" in line}
    if pinned:
        assert {"torch", "torchvision", "triton", "nvidia-cublas", "cuda-toolkit"} <= missing
        assert all(n.startswith(("torch", "triton", "nvidia-", "cuda-")) for n in missing)


def test_a_cell_without_its_torch_is_recorded_and_the_next_one_runs(
    tmp_path: Path, machine: Machine
) -> None:
    machine.broken = "2.14.1"
    both = ["--python", "python3.9", "--torch", "2.14.1", "2.11.0", "--detectron2", "0.6"]
    assert run(tmp_path, *both) == 1
    assert rows(tmp_path) == [
        ["3.9.4", "2.11.0", "0.6", "all", "passed", "4", "3", "3"],
        ["3.9.4", "2.14.1", "0.6", "all", "not installed", "0", "0", "0"],
    ]


def test_a_row_is_replaced_by_the_same_cell_and_sorted(tmp_path: Path, machine: Machine) -> None:
    one = ["--torch", "2.11.0", "--detectron2", "0.6", "--python"]
    machine.status = 1
    assert run(tmp_path, *one, "python3.11", "python3.9") == 1
    machine.status = 0
    assert run(tmp_path, *one, "python3.11") == 0
    found = [(python, result) for python, _, _, _, result, *_ in rows(tmp_path)]
    assert found == [("3.9.4", "failed"), ("3.11.4", "passed")]


def test_pythons_that_cannot_run_are_not_found(tmp_path: Path, monkeypatch) -> None:
    for name, text in (
        ("python3.9", "#!/bin/sh\nexit 127\n"),
        ("python3.12", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(matrix.find_pythons()) == [str(tmp_path / "python3.12")]


def test_the_help_runs() -> None:
    tool = matrix.ROOT / "tools" / "test_matrix.py"
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--detectron2" in done.stdout
