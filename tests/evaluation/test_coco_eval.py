import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from perturbed import perturbed_predictions
from plain_coco import plain_ap
from small_coco import annotations, prediction

from ws_detectron.errors import DataError
from ws_detectron.evaluation.coco_eval import (
    CATEGORY_METRICS,
    COCO_METRICS,
    CocoResult,
    evaluate,
    load_annotations,
    load_predictions,
)

BACKENDS = [pytest.param(False, id="fast"), pytest.param(True, id="reference")]
FIRST, SECOND = (10, 10, 20, 20), (60, 50, 40, 40)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_valid_files_are_read_unchanged(tmp_path: Path) -> None:
    truth, found = annotations([(1, 1, FIRST)]), [prediction(1, 1, FIRST, 0.5)]
    assert load_annotations(written(tmp_path / "a.json", truth)) == truth
    assert load_predictions(written(tmp_path / "p.json", found)) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "score must be a finite number"),
        ({"score": "high"}, "score must be a finite number, found 'high'"),
        ({"bbox": [1, 2, 3]}, "four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "negative width or height"),
        ({"score": None}, "has no 'score'"),
        ({"bbox": None, "segmentation": None}, "neither 'bbox' nor 'segmentation'"),
    ],
)
def test_malformed_predictions_are_named(tmp_path: Path, change: dict, message: str) -> None:
    good = prediction(1, 1, FIRST, 0.5)
    broken = {**good, **change}
    broken = {key: value for key, value in broken.items() if value is not None}
    with pytest.raises(DataError, match=f"p.json, entry 1: .*{message}"):
        load_predictions(written(tmp_path / "p.json", [good, broken]))


def test_files_that_are_no_predictions_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="swapped"):
        load_predictions(written(tmp_path / "p.json", annotations([])))
    with pytest.raises(DataError, match="entry 0: must be an object"):
        load_predictions(written(tmp_path / "p.json", [3]))
    with pytest.raises(DataError, match="there is no predictions file .*missing.json"):
        load_predictions(tmp_path / "missing.json")


def test_ids_of_another_data_set_are_named() -> None:
    truth = annotations([(1, 1, FIRST)])
    found = [prediction(n, 1, FIRST, 0.5) for n in (1, 7, 8, 9, 10, 11, 12)]
    with pytest.raises(DataError, match=r"p.json name 6 image ids .*7, .* and 1 more.*split"):
        evaluate(truth, found, annotations_name="a.json", predictions_name="p.json")
    with pytest.raises(DataError, match="1 category ids .*: 0 .*class numbers from 0"):
        evaluate(truth, [prediction(1, 0, FIRST, 0.5)])


def assert_equal_metrics(one: CocoResult, other: CocoResult) -> None:
    for task, metrics in one.metrics.items():
        assert metrics == pytest.approx(other.metrics[task], abs=1e-9)
        for own, others in zip(one.categories, other.categories):
            assert own.metrics[task] == pytest.approx(others.metrics[task], abs=1e-9)


def category_metrics(result: CocoResult, task: str) -> dict[Any, dict]:
    return {category.id: category.metrics[task] for category in result.categories}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_libraries_agree_on_coco(coco_root: Path, seed: int) -> None:
    truth = load_annotations(coco_root / "annotations" / "instances_val2017.json")
    assert any(annotation["iscrowd"] for annotation in truth["annotations"])
    found = perturbed_predictions(truth, seed, jitter=0.03 * (1 + seed))
    fast, reference = (evaluate(truth, found, reference=value) for value in (False, True))
    assert set(fast.metrics) == {"bbox", "segm"}
    assert 5 < fast.metrics["segm"]["AP"] < 95  # neither all right nor all wrong
    assert_equal_metrics(fast, reference)
    assert fast.backend.startswith("faster-coco-eval ")
    assert reference.backend.startswith("pycocotools ")


def test_both_libraries_agree_on_ties_crowds_and_empty_images() -> None:
    objects = [(1, 1, FIRST), (1, 1, SECOND), (2, 2, FIRST)]
    truth = annotations(objects, crowds=[(1, 1, (30, 30, 60, 60)), (2, 3, FIRST)], images=4)
    found = perturbed_predictions(truth, 0, miss=0, duplicate=1, background=8)
    for entry in found:
        entry["score"] = round(entry["score"], 1)
    fast, reference = (evaluate(truth, found, reference=value) for value in (False, True))
    assert_equal_metrics(fast, reference)


