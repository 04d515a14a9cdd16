"""Figures of cells and what is made of them, on runs whose AP is known."""

import json
from pathlib import Path

import pytest

from ws_detectron.evaluation.runs import Run
from ws_detectron.evaluation.statistics import student_t
from ws_detectron.study import study_cells
from ws_detectron.study.cell_state import FAILED, FINISHED, RUNNING, write_state
from ws_detectron.study.results import (
    arm_difference,
    at_the_edge,
    change_of_difference,
    choose,
    final_ap,
    overall_difference,
    read_result,
    read_results,
    summary,
)

# seed 1, seed 2
BOX = {("bn", 1): (10.0, 12.0), ("bn", 4): (40.0, 44.0), ("gn", 1): (40.0, 42.0)}
BOX["gn", 4] = (41.0, 45.0)


def reach(folder: Path, box: float) -> None:
    row = {"iteration": 20, "bbox/AP": box, "segm/AP": box / 2}
    (folder / "metrics.json").write_text(json.dumps(row) + "\n")


@pytest.fixture
def results(make_study) -> list:
    cells = study_cells(make_study(), {})
    for cell in cells:
        write_state(cell, FINISHED, seconds=10.0)
        reach(cell.folder, BOX[cell.arm, cell.batch][cell.seed - 1])
    return read_results(cells)


def test_means_over_seeds(results: list) -> None:
    box = summary(results, "bn", 4, "bbox")
    assert box is not None and (box.count, box.mean) == (2, 42.0)
    assert box.deviation == pytest.approx(8**0.5)
    mask = summary(results, "bn", 4, "segm")
    assert mask is not None and mask.mean == 21.0


def test_differences_at_a_batch_and_over_all(results: list) -> None:
    at_one = arm_difference(results, ("gn", "bn"), 1, "bbox")
    assert at_one is not None and at_one.mean == 30 and at_one.excludes_zero
    # over batches: gn (40.5, 43.5), bn (25, 28)
    overall = overall_difference(results, ("gn", "bn"), (1, 4), "bbox")
    assert overall is not None and overall.mean == pytest.approx(42 - 26.5)


def test_how_a_difference_changes_with_the_batch(results: list) -> None:
    """gn less bn: 41 - 11 = 30 at 1 image, 43 - 42 = 1 at 4; s²/n = 1, 1, 4, 4 of 2 values each."""
    changed = change_of_difference(results, ("gn", "bn"), (1, 4), "bbox")
    assert changed is not None and changed.mean == pytest.approx(29)
    # v = 10² / (1 + 1 + 16 + 16) = 2.94, the t of which is that of Welch's example by hand
    assert changed.high is not None
    assert changed.high - 29 == pytest.approx(student_t(0.95, 100 / 34) * 10**0.5)
    back = change_of_difference(results, ("gn", "bn"), (4, 1), "bbox")
    assert back is not None and back.mean == pytest.approx(-29)
    one = [r for r in results if r.cell.name not in ("bn_1img_seed1", "bn_1img_seed2")]
    assert change_of_difference(one, ("gn", "bn"), (1, 4), "bbox") is None


def test_a_seed_that_lacks_a_cell_is_not_in_the_overall_difference(results: list) -> None:
    dropped = [r for r in results if r.cell.name != "bn_1img_seed1"]
    # bn of seed 2 alone: 28; gn as before: 42
    overall = overall_difference(dropped, ("gn", "bn"), (1, 4), "bbox")
    assert overall is not None and overall.mean == pytest.approx(42 - 28) and overall.low is None
    assert summary(dropped, "bn", 1, "bbox").count == 1


def test_only_finished_cells_count(make_study) -> None:
    new, failed, running, *_ = study_cells(make_study(), {})
    write_state(failed, FAILED, reason="it broke")
    reach(failed.folder, 50.0)
    write_state(running, RUNNING)
    reach(running.folder, 50.0)
    found = read_results([new, failed, running])
    assert [result.ap for result in found] == [{}, {}, {}]
    assert [result.word for result in found] == ["not started", "failed", "running"]
    assert found[1].notes == ("FAILED: it broke",)


def test_the_last_evaluation_counts_and_not_the_best() -> None:
    rows = [{"iteration": i, "bbox/AP": ap, "segm/AP": ap} for i, ap in ((9, 50.0), (19, 40.0))]
    assert final_ap(Run("r", Path(), rows=rows), ["bbox", "segm"]) == (
        {"bbox": 40.0, "segm": 40.0},
        [],
    )


def test_a_detector_that_finds_nothing_has_an_ap_of_zero() -> None:
    """detectron2 then writes NaN for boxes and leaves masks out, whatever it found earlier."""
    rows = [
        {"iteration": 9, "bbox/AP": 5.0, "segm/AP": 5.0},
        {"iteration": 19, "bbox/AP": float("nan")},
    ]
    ap, notes = final_ap(Run("r", Path(), rows=rows), ["bbox", "segm"])
    assert ap == {"bbox": 0.0, "segm": 0.0} and "detects nothing" in notes[0]


def test_never_evaluated_is_not_zero() -> None:
    rows = [{"iteration": 9, "total_loss": 1.0}]
    ap, notes = final_ap(Run("r", Path(), rows=rows), ["bbox"])
    assert ap == {} and "never evaluated" in notes[0]


def test_resumed_cells_are_marked(make_study) -> None:
    (cell, *_) = study_cells(make_study(), {})
    write_state(cell, FINISHED)
    reach(cell.folder, 5.0)
    (cell.folder / "run_record.json").write_text(json.dumps({"starts": 3}))
    assert read_result(cell).notes == ("resumed: 3 starts",)


def test_search_takes_the_best_mean_of_box_and_mask_ap(make_study) -> None:
    from ws_detectron.study import search_cells

    grid = {"SOLVER.BASE_LR": [0.04, 0.01, 0.02], "SOLVER.WEIGHT_DECAY": [0.0, 0.1]}
    study = make_study(search={"grid": grid, "images": 40, "batches": [4]})
    cells = search_cells(study)
    assert choose(study, read_results(cells)) == {("bn", 4): None, ("gn", 4): None}
    for cell in cells:
        if cell.arm == "bn":
            write_state(cell, FINISHED)
            lr, decay = cell.choice.values()
            reach(cell.folder, 100 * lr + 10 * decay)
    best = next(c for c in cells if c.arm == "bn" and c.choice["SOLVER.BASE_LR"] == 0.04)
    write_state(
        next(
            c
            for c in cells
            if c.choice == {**best.choice, "SOLVER.WEIGHT_DECAY": 0.1} and c.arm == "bn"
        ),
        FAILED,
        reason="diverged",
    )
    choices = choose(study, read_results(cells))
    # 0.04 with 0.1 would be best, but failed: 4.0 at (0.04, 0) against 3.0 at (0.02, 0.1)
    expected = {"SOLVER.BASE_LR": 0.04, "SOLVER.WEIGHT_DECAY": 0.0}
    assert choices == {("bn", 4): expected, ("gn", 4): None}
    # the least or greatest of two values says nothing
    assert at_the_edge(study, expected) == ["SOLVER.BASE_LR"]
    assert at_the_edge(study, {**expected, "SOLVER.BASE_LR": 0.02}) == []
