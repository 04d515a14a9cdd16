"""Means and differences of variants, on runs whose AP is known."""

import pytest
from small_study import reach

from ws_detectron.evaluation.statistics import student_t
from ws_detectron.lab.study import study_runs
from ws_detectron.lab.study.differences import (
    change_of_difference,
    overall_difference,
    pairs_of_batches,
    summary,
    variant_difference,
)
from ws_detectron.lab.study.records import FINISHED, read_results, write_state

# seed 1, seed 2
BOX = {("bn", 1): (10.0, 12.0), ("bn", 4): (40.0, 44.0), ("gn", 1): (40.0, 42.0)}
BOX["gn", 4] = (41.0, 45.0)


@pytest.fixture
def results(make_study) -> list:
    runs = study_runs(make_study(), {})
    for run in runs:
        write_state(run, FINISHED, seconds=10.0)
        reach(run.folder, BOX[run.variant, run.batch][run.seed - 1])
    return read_results(runs, {})


def test_means_over_seeds(results: list) -> None:
    box = summary(results, "bn", 4, "bbox")
    assert box is not None and (box.count, box.mean) == (2, 42.0)
    assert box.deviation == pytest.approx(8**0.5)
    mask = summary(results, "bn", 4, "segm")
    assert mask is not None and mask.mean == 21.0


def test_differences_at_a_batch_and_over_all(results: list) -> None:
    at_one = variant_difference(results, ("gn", "bn"), 1, "bbox")
    assert at_one is not None and at_one.mean == 30 and at_one.excludes_zero
    # over batches: gn (40.5, 43.5), bn (25, 28)
    overall = overall_difference(results, ("gn", "bn"), (1, 4), "bbox")
    assert overall is not None and overall.mean == pytest.approx(42 - 26.5)


def test_how_a_difference_changes_with_the_batch(results: list) -> None:
    """gn minus bn: 41 - 11 = 30 at 1 image, 43 - 42 = 1 at 4; s²/n = 1, 1, 4, 4, 2 values each."""
    changed = change_of_difference(results, ("gn", "bn"), (1, 4), "bbox")
    assert changed is not None and changed.mean == pytest.approx(29)
    # v = 10² / (1 + 1 + 16 + 16) = 2.94, the t of which is that of Welch's example by hand
    assert changed.high is not None
    assert changed.high - 29 == pytest.approx(student_t(0.95, 100 / 34) * 10**0.5)
    back = change_of_difference(results, ("gn", "bn"), (4, 1), "bbox")
    assert back is not None and back.mean == pytest.approx(-29)
    one = [r for r in results if r.run.name not in ("bn_1img_seed1", "bn_1img_seed2")]
    assert change_of_difference(one, ("gn", "bn"), (1, 4), "bbox") is None


def test_a_seed_that_lacks_a_run_is_not_in_the_overall_difference(results: list) -> None:
    dropped = [r for r in results if r.run.name != "bn_1img_seed1"]
    # bn of seed 2 alone: 28; gn as before: 42
    overall = overall_difference(dropped, ("gn", "bn"), (1, 4), "bbox")
    assert overall is not None and overall.mean == pytest.approx(42 - 28) and overall.low is None
    assert summary(dropped, "bn", 1, "bbox").count == 1


def test_each_batch_is_compared_with_the_smallest() -> None:
    assert pairs_of_batches([4, 1, 8]) == [(1, 4), (1, 8)]
    assert pairs_of_batches([4]) == []
