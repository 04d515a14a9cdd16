import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from perturbed import perturbed_predictions
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_coco import annotations, prediction

from ws_detectron.evaluation.coco_curves import (
    ALL,
    BACKGROUND,
    COMPARED,
    FILES,
    best_text,
    best_threshold,
    curve_tables,
    draw_confusions,
    draw_f1,
    draw_precision_recall,
    draw_runs,
    read_curves,
    write_curves,
)
from ws_detectron.evaluation.coco_eval import evaluate

FIRST, SECOND, THIRD = (10, 10, 20, 20), (60, 50, 40, 40), (40, 10, 15, 15)


def tables_of(truth: dict, found: list, tasks: Any = None) -> dict:
    return curve_tables(truth, found, evaluate(truth, found, tasks))


def where(rows: list, **wanted: Any) -> list:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def perturbed() -> tuple[dict, list]:
    """Sixty images of up to four objects of three classes, one crowd, and errors of every type."""
    draw = np.random.default_rng(0)
    objects = [
        (n, int(draw.integers(1, 4)), [*draw.uniform(0, 60, 2), *draw.uniform(15, 35, 2)])
        for n in range(1, 61)
        for _ in range(draw.integers(0, 5))
    ]
    truth = annotations(objects, crowds=[(1, 1, (60, 60, 30, 30))], images=60)
    return truth, perturbed_predictions(truth, 1)


