import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_coco import annotations, prediction

from ws_detectron.evaluation.coco_eval import evaluate
from ws_detectron.lab.benchmark.coco_eval_timing import (
    BACKENDS,
    enlarged,
    largest_difference,
    measure,
    write_measurement,
)
from ws_detectron.lab.benchmark.perturb import perturbed_predictions
from ws_detectron.utils.environment import environment

BOX = (10, 10, 20, 20)


def test_a_set_is_enlarged_under_new_ids() -> None:
    truth = annotations([(1, 1, BOX), (1, 2, BOX), (2, 3, BOX)])
    large = enlarged(truth, 5)
    assert [image["id"] for image in large["images"]] == [1, 2, 3, 4, 5]
    assert [image["file_name"] for image in large["images"][2:]] == ["1.png", "2.png", "1.png"]
    found = [(a["id"], a["image_id"], a["category_id"]) for a in large["annotations"]]
    assert found == [
        *[(1, 1, 1), (2, 1, 2), (3, 2, 3), (4, 3, 1)],
        *[(5, 3, 2), (6, 4, 3), (7, 5, 1), (8, 5, 2)],
    ]


def test_differences_of_results_are_found() -> None:
    truth = annotations([(1, 1, BOX)])
    one = evaluate(truth, [prediction(1, 1, BOX, 0.9)])
    assert largest_difference(one, one) == 0
    metrics = {**one.metrics, "bbox": {**one.metrics["bbox"], "AP75": 99.5}}
    assert largest_difference(one, replace(one, metrics=metrics)) == pytest.approx(0.5)
    metrics["bbox"] = {**one.metrics["bbox"], "AP75": None}
    assert largest_difference(one, replace(one, metrics=metrics)) == float("inf")
    own = {1: {**one.per_category["segm"][1], "APs": 98.0}}
    by_category = {**one.per_category, "segm": {**one.per_category["segm"], **own}}
    assert largest_difference(one, replace(one, per_category=by_category)) == pytest.approx(2)


def test_a_measurement_is_written_down(tmp_path: Path) -> None:
    truth = annotations([(1, 1, BOX)])
    measured = measure(truth, perturbed_predictions(truth, 0), rounds=2)
    assert measured["largest_difference"] < 1e-9
    for values in measured["tasks"].values():
        fast, slow = values["wall_s"].values()
        assert values["ratio"] == [b / a for a, b in zip(fast, slow)] and len(fast) == 2
    text = write_measurement(tmp_path, environment((*BACKENDS, "numpy")), measured)
    assert text == (tmp_path / "benchmark.md").read_text()
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(content["tasks"]) == {"bbox", "segm"} and content["cpu"] and content["date"]
    for name in ("faster-coco-eval", "pycocotools", "numpy"):
        assert f"- {name}: {content[name]}" in text
