"""Runs the tests with combinations of Python, torch and detectron2; writes a table of the results.

Each cell makes its own environment by `make set-up` in a temporary folder (6 GB), runs the tests
there and deletes it. For Python 3.11 and newer, all packages but torch and what torch brings have
the versions of constraints.txt; older Pythons get the newest that there are for them.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from install_detectron2 import RELEASES
from packaging.version import Version

from ws_detectron.utils.command_line import ToolParser, progress, verdict
from ws_detectron.utils.environment import cpu_model, package_version, utc_now
from ws_detectron.utils.io import atomic_write

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = [f"3.{minor}" for minor in range(9, 15)]
TORCH = ("2.11.0", "2.14.1")
# What torch requires in versions of its own; 2.11 wants setuptools before 82.
TORCH_FAMILY = re.compile(r"(torch|torchvision|triton|setuptools|cuda-\w+|nvidia-[\w-]+)==")
CELL = ["python", "torch", "detectron2", "tests"]
HEAD = """\
# Tested versions

Written by `tools/test_matrix.py`: each row is an environment of its own, made by `make set-up`, and
the tests in it. Rows stay from earlier runs until the same cell runs again.

"""
EXAMPLES = """
examples:
  python tools/test_matrix.py                      # all combinations of the Pythons that are found
  python tools/test_matrix.py --python python3.12 --torch 2.11.0 --detectron2 0.5
  python tools/test_matrix.py -- tests/layers tests/modeling

The exit status is 1 if tests of a cell failed or its environment could not be made.
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = ToolParser(__doc__, EXAMPLES)
    pythons = "interpreters; default: those of python3.9 to python3.14 that are found"
    parser.add_argument("--python", nargs="+", metavar="COMMAND", help=pythons)
    parser.add_argument("--torch", nargs="+", default=TORCH, help="versions")
    releases = sorted(RELEASES)
    parser.add_argument(
        "--detectron2", nargs="+", choices=releases, default=releases, help="releases"
    )
    parser.add_argument("--processes", default="auto", help="of pytest (default: one per core)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "matrix", help="folder")
    parser.add_argument("tests", nargs="*", help="what pytest runs (default: all tests)")
    options = parser.parse_args(arguments)
    found = options.python or list(find_pythons())
    cells = [*itertools.product(found, options.torch, options.detectron2)]
    checked = {}
    for python, torch, release in progress(cells, "testing", "environment"):
        name = f"{python}, torch {torch}, detectron2 {release}"
        print(f"=== {name}", flush=True)
        row = run_cell(python, torch, release, options.tests, options.processes)
        checked[name] = row["result"] == "passed"
        print(write_row(row, options.output))
    then = "commit the report; the README names the versions that are tested"
    return verdict(checked, "environments pass the tests", options.output / "README.md", then)


def find_pythons() -> Iterator[str]:
    """Commands of the Python versions that this machine has."""
    for version in VERSIONS:
        command = shutil.which(f"python{version}")
        # one of pyenv may be there for a version that is not
        if command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0:
            yield command


def constraints(python: str, torch: str) -> str:
    """A pip constraints file with another torch, and nothing else for Pythons before 3.11."""
    lines = [f"torch=={torch}\n"]
    if tuple(map(int, python.split(".")[:2])) >= (3, 11):
        pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines(keepends=True)
        lines += [line for line in pinned if not TORCH_FAMILY.match(line)]
    return "".join(lines)


def run_cell(
    command: str, torch: str, release: str, tests: Sequence[str], processes: str
) -> dict[str, Any]:
    """Makes an environment and runs the tests in it; returns its row of the table.

    Args:
        command: the interpreter.
        torch: a version.
        release: of detectron2, a key of `RELEASES`.
        tests: files and options for pytest; all tests if empty.
        processes: how many of pytest.
    """
    show = "import platform; print(platform.python_version())"
    done = subprocess.run([command, "-c", show], check=True, stdout=subprocess.PIPE, text=True)
    cell = (done.stdout.strip(), torch, release, " ".join(tests) or "all")
    row: dict[str, Any] = dict(zip(CELL, cell))
    row |= {"result": "not installed", "passed": 0, "failed": 0, "skipped": 0}
    code = package_version()  # it may change while the tests run
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "constraints.txt").write_text(constraints(row["python"], torch))
        variables = {
            "PYTHON": command,
            "VENV": str(folder / "venv"),
            "CONSTRAINTS": str(folder / "constraints.txt"),
            "DETECTRON2": release,
        }
        make = ["make", "set-up", *(f"{key}={value}" for key, value in variables.items())]
        if subprocess.run(make, cwd=ROOT).returncode == 0:
            report = folder / "tests.xml"
            pytest = [str(folder / "venv" / "bin" / "python"), "-m", "pytest", "--dist=worksteal"]
            pytest += [f"--numprocesses={processes}", f"--junit-xml={report}", *tests]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            status = subprocess.run(pytest, cwd=ROOT, env=environment).returncode
            row["result"] = "passed" if status == 0 else "failed"
            row |= count_tests(report) if report.exists() else {}
    minutes = round((time.monotonic() - start) / 60)
    return row | {
        "minutes": minutes,
        "date": utc_now()[:10],
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "ws_detectron": code,
    }


def count_tests(report: Path) -> dict[str, int]:
    """Passed, failed (or with an error) and skipped tests of pytest's JUnit file."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, skipped, *bad = (
        int(suite.attrib[key]) for key in ("tests", "skipped", "failures", "errors")
    )
    return {"passed": total - skipped - sum(bad), "failed": sum(bad), "skipped": skipped}


def write_row(row: dict[str, Any], output: Path) -> str:
    """Replaces the row of this cell in `matrix.csv` and writes README.md; returns the table."""
    import pandas as pd

    path = output / "matrix.csv"
    table = pd.DataFrame([row], dtype=str)
    if path.exists():
        table = pd.concat([pd.read_csv(path, dtype=str), table]).drop_duplicates(CELL, keep="last")
    table = table.sort_values(
        CELL, key=lambda column: column if column.name == "tests" else column.map(Version)
    )
    text = table.to_markdown(index=False, disable_numparse=True)
    with atomic_write(path) as file:
        table.to_csv(file, index=False)
    with atomic_write(output / "README.md") as file:
        file.write(HEAD + text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
