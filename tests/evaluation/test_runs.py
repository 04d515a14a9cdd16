import json
from pathlib import Path

import numpy as np
import pytest
from small_coco import annotations, prediction
from written_runs import write_run

from ws_detectron.errors import UserError
from ws_detectron.evaluation.coco_eval import evaluate
from ws_detectron.evaluation.coco_report import write_reports
from ws_detectron.evaluation.runs import (
    Run,
    ap_key,
    main_metrics,
    merge_rows,
    read_run,
    read_runs,
    series,
    training_seconds,
)

BOX = (10, 10, 20, 20)


def step(iteration: int, **values: float) -> dict:
    return {"iteration": iteration, "total_loss": 1.0, **values}


def test_a_run_is_read_as_detectron2_writes_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"), "run")
    assert not run.problems
    iterations, losses = series(run.rows, "total_loss")
    assert iterations == [19, 39, 59, 79, 99]
    assert losses == sorted(losses, reverse=True)
    assert series(run.rows, "bbox/AP") == ([49, 99], [30.0, 60.0])
    assert run.metrics["bbox/AP"] == 60 and run.metrics["segm/AP"] == 30
    assert run.metrics["bbox/AP50"] == 70 and run.metrics["bbox/APl"] is None
    assert "bbox/AP-star" not in run.metrics and run.source == "metrics.json, iteration 99"
    assert run.config["MODEL.RESNETS.NORM"] == "GN"
    np.testing.assert_allclose(training_seconds(run.rows, [99]), [50.0])


def test_what_a_resumed_run_repeats_counts_once(tmp_path: Path) -> None:
    """Stopped after 90 iterations, resumed from a checkpoint at 40: the last start counts."""
    folder = write_run(
        tmp_path / "run", iterations=(range(90), range(40, 100)), evaluate_every=None
    )
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [19, 39, 59, 79, 89, 59, 79, 99]
    run = read_run(folder, "run")
    assert [row["iteration"] for row in run.rows] == [19, 39, 59, 79, 99]
    np.testing.assert_allclose(training_seconds(run.rows, [99]), [50.0])


def test_rows_after_the_checkpoint_of_a_resume_are_dropped_with_their_evaluations() -> None:
    rows = [
        step(19, time=1.0),
        {"iteration": 29, "bbox/AP": 5.0},
        step(39, time=1.0),
        {"iteration": 44, "bbox/AP": 9.0},
        step(39, time=2.0),
        step(59, time=2.0),
    ]
    merged = merge_rows(rows)
    assert [row["iteration"] for row in merged] == [19, 29, 39, 59]
    assert merged[2]["time"] == 2.0


def test_an_evaluation_written_before_its_step_is_kept() -> None:
    rows = [step(19), {"iteration": 40, "bbox/AP": 5.0}, step(39)]
    assert [row["iteration"] for row in merge_rows(rows)] == [19, 39, 40]


def test_lines_of_one_iteration_are_merged() -> None:
    rows = [step(19, lr=0.1), {"iteration": 19, "bbox/AP": 5.0}]
    assert merge_rows(rows) == [step(19, lr=0.1, **{"bbox/AP": 5.0})]


def test_time_is_distance_times_median() -> None:
    rows = [step(9, time=2.0), step(19, time=1.0), step(39, time=0.5), {"iteration": 40}]
    # 10 x 2 s, then 10 x 1 s, then 20 x 0.5 s
    np.testing.assert_allclose(
        training_seconds(rows, [9, 14, 19, 39, 40]), [20.0, 25.0, 30.0, 40.0, 40.0]
    )
    assert training_seconds([step(9)], [9]).size == 0


def test_values_that_are_not_numbers_are_skipped_in_series() -> None:
    rows = [step(1, a=float("nan")), step(2, a=3.0), step(3), step(4, a=float("inf"))]
    assert series(rows, "a") == ([2], [3.0])


def test_ap_of_the_first_of_several_test_sets_is_found() -> None:
    rows = [{"iteration": 1, "b_val/bbox/AP": 1.0, "a_val/bbox/AP": 2.0, "a_val/segm/AP": 3.0}]
    run = Run("run", Path(), rows=rows)
    assert ap_key(run, "bbox") == "a_val/bbox/AP"  # without a config, by name
    run.config["DATASETS.TEST"] = ["b_val", "a_val"]
    assert ap_key(run, "bbox") == "b_val/bbox/AP"
    rows.append({"iteration": 2, "z/bbox/AP": 1, "bbox/AP": 1})
    assert ap_key(run, "bbox") == "bbox/AP"
    assert ap_key(run, "keypoints") == "keypoints/AP"