@pytest.mark.parametrize("reference", BACKENDS)
def test_metrics_worked_out_by_hand(reference: bool) -> None:
    """Of two objects the first is found, then there is a false positive.

    Precision is 1 up to recall 1/2, so 51 of the 101 recalls 0, 0.01, ..., 0.50 have precision 1
    and the others 0. Sizes: 400 and 1600 square pixels, so the first object is small (below 32 x
    32) and the second medium. The IoU of the found object is 20 * 16 / 400 = 0.8: enough for the
    thresholds 0.50, ..., 0.80, seven of ten.
    """
    truth = annotations([(1, 1, FIRST), (1, 1, SECOND)])
    found = [prediction(1, 1, (10, 10, 20, 16), 0.9), prediction(2, 1, SECOND, 0.8)]
    result = evaluate(truth, found, reference=reference)
    half = 100 * 51 / 101
    for task in ("bbox", "segm"):
        metrics = result.metrics[task]
        assert metrics["AP50"] == metrics["AP75"] == pytest.approx(half)
        assert metrics["AP"] == pytest.approx(0.7 * half)
        assert metrics["APs"] == pytest.approx(70) and metrics["APm"] == 0
        assert metrics["APl"] is None and metrics["ARl"] is None
        assert metrics["AR1"] == metrics["AR100"] == pytest.approx(0.7 * 50)
        assert tuple(metrics) == COCO_METRICS
        own = category_metrics(result, task)
        assert own[1]["AP"] == pytest.approx(0.7 * half)
        assert own[1]["AR100"] == pytest.approx(35)
        assert own[2] == own[3] == dict.fromkeys(CATEGORY_METRICS)
    assert (result.images, result.predictions, result.images_without_predictions) == (2, 2, 0)
    assert [(c.id, c.name, c.objects) for c in result.categories] == [
        (1, "class 1", 2),
        (2, "class 2", 0),
        (3, "class 3", 0),
    ]


@pytest.mark.parametrize("reference", BACKENDS)
def test_classes_without_objects_are_not_averaged(reference: bool) -> None:
    """Three classes: one perfect, one never found, one without objects but with a prediction."""
    truth = annotations([(1, 1, FIRST), (2, 2, FIRST)])
    found = [prediction(1, 1, FIRST, 0.9), prediction(1, 3, FIRST, 0.9)]
    result = evaluate(truth, found, reference=reference)
    assert result.metrics["bbox"]["AP"] == pytest.approx(50)
    own = category_metrics(result, "bbox")
    assert own[2]["AP"] == 0 and own[3]["AP"] is None
    assert result.images_without_predictions == 1


@pytest.mark.parametrize("reference", BACKENDS)
def test_no_predictions_are_ap_zero(reference: bool) -> None:
    truth = annotations([(1, 1, FIRST), (2, 2, SECOND)])
    result = evaluate(truth, [], reference=reference)
    for task in ("bbox", "segm"):
        assert result.metrics[task]["AP"] == 0 and result.metrics[task]["AR100"] == 0
        own = category_metrics(result, task)
        assert own[1]["AP"] == 0 and own[3]["AP"] is None


@pytest.mark.parametrize("reference", BACKENDS)
def test_nothing_to_find_is_undefined(reference: bool) -> None:
    result = evaluate(annotations([]), [prediction(1, 1, FIRST, 0.9)], reference=reference)
    assert set(result.metrics["bbox"].values()) == {None}


