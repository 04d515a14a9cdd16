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
    measure_coco_eval,
)

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


def test_both_evaluators_are_timed_on_the_same_data(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(annotations([(1, 1, BOX), (1, 2, BOX), (2, 3, BOX)])))
    parts = list(measure_coco_eval(str(path), rounds=2, num_images=5, background=3))
    box, mask, both = parts
    assert [part["facts"]["task"] for part in parts] == ["box", "mask", "both"]
    assert box["facts"]["images"] == 5 and box["facts"]["objects"] == 8
    assert box["facts"]["largest_difference_in_percent"] < 1e-9
    for kind in ("seconds", "cpu_seconds"):
        for name in BACKENDS:
            assert len(box[kind][name]) == 2 and min(box[kind][name]) > 0
            sums = [a + b for a, b in zip(box[kind][name], mask[kind][name])]
            assert both[kind][name] == pytest.approx(sums)
