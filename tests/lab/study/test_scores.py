"""Means and differences of variants, on runs whose AP is known."""

import math
from dataclasses import replace

import pytest
from small_study import reach

from ws_detectron.lab.study import StudyResults, study_runs
from ws_detectron.lab.study.records import FINISHED, read_result, write_state
from ws_detectron.lab.study.report import (
    Interval,
    contrast,
    differences,
    mean_table,
    score_table,
)

# seed 1, seed 2
BOX = {("bn", 1): (10.0, 12.0), ("bn", 4): (40.0, 44.0), ("gn", 1): (40.0, 42.0)}
BOX["gn", 4] = (41.0, 45.0)


# Two-sided 95 % points of Student's t, as printed in any table of it
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@pytest.fixture
def results(make_study) -> StudyResults:
    study = make_study()
    runs = study_runs(study, {})
    for run in runs:
        write_state(run, FINISHED, seconds=10.0)
        reach(run.folder, BOX[run.variant, run.batch][run.seed - 1])
    return StudyResults(study, [read_result(run, {}) for run in runs])


def without(results: StudyResults, *names: str) -> StudyResults:
    return replace(results, runs=[r for r in results.runs if r.run.name not in names])


def gn_minus_bn(results: StudyResults) -> dict:
    return differences(results, ("gn", "bn"), "bbox/AP")


def test_means_over_seeds(results: StudyResults) -> None:
    assert len(score_table(results, "bbox/AP")) == 8
    for score, cell in (("bbox/AP", "42.00 ± 2.83 (2)"), ("segm/AP", "21.00 ± 1.41 (2)")):
        (bn,) = (x for x in mean_table(results, score).splitlines() if "| BN " in x)
        assert bn.split("|")[3].strip() == cell
    left = without(results, "bn_1img_seed1", "bn_4img_seed1", "bn_4img_seed2")
    (bn,) = (x for x in mean_table(left, "bbox/AP").splitlines() if "| BN" in x)
    assert [cell.strip() for cell in bn.split("|")[2:4]] == ["12.00 (1)", "–"]


def test_differences_at_a_batch_and_over_all(results: StudyResults) -> None:
    found = gn_minus_bn(results)
    assert found["1 image"].mean == 30 and found["1 image"].excludes_zero
    # over batches: gn (40.5, 43.5), bn (25, 28)
    assert found["all batches"].mean == pytest.approx(42 - 26.5)


def test_how_a_difference_changes_with_the_batch(results: StudyResults) -> None:
    """gn minus bn: 41 - 11 = 30 at 1 image, 43 - 42 = 1 at 4; s²/n = 1, 1, 4, 4, 2 values each."""
    changed = gn_minus_bn(results)["more at 1 image than at 4 images"]
    assert changed.mean == pytest.approx(29)
    # v = 10² / (1 + 1 + 16 + 16) = 2.94, whose t is between those of 2 and 3
    assert T[3] < (changed.high - 29) / 10**0.5 < T[2]
    none_left = gn_minus_bn(without(results, "bn_1img_seed1", "bn_1img_seed2"))
    assert none_left["more at 1 image than at 4 images"] is None


def test_a_seed_that_lacks_a_run_is_not_in_the_overall_difference(results: StudyResults) -> None:
    # bn of seed 2 alone: 28; gn as before: 42
    overall = gn_minus_bn(without(results, "bn_1img_seed1"))["all batches"]
    assert overall.mean == pytest.approx(42 - 28) and math.isnan(overall.low)


def test_each_batch_is_compared_with_the_smallest(results: StudyResults) -> None:
    study = replace(results.study, batches=[4, 1, 8])
    assert [*gn_minus_bn(replace(results, study=study))][4:] == [
        "more at 1 image than at 4 images",
        "more at 1 image than at 8 images",
    ]
    variant = replace(study.variants["bn"], runs={4: [1, 2]})
    narrow = replace(study, variants={**study.variants, "bn": variant})
    assert [*gn_minus_bn(replace(results, study=narrow))] == ["4 images"]


def test_welch_by_hand() -> None:
    """Variances 4 and 1 of three values each: s²/n = 4/3 and 1/3, v = (25/9)/(16/18 + 1/18)."""
    found = contrast([[8.0, 10.0, 12.0]], [[4.0, 5.0, 6.0]])
    assert found.mean == 5 and found.excludes_zero
    # v = 2.941; t by interpolating 1/v in a printed table
    t = T[3] + (1 / 2.941 - 1 / 3) / (1 / 2 - 1 / 3) * (T[2] - T[3])
    assert found.high - 5 == pytest.approx(t * (5 / 3) ** 0.5, rel=0.01)
    assert 5 - found.low == pytest.approx(found.high - 5)


def test_equal_variances_have_the_pooled_degrees_of_freedom() -> None:
    found = contrast([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]])
    assert not found.excludes_zero
    assert found.high == pytest.approx(T[4] * (2 / 3) ** 0.5, abs=1e-3)


def test_a_single_sample_has_the_interval_of_its_mean() -> None:
    found = contrast([[1.0, -1.0, 3.0]])  # deviation 2
    assert found.mean == 1 and found.high - 1 == pytest.approx(T[2] * 2 / 3**0.5, rel=1e-4)


def test_too_few_values_have_no_interval() -> None:
    assert contrast([[]], [[1.0]]) is None
    assert contrast([[3.0]], [[1.0, 2.0]]) == Interval(1.5)
    assert not Interval(1.5).excludes_zero
    assert contrast([[3.0, 3.0]], [[1.0, 1.0]]) == Interval(2.0, 2.0, 2.0)