@pytest.mark.parametrize("reference", BACKENDS)
def test_an_object_with_id_zero_can_be_found(reference: bool) -> None:
    truth = annotations([(1, 1, FIRST)])
    truth["annotations"][0]["id"] = 0
    result = evaluate(truth, [prediction(1, 1, FIRST, 0.9)], reference=reference)
    assert result.metrics["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("reference", BACKENDS)
def test_area_of_a_detection_is_that_of_its_mask(reference: bool) -> None:
    """An unmatched detection with a large box and a small mask lowers only mask APs."""
    truth = annotations([(1, 1, FIRST)])
    wrong = {**prediction(2, 1, FIRST, 0.9), "bbox": [0, 0, 110, 95]}
    result = evaluate(truth, [wrong, prediction(1, 1, FIRST, 0.5)], reference=reference)
    assert result.metrics["bbox"]["APs"] == pytest.approx(100)
    assert result.metrics["segm"]["APs"] == pytest.approx(50)


@pytest.mark.parametrize("reference", BACKENDS)
def test_arguments_are_not_modified(reference: bool) -> None:
    truth = annotations([(1, 1, FIRST)], crowds=[(1, 1, SECOND)])
    found = [prediction(1, 1, FIRST, 0.9)]
    before = copy.deepcopy((truth, found))
    evaluate(truth, found, reference=reference)
    assert (truth, found) == before


def test_tasks_are_those_with_boxes_and_masks(caplog: pytest.LogCaptureFixture) -> None:
    truth = annotations([(1, 1, FIRST)])
    boxes: list[dict[str, Any]] = [prediction(1, 1, FIRST, 0.9)]
    del boxes[0]["segmentation"]
    with caplog.at_level(logging.WARNING):
        assert set(evaluate(truth, boxes, predictions_name="p.json").metrics) == {"bbox"}
    assert "task segm is skipped: predictions p.json have no masks" in caplog.text
    with pytest.raises(DataError, match="segm needs masks everywhere: entry 0 of predictions p.js"):
        evaluate(truth, boxes, ["segm"], predictions_name="p.json")
    masks = [prediction(1, 1, FIRST, 0.9)]
    del masks[0]["bbox"]
    assert set(evaluate(truth, masks).metrics) == {"segm"}
    with pytest.raises(DataError, match="task bbox needs boxes everywhere: entry 0"):
        evaluate(truth, masks, ["bbox"])
    del truth["annotations"][0]["segmentation"]
    assert set(evaluate(truth, []).metrics) == {"bbox"}
    with pytest.raises(DataError, match="entry 0 of annotations a.json has none"):
        evaluate(truth, [], ["segm"], annotations_name="a.json")
    with pytest.raises(DataError, match="no task can be evaluated: task bbox .*; task segm"):
        evaluate(truth, masks)


def test_masks_need_the_sizes_of_images() -> None:
    truth = annotations([(1, 1, FIRST)])
    del truth["images"][0]["height"], truth["images"][0]["width"]
    found = [prediction(1, 1, FIRST, 0.9)]
    assert set(evaluate(truth, found).metrics) == {"bbox"}
    with pytest.raises(DataError, match="segm needs image sizes everywhere: entry 0 of annotation"):
        evaluate(truth, found, ["segm"])


@pytest.mark.parametrize("empty", [None, [], "gone"])
def test_one_entry_without_a_mask_does_not_silence_mask_ap(empty: Any) -> None:
    """A dropped task would look like a model without masks."""
    truth = annotations([(1, 1, FIRST), (2, 1, SECOND)])
    found = [prediction(1, 1, FIRST, 0.9), prediction(2, 1, SECOND, 0.9)]
    for where, entries in (("annotations a", truth["annotations"]), ("predictions p", found)):
        whole = entries[1].pop("segmentation")
        if empty != "gone":
            entries[1]["segmentation"] = empty
        with pytest.raises(DataError, match=f"segm needs .*: entry 1 of {where}.*--task bbox"):
            evaluate(truth, found, annotations_name="a", predictions_name="p")
        alone = evaluate(truth, found, ["bbox"]).metrics
        assert set(alone) == {"bbox"} and alone["bbox"]["AP"] == pytest.approx(100)
        entries[1]["segmentation"] = whole
    assert set(evaluate(truth, found).metrics) == {"bbox", "segm"}


def ids_of_type(id_type: str, count: int, rng: np.random.Generator) -> list[Any]:
    """Different ids of a type that JSON allows, unordered; many look alike."""
    near = [int(n) for n in rng.permutation(4 * count)[:count]]
    made: list[Any] = {
        "small": near,
        "negative": [n - 2 * count for n in near],
        "large": [2**53 + n for n in near],
        "text": [("1_23", "12_3", "01", "1", "1 ")[n % 5] + "x" * (n // 5) for n in near],
        "mixed": [n if n % 2 else str(n + 1) for n in near],
    }[id_type]
    assert len({repr(i) for i in made}) == count
    return made


@pytest.mark.parametrize("reference", BACKENDS)
@pytest.mark.parametrize("id_type", ["small", "negative", "large", "text", "mixed"])
def test_ids_of_any_type_give_the_metrics_of_a_plain_reference(
    id_type: str, reference: bool
) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        images = ids_of_type(id_type, 4, rng)
        categories = ids_of_type(id_type, 3, rng)
        truth = annotations([], images=4)
        truth["images"] = [{**i, "id": n} for i, n in zip(truth["images"], images)]
        truth["categories"] = [{"id": n, "name": f"class {n!r}"} for n in categories]
        found = []
        for number in range(14):
            at = {
                "image_id": images[rng.integers(4)],
                "category_id": categories[rng.integers(3)],
            }
            box = [int(v) for v in (*rng.integers(0, 20, 2), *rng.choice([20, 50, 98], 2))]
            truth["annotations"].append(
                {
                    **at,
                    "id": number,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
            if rng.random() < 0.3:
                at["image_id"] = images[rng.integers(4)]
            moved = [float(v) for v in np.add(box, rng.integers(-4, 5, 4))]
            # scores of one image differ, as the order of equal ones is the library's
            found.append({**at, "bbox": moved, "score": 0.9 - 0.01 * number})
        expected = plain_ap(truth, found)
        metrics = evaluate(truth, found, reference=reference).metrics["bbox"]
        for name, value in expected.items():
            assert metrics[name] == (value if value is None else pytest.approx(value)), name


def test_broken_masks_are_found_before_the_library_reads_them() -> None:
    truth = annotations([(1, 1, FIRST)])
    broken = prediction(1, 1, FIRST, 0.9)
    broken["segmentation"]["counts"] = broken["segmentation"]["counts"][:-1]
    with pytest.raises(DataError, match=r"p.json, entry 0 \(image id 1\): malformed RLE"):
        evaluate(truth, [broken], predictions_name="p.json")
    assert evaluate(truth, [broken], ["bbox"]).metrics["bbox"]["AP"] == pytest.approx(100)


def test_without_the_fast_library_the_other_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with caplog.at_level(logging.WARNING):
        result = evaluate(annotations([(1, 1, FIRST)]), [])
    assert result.backend.startswith("pycocotools ")
    assert "pip install faster-coco-eval" in caplog.text
