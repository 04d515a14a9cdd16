"""tools/convert_records.py: a folder for each run becomes two files, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from ws_detectron.lab.study.records import read_records

TOOL = "convert_records.py"
STUDY = Path(__file__).parents[2] / "configs" / "studies" / "fashion_scenes_long.yaml"
ROWS = [{"iteration": 19, "loss": 0.1 + 0.2}, {"iteration": 19, "bbox/AP": float("nan")}]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return tmp_path / "cells"


def write_run(old: Path, name: str, seed: Any, **state: Any) -> None:
    folder = old / name
    folder.mkdir(parents=True)
    settings = {"SOLVER.BASE_LR": 0.1, "SOLVER.STEPS": [3, 4], "SEED": seed}
    cell = {"state": "finished", "settings": settings, "reason": "", "seconds": 1 / 3, **state}
    (folder / "cell.json").write_text(json.dumps(cell))
    (folder / "config.yaml").write_text(f"SOLVER:\n  BASE_LR: 0.1\n  STEPS: [3, 4]\nSEED: {seed}\n")
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "run_record.json").write_text('{"starts": 2}')


def test_states_and_every_value_are_kept(call_tool, old: Path, tmp_path: Path) -> None:
    write_run(old, "before_lost", 1)
    write_run(old, "sound", 2, lost=True)
    write_run(old, "diverged", 3, state="failed", reason="nan", lost=True)
    write_run(old, "killed", 4, state="failed", reason="killed", lost=False)
    write_run(old, "unclear", 5, state="failed", reason="unclear")
    status, output, errors = call_tool(TOOL, STUDY, old, tmp_path)
    assert status == 0 and "5 runs converted" in output, errors
    records = read_records(tmp_path)
    states = {name: record.state.state for name, record in records.items()}
    assert states == {
        "before_lost": "finished", "sound": "finished",
        "diverged": "diverged", "killed": "failed", "unclear": "failed",
    }  # fmt: skip
    assert json.dumps(records["killed"].rows) == json.dumps(ROWS)
    state = records["killed"].state
    assert (state.reason, state.seconds, state.settings["SEED"]) == ("killed", 1 / 3, 4)
    assert records["killed"].run_record == {"starts": 2}


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.yaml", "SOLVER:\n  BASE_LR: 0.1\n  STEPS: [3, 4]\nSEED: 1.0\n"),
        ("config.yaml", "SOLVER:\n  BASE_LR: 0.1\n  STEPS: [3, 4]\nSEED: 1\nMORE: 1\n"),
        ("cell.json", '{"state": "finished", "settings": {}, "reason": "", "seconds": 1.0}'),
    ],
)
def test_what_would_be_lost_is_named(
    call_tool, old: Path, tmp_path: Path, name: str, text: str
) -> None:
    write_run(old, "one", 1)
    (old / "one" / name).write_text(text)
    status, _, errors = call_tool(TOOL, STUDY, old, tmp_path)
    assert status == 2 and "cells/one/config.yaml would not be the same again" in errors


def test_a_folder_without_records(call_tool, old: Path, tmp_path: Path) -> None:
    status, _, errors = call_tool(TOOL, STUDY, old, tmp_path)
    assert status == 2 and "cells holds no folder with a cell.json" in errors
