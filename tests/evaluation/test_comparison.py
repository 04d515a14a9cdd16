import csv
from pathlib import Path

import pytest
from written_runs import write_run

from ws_detectron.evaluation.comparison import (
    as_csv,
    as_markdown,
    difference,
    differing_keys,
    duration,
    settings_table,
)
from ws_detectron.evaluation.runs import Run, read_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    write_run(tmp_path / "bn", top=50, options=["MODEL.RESNETS.NORM", "BN", "SEED", "7"])
    write_run(tmp_path / "gn", top=60, seconds=1.0)
    return read_runs([str(tmp_path / name) for name in ("bn", "gn", "missing")])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_metrics_and_differences(runs: list[Run]) -> None:
    lines = as_markdown(runs).splitlines()
    header = next(cells(line) for line in lines if line.startswith("| run"))
    rows = {cells(line)[0]: dict(zip(header, cells(line))) for line in lines if "|" in line}
    assert header[:4] == ["run", "box AP", "box AP50", "box APl"]
    assert (rows["bn"]["box AP"], rows["bn"]["mask AP"]) == ("50.00", "25.00")
    assert rows["gn"]["box AP"] == "60.00 (+10.00)" and rows["gn"]["box APl"] == "–"
    assert rows["gn"]["mask AP50"] == "35.00 (+5.00)"
    assert rows["gn"]["iterations"] == "100" and rows["gn"]["s/iteration"] == "1.000"
    assert rows["gn"]["training time"] == "1 min 40 s"
    assert rows["missing"]["box AP"] == rows["missing"]["training time"] == "–"
    assert any(line.startswith("- missing: there is no run folder") for line in lines)


def test_differing_keys_are_shown_and_no_others(runs: list[Run]) -> None:
    def keys() -> list[str]:
        return differing_keys([run.config for run in runs if run.config])

    assert keys() == ["MODEL.RESNETS.NORM", "SEED"]  # OUTPUT_DIR differs too
    text = as_markdown(runs)
    row = next(cells(line) for line in text.splitlines() if "`SEED`" in line)
    assert row == ["`SEED`", "`7`", "`1`"]
    del runs[0].config["SEED"]
    assert "SEED" in keys()
    row = next(cells(line) for line in as_markdown(runs).splitlines() if "`SEED`" in line)
    assert row == ["`SEED`", "–", "`1`"]
    runs[0].config["MODEL.FPN.NORM"] = ""
    assert "| `MODEL.FPN.NORM`     | `''` | `GN` |" in as_markdown(runs)
    assert "same data" not in text
    runs[0].config["DATASETS.TEST"] = ["other"]
    assert "Not all runs were evaluated on the same data" in as_markdown(runs)


def test_switches_of_ws_are_undefined_where_no_part_has_ws() -> None:
    """They are on by default, also in a config of detectron2's own parts."""
    head = {"MODEL.ROI_BOX_HEAD.NAME": "WSFastRCNNConvFCHead", "MODEL.WS.BOX_HEAD": False}
    bn = {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.WS.FPN": True, **head}
    ws = {**bn, "MODEL.BACKBONE.NAME": "build_ws_resnet_fpn_backbone", "MODEL.WS.MODE": "paper"}
    lines = settings_table({"a": bn, "b": ws}, [*ws]).splitlines()
    rows = {row[0]: row[1:] for row in map(cells, lines)}
    assert rows["`MODEL.WS.FPN`"] == ["–", "`True`"]
    assert rows["`MODEL.WS.BOX_HEAD`"] == ["`False`", "`False`"]
    assert rows["`MODEL.WS.MODE`"] == ["–", "`paper`"]


def test_csv_has_a_line_per_run_with_full_precision(runs: list[Run]) -> None:
    runs[1].metrics["bbox/AP"] = 60 + 1 / 3
    rows = list(csv.DictReader(as_csv(runs).splitlines()))
    assert [row["run"] for row in rows] == ["bn", "gn", "missing"]
    assert float(rows[1]["bbox/AP - baseline"]) == runs[1].metrics["bbox/AP"] - 50
    assert rows[0]["bbox/AP - baseline"] == "0.0" and rows[2]["bbox/AP"] == ""
    assert rows[1]["bbox/APl"] == "" and rows[1]["bbox/APl - baseline"] == ""
    assert (rows[0]["MODEL.RESNETS.NORM"], rows[1]["MODEL.RESNETS.NORM"]) == ("BN", "GN")
    assert float(rows[1]["training_seconds"]) == 100
    assert "there is no run folder" in rows[2]["problems"]


def test_undefined_metrics_have_no_difference() -> None:
    one, other = Run("a", Path(), metrics={"x": None}), Run("b", Path(), metrics={"x": 1.0})
    assert difference(one, other, "x") is None and difference(other, one, "x") is None
    assert difference(one, other, "y") is None


def test_durations_are_readable() -> None:
    assert duration(None) == "–"
    assert duration(59.6) == "1 min 00 s"
    assert duration(7384) == "2 h 03 min"
