import csv
import json
from pathlib import Path

import pytest
from small_coco import annotations, prediction

from ws_detectron.errors import UserError
from ws_detectron.evaluation.coco_eval import COCO_METRICS, CocoResult, evaluate
from ws_detectron.evaluation.coco_report import as_text, write_reports

BOX = (10, 10, 20, 20)


@pytest.fixture
def result() -> CocoResult:
    truth = annotations([(1, 1, BOX)], categories=2)
    return evaluate(truth, [prediction(1, 1, BOX, 0.9), prediction(1, 1, BOX, 0.95)])


def test_screen_shows_dashes_where_there_is_nothing_to_find(result: CocoResult) -> None:
    lines = as_text(result).splitlines()
    [first] = [line.split() for line in lines if line.startswith("class 1")]
    [second] = [line.split() for line in lines if line.startswith("class 2")]
    assert first == ["class", "1", "1", *["100.00"] * 6]
    assert second == ["class", "2", "0", *["–"] * 6]
    [box] = [line.split() for line in lines if line.split()[:1] == ["box"]]
    # AP, AP50, AP75, small, medium, large; the object of 400 pixels is small
    assert box[1:] == ["100.00"] * 4 + ["–"] * 2 + ["100.00"] * 4 + ["–"] * 2
    assert "-1" not in as_text(result)
    assert "1 images have no prediction" in as_text(result)


def test_files_hold_full_precision_and_null(result: CocoResult, tmp_path: Path) -> None:
    json_path, csv_path = write_reports(result, tmp_path / "new", weights="model.pth")
    content = json.loads(json_path.read_text())
    assert content["weights"] == "model.pth"
    assert content["bbox"] == result.metrics["bbox"] and content["bbox"]["APl"] is None
    assert content["categories"][1]["segm"]["AP"] is None
    rows = list(csv.DictReader(csv_path.read_text().splitlines()))
    assert [(row["task"], row["category"]) for row in rows] == [
        (task, name) for task in ("bbox", "segm") for name in ("all", "class 1", "class 2")
    ]
    assert float(rows[0]["AP"]) == result.metrics["bbox"]["AP"]
    assert [rows[2][name] for name in COCO_METRICS] == [""] * 12  # no object of the second class
    assert [row["objects"] for row in rows[:3]] == ["1", "1", "0"]


def test_what_cannot_be_written_is_named(result: CocoResult, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/.*: "):
        write_reports(result, tmp_path / "file")
