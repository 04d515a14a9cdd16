"""Student's t against printed tables, and Welch's interval against one worked by hand."""

import math

import pytest

from ws_detectron.evaluation.statistics import (
    Difference,
    difference,
    mean_with_interval,
    student_t,
    summarize,
)

# Two-sided 95 % and 99 % points of Student's t, as printed in any table of it
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    10: (2.228, 3.169),
    30: (2.042, 2.750),
    120: (1.980, 2.617),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_student_t_is_the_table(freedom: int) -> None:
    found = student_t(0.95, freedom), student_t(0.99, freedom)
    assert found == pytest.approx(TABLE[freedom], abs=6e-4)


def test_one_degree_of_freedom_is_cauchy() -> None:
    assert student_t(0.5, 1) == pytest.approx(1.0)
    assert student_t(0.9, 1) == pytest.approx(math.tan(0.45 * math.pi))


def test_welch_by_hand() -> None:
    """Variances 4 and 1 of three values each: s²/n = 4/3 and 1/3, v = (25/9)/(16/18 + 1/18)."""
    found = difference([8.0, 10.0, 12.0], [4.0, 5.0, 6.0])
    assert found is not None and found.low is not None and found.high is not None
    freedom = (25 / 9) / (17 / 18)
    assert freedom == pytest.approx(2.941, abs=1e-3)
    half = student_t(0.95, freedom) * math.sqrt(5 / 3)
    assert 3.182 < student_t(0.95, freedom) < 4.303
    assert (found.mean, found.low, found.high) == pytest.approx((5, 5 - half, 5 + half))
    assert found.excludes_zero


def test_equal_variances_have_the_pooled_degrees_of_freedom() -> None:
    found = difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert found is not None and not found.excludes_zero
    assert found.high == pytest.approx(2.776 * math.sqrt(2 / 3), abs=1e-3)


def test_too_few_values_have_no_interval() -> None:
    assert difference([], [1.0]) is None
    alone = difference([3.0], [1.0, 2.0])
    assert alone is not None and (alone.mean, alone.low, alone.high) == (1.5, None, None)
    assert not alone.excludes_zero
    same = difference([3.0, 3.0], [1.0, 1.0])
    assert same is not None and (same.low, same.high) == (2.0, 2.0)


def test_deviation_divides_by_one_less() -> None:
    found = summarize([1.0, 2.0, 3.0])
    assert found is not None and (found.count, found.mean, found.deviation) == (3, 2.0, 1.0)
    alone = summarize([2.0])
    assert alone is not None and alone.deviation is None
    assert summarize([]) is None


def test_interval_of_paired_differences() -> None:
    found = mean_with_interval([1.0, -1.0, 3.0])
    assert found is not None and found.low is not None and found.high is not None
    # deviation 2; t = 4.30265 for two degrees of freedom (any table)
    assert found.mean == pytest.approx(1)
    assert found.high - 1 == pytest.approx(4.30265 * 2 / math.sqrt(3), rel=1e-5)
    assert 1 - found.low == pytest.approx(found.high - 1)
    assert mean_with_interval([2.0]) == Difference(2.0) and mean_with_interval([]) is None
