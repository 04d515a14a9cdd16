"""Converts the records of a study: a folder for each run becomes runs.jsonl and metrics.csv.

Until 2026-11-27 `run_study.py --records DIR` kept cell.json, config.yaml, metrics.json and
run_record.json of each run in a folder of its name. This writes the two files that it keeps now,
and proves that nothing is lost: expanded again, they give every old file. The old folders stay.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ws_detectron.engine import as_flat_dict
from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.lab.study import read_study
from ws_detectron.lab.study.records import (
    DIVERGED,
    FAILED,
    Record,
    RunState,
    read_records,
    write_records,
)
from ws_detectron.utils.yaml_files import load_yaml_with_base

EXAMPLE = """
example:
  python tools/convert_records.py configs/studies/fashion_scenes_6400_1img.yaml \\
      results/batch_size_study_6400_1img/cells results/batch_size_study_6400_1img
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="its study file, for the title")
    parser.add_argument("old", type=Path, help="folder with a folder for each run")
    parser.add_argument("new", type=Path, help="folder for runs.jsonl and metrics.csv")
    args = parser.parse_args()
    with exit_on_user_error():
        folders = {path.parent.name: path.parent for path in sorted(args.old.glob("*/cell.json"))}
        if not folders:
            raise UserError(f"{args.old} holds no folder with a cell.json")
        kept = read_records(args.new)
        converted = {name: _record(folder) for name, folder in folders.items()}
        write_records(args.new, read_study(args.study).title, {**kept, **converted})
        written = read_records(args.new)
        for name, folder in folders.items():
            _check(folder, written[name])
    print(f"{len(folders)} runs converted to {args.new}; expanded again, they equal the old files")


def _record(folder: Path) -> Record:
    state = _json(folder / "cell.json")
    if state["state"] == FAILED and state.pop("lost", False):
        state["state"] = DIVERGED
    # of other states it was always set, and said nothing
    state.pop("lost", None)
    lines = (folder / "metrics.json").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Record(RunState(**state), rows, _json(folder / "run_record.json"))


def _check(folder: Path, record: Record) -> None:
    """Compares texts, as 1, 1.0 and true are equal in Python, and NaN is not equal to itself."""
    old, state = _json(folder / "cell.json"), record.state
    diverged = state.state == DIVERGED
    new: dict[str, Any] = {
        "state": FAILED if diverged else state.state,
        "settings": state.settings,
        "reason": state.reason,
        "seconds": state.seconds,
    }
    if "lost" in old:
        new["lost"] = diverged or state.state != FAILED
    merged = as_flat_dict(CfgNode(load_yaml_with_base(folder / "config.yaml")))
    lines = (folder / "metrics.json").read_text("utf-8").splitlines()
    for name, before, after in (
        ("cell.json", old, new),
        ("config.yaml", merged, state.settings),
        ("metrics.json", [json.loads(line) for line in lines], record.rows),
        ("run_record.json", _json(folder / "run_record.json"), record.run_record),
    ):
        if json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):
            raise UserError(f"{folder / name} would not be the same again")


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


if __name__ == "__main__":
    main()
