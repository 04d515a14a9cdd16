"""docs/tour.ipynb runs, and its committed outputs are those of one whole run."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "tour.ipynb"
TOUR = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in TOUR.cells if cell.cell_type == "code"]


def printed(cells: list[nbformat.NotebookNode]) -> str:
    outputs = (output for cell in cells for output in cell.outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WS_TOUR_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tour = copy.deepcopy(TOUR)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(tour, timeout=300, kernel_name="python3", resources=place).execute()
    text = printed([cell for cell in tour.cells if cell.cell_type == "code"])
    # 20 in R-18, 8 in the FPN, 2 in the box head
    assert "trained: 30 convs with WS" in text and "folded: 0 convs with WS" in text
    assert "training on 2 images of my_train; 2 epochs of 2 steps" in text
    assert (tmp_path / "output" / "tour" / "folded.yaml").is_file()
    assert text.count("scale") == 6  # one depth, GN and GN+WS, three scales


def test_outputs_are_of_one_whole_run() -> None:
    assert [cell.execution_count for cell in CODE] == [*range(1, len(CODE) + 1)]
    types = [output.output_type for cell in CODE for output in cell.outputs]
    assert "error" not in types and types.count("display_data") == 4
    assert [o.name for c in CODE for o in c.outputs if o.get("name", "stdout") != "stdout"] == []
    assert printed(CODE).count("scale") == 12  # also R-50, which the quick run leaves out


def test_outputs_can_be_published() -> None:
    assert PATH.stat().st_size < 400_000
    assert re.findall(r"(?:^|[\s'\"(=])(?:/|~/|[A-Z]:\\)\w[^\s'\"]*", printed(CODE)) == []
