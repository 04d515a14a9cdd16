import json
from pathlib import Path

import pytest

from ws_detectron.errors import DataError
from ws_detectron.lab.benchmark.benchmark_report import BEGIN, END, update_readme, write_measurement
from ws_detectron.lab.benchmark.operation import COPY, OURS

ABOUT = {"date": "2026-01-02 03:04 UTC", "cpu": "A CPU", "cores": 2, "torch": "2.11.0",
         "command": "python tools/benchmark.py operation"}  # fmt: skip
SPREAD = {"median": 1.234, "low": 1.1, "high": 1.3}


def operation() -> dict:
    names = [COPY, *OURS.values(), "another"]
    return {
        "kind": "operation", "filters": 53, "values": 23_454_912, "threads": 2,
        "seconds": {name: [0.1, 0.2] for name in names},
        "milliseconds": dict.fromkeys(names, SPREAD),
        "times_floor": dict.fromkeys(names, SPREAD),
        "times_ours": dict.fromkeys(names, {**SPREAD, "median": 6.5}),
        "peak_bytes": {"another": 3 * 2**20},
    }  # fmt: skip


def detector() -> dict:
    part = {
        "what": "training step", "images": 1, "short_side": 320, "variant": "plain",
        "seconds": {"gn": [1.0, 1.5], "gn_ws": [1.31, 1.02]},
        "median_seconds": {"gn": SPREAD, "gn_ws": SPREAD},
        "ratios": {"gn": SPREAD, "gn_ws": {"median": 1.01, "low": 1.0, "high": 1.02}},
        "peak_bytes": {"gn": 2**20, "gn_ws": 2**21},
        "refused": {"sync_bn": "ValueError: no GPU"},
    }  # fmt: skip
    return {"kind": "detector", "parts": [part]}


def test_measurement_is_written_as_json_and_table(tmp_path: Path) -> None:
    text = write_measurement(tmp_path, "cpu_operation", ABOUT, operation())
    assert (tmp_path / "cpu_operation.md").read_text() == text
    assert text.startswith("# Operation on a CPU")
    row = next(line for line in text.splitlines() if line.startswith("| another"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "another",
        "1.2 (1.1 to 1.3)",
        "1.23 (1.10 to 1.30)",
        "6.50 (1.10 to 1.30)",
        "3",
    ]
    assert "23,454,912 values" in text and "2 rounds" in text and "- torch: 2.11.0" in text
    assert json.loads((tmp_path / "cpu_operation.json").read_text())["about"] == ABOUT

    text = write_measurement(tmp_path, "cpu_step", ABOUT, detector())
    assert (
        "1.010 (1.000 to 1.020)" in text and "\nsync_bn does not run: ValueError: no GPU.\n" in text
    )
    assert "| 1020 (1.020)" in text and "| 1000 (1.000)" in text and "2 rounds" in text
    assert "| times gn" in text and "1234 (1100 to 1300)" in text


def test_classifier_is_compared_with_bn_and_with_keras_by_medians_and_by_fastest(
    tmp_path: Path,
) -> None:
    ratio = {"median": 1.2, "low": 1.1, "high": 1.3}
    part = {
        "batch_size": 2, "steps": 1000, "rounds": 2, "keras": "keras 3",
        "seconds": {
            "bn": [30.0, 20.0], "bn, compiled": [20.0, 16.0], "gn_ws": [33.0, 44.0],
            "gn_ws, compiled": [22.0, 23.0], "gn_ws, Keras": [55.0, 60.0],
        },
        "epoch_seconds": dict.fromkeys(
            ["bn", "bn, compiled", "gn_ws", "gn_ws, compiled", "gn_ws, Keras"],
            {"median": 9, "low": 8, "high": 10},
        ),
        "times_bn": dict.fromkeys(
            ["bn", "bn, compiled", "gn_ws", "gn_ws, compiled", "gn_ws, Keras"], ratio
        ),
        "times_keras": dict.fromkeys(["gn_ws", "gn_ws, compiled", "gn_ws, Keras"], ratio),
    }  # fmt: skip
    content = {"kind": "classifier", "parts": [part]}
    text = write_measurement(tmp_path, "cpu_classifier", ABOUT, content)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    spread = "1.20 (1.10 to 1.30)"
    assert [row for row in rows if row][2:] == [
        ["bn", "9.0 (8.0 to 10.0)", "20.0", spread, "1.00", "", ""],
        ["bn, compiled", "9.0 (8.0 to 10.0)", "16.0", spread, "1.00", "", ""],
        ["gn_ws", "9.0 (8.0 to 10.0)", "33.0", spread, "1.65", spread, "0.60"],
        ["gn_ws, compiled", "9.0 (8.0 to 10.0)", "22.0", spread, "1.38", spread, "0.40"],
        ["gn_ws, Keras", "9.0 (8.0 to 10.0)", "55.0", spread, "2.75", spread, "1.00"],
    ]


def test_parts_of_a_measurement_share_a_table(tmp_path: Path) -> None:
    content = detector()
    content["parts"].append({**content["parts"][0], "images": 16})
    text = write_measurement(tmp_path, "cpu_arms", ABOUT, content)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    columns = ["training step", "ms", "times gn", "fastest, ms (times)", "peak, MiB"]
    assert rows[0] == ["images", *columns]
    assert [row[:2] for row in rows[2:]] == [
        *[["1", "gn"], ["1", "gn_ws"], ["1", "sync_bn"]],
        *[["16", "gn"], ["16", "gn_ws"], ["16", "sync_bn"]],
    ]
    assert "variant plain" in text and "short side 320 pixels" in text


def test_readme_gets_the_main_tables_and_links_to_the_others(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    with pytest.raises(DataError, match="holds no measurements"):
        update_readme(readme, folder)
    write_measurement(folder, "cpu_operation", ABOUT, operation())
    write_measurement(folder, "cpu_step", ABOUT, detector())
    write_measurement(folder, "cpu_arms", ABOUT, detector())
    update_readme(readme, folder)
    once = readme.read_text()
    assert once.startswith("before\n" + BEGIN) and once.endswith(END + "\nafter\n")
    link = f"- [Arms on a CPU](results/cpu_arms.md), {ABOUT['date']}"
    places = [once.index(part) for part in ("**Step on a CPU**", "**Operation on a CPU**", link)]
    assert places == sorted(places) and "**Arms" not in once
    assert "old" not in once and "23,454,912 values" in once and "training step" in once
    assert (
        "A CPU, 2 cores, torch 2.11.0" in once and "`python tools/benchmark.py operation`" in once
    )
    update_readme(readme, folder)
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(DataError, match="needs the lines"):
        update_readme(readme, folder)
