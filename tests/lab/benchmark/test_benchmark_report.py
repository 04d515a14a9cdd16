from pathlib import Path

import pytest

from ws_detectron.errors import DataError
from ws_detectron.lab.benchmark.measurements import BEGIN, END, table, update_page
from ws_detectron.lab.benchmark.operation import COPY, OURS
from ws_detectron.utils.io import write_json

ROOT = Path(__file__).resolve().parents[3]
ABOUT = {"date": "2026-01-02 03:04 UTC", "cpu": "A CPU", "cores": 2, "torch": "2.11.0",
         "command": "python tools/benchmark.py operation"}  # fmt: skip
FACTS = {"images": 1, "short_side": 320, "mode": "plain"}


def operation() -> dict:
    seconds = {
        COPY: [0.1, 0.2, 0.1], OURS["official"]: [0.5, 1.0, 1.5], "another": [1.0, 4.0, 4.5]
    }  # fmt: skip
    part = {
        "facts": {"filters": 53, "values": 23_454_912}, "seconds": seconds,
        "peak_bytes": {"another": 3 * 2**20},
    }  # fmt: skip
    return {"about": ABOUT, "kind": "operation", "parts": [part]}


def steps(**facts: object) -> dict:
    part = {
        "facts": {**FACTS, **facts},
        "seconds": {"gn": [1.0, 1.5], "gn_ws": [1.01, 1.53]},
        "peak_bytes": {"gn": 2**20, "gn_ws": 2**21},
        "refused": {"sync_bn": "ValueError: no GPU"},
    }  # fmt: skip
    return {"about": ABOUT, "kind": "step", "parts": [part]}


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_operation_is_related_to_the_floor_and_to_ours() -> None:
    text = table(operation())
    headers, _, *found = rows(text)
    assert headers == [
        *["operation", "ms", "times the floor", "times ours (official)", "fastest (times)"],
        "peak, MiB",
    ]
    # the floor is 2.5 copies: 0.25, 0.5 and 0.25 s, so 4, 8 and 18 times; 2, 4 and 3 times ours
    assert found[2] == [
        "another", "4000.0 (2500.0 to 4250.0)", "8.00 (6.00 to 13.00)", "3.00 (2.50 to 3.50)",
        "1000.0 (2.00)", "3",
    ]  # fmt: skip
    assert found[0][5] == "" and "3 rounds; filters 53, values 23,454,912." in text


def test_facts_that_differ_are_columns() -> None:
    content = steps()
    content["parts"] += steps(images=16)["parts"]
    text = table(content)
    headers, _, *found = rows(text)
    columns = ["training step", "ms", "times gn", "fastest (times)", "peak, MiB"]
    assert headers == ["images", *columns]
    assert [row[:2] for row in found] == [
        *[["1", "gn"], ["1", "gn_ws"], ["1", "sync_bn"]],
        *[["16", "gn"], ["16", "gn_ws"], ["16", "sync_bn"]],
    ]
    # ratios are taken within a round: 1.01 and 1.02
    assert found[4][2:] == ["1270 (1140 to 1400)", "1.015 (1.013 to 1.018)", "1010 (1.010)", "2"]
    assert found[5][2:] == ["does not run", "", "", ""]
    assert text.count("2 rounds; short side 320, mode plain.") == 1
    assert text.count("sync_bn does not run: ValueError: no GPU.") == 1


def test_gpu_work_is_in_columns() -> None:
    content = steps()
    (part,) = content["parts"]
    part["gpu"] = {
        "gn": {"busy_seconds": 0.5, "launches": 100, "host_seconds": 0.2},
        "gn_ws": {"busy_seconds": 0.6, "launches": 101, "host_seconds": 0.25},
    }
    headers, _, _, gn_ws, _ = rows(table(content))
    assert headers[-3:] == ["GPU busy, ms", "host, ms", "kernel launches"]
    assert gn_ws[-3:] == ["600.00", "250.00", "101"]


def test_page_gets_all_tables(tmp_path: Path) -> None:
    page, folder = tmp_path / "docs" / "performance.md", tmp_path / "results"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    with pytest.raises(DataError, match="holds no measurements"):
        update_page(page, folder)
    about = {**ABOUT, "gpu": "A GPU"}
    write_json(folder / "cpu_operation.json", operation())
    write_json(folder / "cuda_step_modes.json", {**steps(), "about": about})
    update_page(page, folder)
    once = page.read_text()
    assert once.startswith("before\n" + BEGIN) and once.endswith(END + "\nafter\n")
    parts = [
        "### Step modes on a GPU\n\nA GPU, 2",
        "### Operation on a CPU\n\nA CPU, 2 cores",
    ]
    positions = [once.index(part) for part in parts]
    assert positions == sorted(positions) and "old" not in once
    assert table(operation()) in once and "](../results/cpu_operation.json)" in once
    assert "\n    python tools/benchmark.py operation\n" in once
    update_page(page, folder)
    assert page.read_text() == once
    page.write_text("no marks")
    with pytest.raises(DataError, match="needs the lines"):
        update_page(page, folder)


def test_committed_page_has_the_tables_of_the_committed_measurements(tmp_path: Path) -> None:
    committed = (ROOT / "docs" / "performance.md").read_text("utf-8")
    before, _, rest = committed.partition(BEGIN)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").symlink_to(ROOT / "results")
    page = tmp_path / "docs" / "performance.md"
    page.write_text(before + BEGIN + END + rest.partition(END)[2])
    update_page(page, tmp_path / "results" / "benchmark")
    assert page.read_text() == committed
    assert committed.count("\n### ") == len(list((ROOT / "results" / "benchmark").iterdir())) >= 13