def test_an_evaluation_file_takes_precedence_over_the_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    result = evaluate(annotations([(1, 1, BOX)]), [prediction(1, 1, BOX, 0.9)])
    json_path, _ = write_reports(result, folder / "inference")
    run = read_run(folder, "run")
    assert run.source == "coco_evaluation.json" and not run.problems
    assert run.metrics["bbox/AP"] == pytest.approx(100) and run.metrics["bbox/APl"] is None
    assert run.metrics["segm/AR100"] == pytest.approx(100)
    alone = read_run(json_path, "alone")
    assert alone.metrics == run.metrics and not alone.problems and not alone.rows


def test_a_metrics_file_alone_is_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run") / "metrics.json", "run")
    assert run.metrics["bbox/AP"] == 60 and not run.problems


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    assert "there is no run folder or file" in read_run(tmp_path / "no", "no").problems[0]

    empty = tmp_path / "empty"
    empty.mkdir()
    found = " ".join(read_run(empty, "empty").problems)
    assert "config.yaml is missing" in found and "metrics.json is missing" in found

    broken = write_run(tmp_path / "broken")
    with open(broken / "metrics.json", "a") as file:
        file.write('{"iteration": 119, "total_lo')
    (broken / "config.yaml").write_text("a: [1")
    run = read_run(broken, "broken")
    found = " ".join(run.problems)
    assert "metrics.json, line 7 is broken" in found and "config.yaml is not a YAML config" in found
    assert run.metrics["bbox/AP"] == 60 and not run.config  # the rest is used

    silent = write_run(tmp_path / "silent", evaluate_every=None)
    assert "was never evaluated" in " ".join(read_run(silent, "silent").problems)
    (silent / "metrics.json").write_text("")
    assert "holds no metrics" in " ".join(read_run(silent, "silent").problems)

    other = tmp_path / "other.json"
    other.write_text("[]")
    assert "not an evaluation" in read_run(other, "other").problems[0]
    other.write_text("{")
    assert "is not JSON" in read_run(other, "other").problems[0]


@pytest.mark.parametrize(
    "tested, order", [("('x',)", "a_val, b_val"), ("('b_val',)", "b_val, a_val")]
)
def test_several_evaluations_of_a_run_are_named(tmp_path: Path, tested: str, order: str) -> None:
    folder = write_run(tmp_path / "run", options=["DATASETS.TEST", tested])
    for name, score in (("b_val", 0.9), ("a_val", 0.9)):
        result = evaluate(annotations([(1, 1, BOX)]), [prediction(1, 1, BOX, score)])
        write_reports(result, folder / "inference" / name)
    run = read_run(folder, "run")
    assert f"several data sets ({order})" in run.problems[0]
    assert run.metrics["bbox/AP"] == pytest.approx(100)


def test_runs_get_the_shortest_name_that_is_theirs(tmp_path: Path) -> None:
    paths = [tmp_path / "bn" / "out", tmp_path / "gn" / "out", tmp_path / "other"]
    names = [run.name for run in read_runs([*map(str, paths), f"mine={paths[0]}"])]
    # the first folder is there twice, so no end of its path is its own
    assert names[1:] == ["gn/out", "other", "mine"]
    assert [run.name for run in read_runs([*map(str, paths)])] == ["bn/out", "gn/out", "other"]


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs are named out; give another name to one"):
        read_runs([str(tmp_path / "out"), f"out={tmp_path / 'other'}"])


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        (
            {"bbox/AP": 40.61, "bbox/AP50": 60.0, "bbox/AP-cat": 1.0, "segm/AP": None},
            "bbox AP 40.6, segm AP –",
        ),
        (
            {"val/bbox/AP": 1.0, "test/bbox/AP": 2.0, "total_loss": 3.0},
            "val bbox AP 1.0, test bbox AP 2.0",
        ),
        ({"panoptic_seg/PQ": 41.0, "sem_seg/mIoU": 0.5}, "panoptic_seg PQ 41.0, sem_seg mIoU 0.5"),
        ({"total_loss": 3.0}, ""),
    ],
)
def test_main_metrics_are_a_line(metrics: dict, text: str) -> None:
    assert main_metrics(metrics) == text
