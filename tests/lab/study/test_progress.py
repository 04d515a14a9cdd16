"""The time left, computed by hand."""

from typing import Optional

import pytest

from ws_detectron.lab.study import study_runs
from ws_detectron.lab.study.records import FAILED, FINISHED, read_result, write_state
from ws_detectron.lab.study.workers import Progress


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def progress(runs: list, workers: Optional[int] = 1) -> Progress:
    results = [read_result(run, {}) for run in runs]
    return Progress(results, workers, {}, lambda line: None)


def test_time_left_is_that_of_the_runs_of_the_same_batch(make_study, clock: list[float]) -> None:
    """Runs of 80 images: at batch 4 40 s, at batch 1 not known yet, then 160 s."""
    runs = study_runs(make_study(), {})
    large = [run for run in runs if run.batch == 4]
    small = [run for run in runs if run.batch == 1]
    watched = progress(runs)
    assert watched.seconds_left() is None
    write_state(large[0], FINISHED, seconds=40.0)
    watched.ended(large[0])
    assert watched.seconds_left() == pytest.approx(7 * 40)
    write_state(small[0], FINISHED, seconds=160.0)
    watched.ended(small[0])
    assert watched.seconds_left() == pytest.approx(3 * 40 + 3 * 160)
    watched.began(small[1])
    clock[0] += 100
    assert watched.seconds_left() == pytest.approx(3 * 40 + 2 * 160 + 60)
    clock[0] += 1000
    assert watched.seconds_left() == pytest.approx(3 * 40 + 2 * 160)
    assert progress(runs, workers=2).seconds_left() == pytest.approx(300)
    assert progress(runs, workers=None).seconds_left() is None


def test_failed_runs_do_not_count_for_the_time_left(make_study, clock: list[float]) -> None:
    runs = study_runs(make_study(), {})
    watched = progress(runs)
    write_state(runs[0], FAILED, reason="no", seconds=1.0)
    watched.ended(runs[0])
    assert watched.seconds_left() is None
    write_state(runs[1], FINISHED, seconds=40.0)
    watched.ended(runs[1])
    assert watched.seconds_left() == pytest.approx(6 * 40)


def test_resumed_runs_do_not_count_for_the_speed(make_study, clock: list[float]) -> None:
    """Their seconds are those of the last start alone."""
    (run, *_) = runs = study_runs(make_study(), {})
    write_state(run, FINISHED, seconds=4.0)
    (run.folder / "run_record.json").write_text('{"starts": 2}')
    watched = progress(runs)
    watched.ended(run)
    assert watched.seconds_left() is None