@pytest.fixture(scope="module")
def reference(perturbed: tuple) -> COCOeval:
    """COCO's own code, on boxes."""
    truth, found = perturbed
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "info": {}}
        coco.createIndex()
        boxes = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in found]
        evaluation = COCOeval(coco, coco.loadRes(boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def test_precision_is_that_of_cocos_code(perturbed: tuple, reference: COCOeval) -> None:
    rows = where(tables_of(*perturbed)["precision_recall"], task="bbox")
    precision = 100 * reference.eval["precision"][:, :, :, 0, -1]
    expected = {
        (ALL, "0.5"): precision[0].mean(axis=1),
        (ALL, "0.75"): precision[5].mean(axis=1),
        (ALL, "mean of ten IoUs"): precision.mean(axis=(0, 2)),
        **{(f"class {k + 1}", "0.5"): precision[0, :, k] for k in range(3)},
    }
    assert len(rows) == 101 * len(expected)
    for (category, iou), values in expected.items():
        curve = where(rows, category=category, iou=iou)
        assert [row["recall"] for row in curve] == list(range(101))
        np.testing.assert_allclose([row["precision"] for row in curve], values, atol=1e-9)


def test_f1_counts_what_cocos_code_matches(perturbed: tuple, reference: COCOeval) -> None:
    rows = where(tables_of(*perturbed)["f1_over_confidence"], task="bbox")
    matches = [m for m in reference.evalImgs if m is not None and m["aRng"] == [0, 1e10]]
    for category, some in [
        (ALL, matches),
        ("class 2", [m for m in matches if m["category_id"] == 2]),
    ]:
        scores, true, ignored = (
            np.concatenate([np.ravel(m[key])[: len(m["dtScores"])] for m in some])
            for key in ("dtScores", "dtMatches", "dtIgnore")
        )
        objects = sum(int((~np.asarray(m["gtIgnore"], dtype=bool)).sum()) for m in some)
        for threshold in (0.0, 0.3, 0.5, 0.77):
            kept = (scores >= threshold) & ~ignored.astype(bool)
            hits = int((true[kept] > 0).sum())
            [row] = where(rows, category=category, score=threshold)
            assert row["recall"] == pytest.approx(100 * hits / objects)
            assert row["precision"] == pytest.approx(100 * hits / kept.sum())
            assert row["f1"] == pytest.approx(200 * hits / (kept.sum() + objects))


def test_confusions_add_up(perturbed: tuple) -> None:
    """The diagonal has the true positives, rows the objects, columns the predictions."""
    truth, found = perturbed
    tables = tables_of(truth, found, ["bbox"])
    rows, best = tables["confusion_matrix"], best_threshold(tables["f1_over_confidence"], "bbox")
    assert best is not None and {row["score"] for row in rows} == {best["score"]}
    single = [a for a in truth["annotations"] if not a["iscrowd"]]
    hits = sum(row["count"] for row in rows if row["annotated"] == row["predicted"])
    assert 100 * hits / len(single) == pytest.approx(best["recall"])
    predicted = sum(row["count"] for row in rows if row["predicted"] != BACKGROUND)
    assert 100 * hits / predicted == pytest.approx(best["precision"])
    for number in (1, 2, 3):
        own = where(rows, annotated=f"class {number}")
        assert sum(row["count"] for row in own) == sum(a["category_id"] == number for a in single)
        assert sum(row["percent"] for row in own) == pytest.approx(100)


def test_confusions_worked_out_by_hand() -> None:
    """FIRST is found though another class has a higher score there; SECOND is taken for class 3;
    THIRD is missed; a prediction on nothing, and one on a crowd, which does not count."""
    crowd = (80, 5, 30, 30)
    truth = annotations(
        [(1, 1, FIRST), (1, 2, SECOND), (2, 2, THIRD)], crowds=[(1, 1, crowd)], images=2
    )
    found = [
        prediction(1, 3, FIRST, 0.95),
        prediction(1, 1, FIRST, 0.9),
        prediction(1, 3, SECOND, 0.9),
        prediction(1, 1, (85, 8, 12, 12), 0.9),
        prediction(2, 1, (70, 70, 20, 20), 0.9),
        prediction(2, 2, THIRD, 0.05),  # below the best threshold
    ]
    # at 0.05: 2 hits of 5 predictions and 3 objects, 4 / 8; above it: 1 hit of 4, 2 / 7
    rows = tables_of(truth, found[:-1], ["bbox"])["confusion_matrix"]
    counted = {(row["annotated"], row["predicted"]): row["count"] for row in rows}
    assert counted == {
        ("class 1", "class 1"): 1,
        ("class 2", "class 3"): 1,
        ("class 2", BACKGROUND): 1,
        (BACKGROUND, "class 3"): 1,
        (BACKGROUND, "class 1"): 1,
    }
    best = best_threshold(tables_of(truth, found, ["bbox"])["f1_over_confidence"], "bbox")
    assert best is not None and best["score"] == 0 and best["f1"] == pytest.approx(50)


def test_best_f1_worked_out_by_hand() -> None:
    """One object found with 0.8, one false prediction with 0.4: F1 2/3, above 0.4 it is 1."""
    truth = annotations([(1, 1, FIRST)], categories=1)
    found = [prediction(1, 1, FIRST, 0.8), prediction(1, 1, SECOND, 0.4)]
    tables = tables_of(truth, found, ["bbox"])
    curve = where(tables["f1_over_confidence"], category=ALL)
    f1 = [row["f1"] for row in curve]
    assert f1[:41] == pytest.approx([200 / 3] * 41) and f1[41:81] == pytest.approx([100] * 40)
    assert f1[81:] == [0] * 20 and curve[-1]["precision"] is None
    assert best_text(tables) == "best box F1 100.00 % with a score of 0.41 and more"


def test_groups_worked_out_by_hand() -> None:
    """One object alone, found; two in an image, of which one is found: 51 of 101 recalls."""
    truth = annotations([(1, 1, FIRST), (2, 1, FIRST), (2, 1, SECOND)], images=3)
    found = [prediction(1, 1, FIRST, 0.9), prediction(2, 1, FIRST, 0.9)]
    rows = tables_of(truth, found, ["bbox"])["ap_by_group"]
    by_count = {row["value"]: row for row in where(rows, group="objects per image")}
    assert by_count["1"]["AP"] == pytest.approx(100)
    assert by_count["2 to 3"]["AP"] == pytest.approx(100 * 51 / 101)
    assert [by_count[name]["images"] for name in ("1", "2 to 3", "4 to 7")] == [1, 1, 0]
    assert [by_count[name]["objects"] for name in ("1", "2 to 3")] == [1, 2]
    assert by_count["16 +"]["AP"] is None
    # 400 square pixels are small, 1600 are medium
    sizes = [(row["value"], row["objects"], row["AP"]) for row in where(rows, group="size")]
    assert sizes == [("small", 2, pytest.approx(100)), ("medium", 1, 0), ("large", 0, None)]


def test_groups_are_evaluated_by_the_library_of_the_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the fast one, each group would warn again."""
    truth, found = annotations([(1, 1, FIRST)]), [prediction(1, 1, FIRST, 0.9)]
    result = evaluate(truth, found, ["bbox"], reference=True)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert curve_tables(truth, found, result)["ap_by_group"][3]["AP"] == pytest.approx(100)
    assert "faster-coco-eval" not in caplog.text


def test_files_are_read_back_as_they_were(perturbed: tuple, tmp_path: Path) -> None:
    truth, found = perturbed
    truth["categories"][0]["name"] = "7"
    tables = tables_of(truth, found)
    paths = write_curves(tables, tmp_path / "new", "title")
    assert [path.name for path in paths] == FILES
    again = read_curves(tmp_path / "new")
    assert again == tables and again["precision_recall"][-1]["category"] == "class 3"
    for path in paths:
        if path.suffix == ".png":
            assert cv2.imread(str(path)).std() > 5
    assert read_curves(tmp_path) == dict.fromkeys(tables, [])


@pytest.mark.parametrize("objects", [[], [(1, 1, FIRST)]])
def test_nothing_found_or_nothing_to_find(objects: list, tmp_path: Path) -> None:
    found = [] if objects else [prediction(1, 1, FIRST, 0.9)]
    tables = tables_of(annotations(objects), found)
    assert len(write_curves(tables, tmp_path)) == len(FILES) and not best_text(tables)
    assert {row["precision"] for row in tables["precision_recall"]} == ({0} if objects else set())
    counted = {(row["annotated"], row["predicted"]) for row in tables["confusion_matrix"]}
    assert counted == ({("class 1", BACKGROUND)} if objects else set())


def test_categories_of_one_name_are_kept_apart() -> None:
    truth = annotations([(1, 1, FIRST), (1, 2, SECOND)], categories=2)
    truth["categories"][1]["name"] = "class 1"
    rows = tables_of(truth, [prediction(1, 1, FIRST, 0.9)], ["bbox"])["precision_recall"]
    assert {row["category"] for row in rows} == {ALL, "class 1 (1)", "class 1 (2)"}


def test_figures_hold_the_tables(perturbed: tuple) -> None:
    truth, found = perturbed
    tables = tables_of(truth, found, ["bbox"])
    result = evaluate(truth, found, ["bbox"]).metrics["bbox"]
    all_categories, each = draw_precision_recall(tables["precision_recall"], "t").axes
    labels = [text.get_text() for text in all_categories.get_legend().get_texts()]
    assert labels == [
        f"IoU 0.5: AP {result['AP50']:.1f}",
        f"IoU 0.75: AP {result['AP75']:.1f}",
        f"mean of ten IoUs: AP {result['AP']:.1f}",
    ]
    assert len(each.lines) == 3
    (panel,) = draw_f1(tables["f1_over_confidence"]).axes
    best = best_threshold(tables["f1_over_confidence"], "bbox")
    assert best is not None and panel.lines[-1].get_xdata()[0] == best["score"]
    matrix, _ = draw_confusions(tables["confusion_matrix"]).axes
    values = matrix.images[0].get_array()
    np.testing.assert_allclose(values.sum(axis=1), [100] * 4)
    [row] = where(tables["confusion_matrix"], annotated="class 2", predicted="class 2")
    assert values[1, 1] == pytest.approx(row["percent"])


def test_many_categories_share_other() -> None:
    boxes = [(1 + n % 2, n, (1 + 3 * n, 10, 12, 12)) for n in range(1, 31)]
    truth = annotations(boxes, categories=30)
    found = [prediction(image, category, box, 0.9) for image, category, box in boxes]
    tables = tables_of(truth, found, ["bbox"])
    matrix, _ = draw_confusions(tables["confusion_matrix"]).axes
    labels = [label.get_text() for label in matrix.get_yticklabels()]
    assert len(labels) == 22 and labels[-2:] == ["other", BACKGROUND]
    assert matrix.images[0].get_array()[20, 20] == 100
    _, each = draw_precision_recall(tables["precision_recall"]).axes
    assert len(each.lines) == 30 and len(each.get_legend().get_texts()) == 1


def test_runs_lie_over_each_other(perturbed: tuple) -> None:
    truth, found = perturbed
    one = tables_of(truth, found, ["bbox"])
    other = tables_of(truth, found[::2], ["bbox"])
    styles = [{"label": "a", "color": "red"}, {"label": "b", "color": "blue"}]
    for name, count in zip(COMPARED, (3, 1, 2)):
        runs = {"a": one[name], "b": other[name], "c": []}
        figure = draw_runs(name, runs, [*styles, {}], "title")
        assert len(figure.axes) == count
        for panel in figure.axes:
            assert [line.get_label() for line in panel.lines] == ["a", "b"]
    curve = where(other["precision_recall"], category=ALL, iou="0.75")
    panel = draw_runs("precision_recall", {"b": other["precision_recall"]}, styles[1:], "").axes[1]
    assert [*panel.lines[0].get_ydata()] == [row["precision"] for row in curve]
