"""What is read of runs, on runs whose AP is known."""

import json
from pathlib import Path

from small_study import reach

from ws_detectron.evaluation.runs import Run
from ws_detectron.lab.study import study_runs
from ws_detectron.lab.study.results import final_ap, read_result, read_results
from ws_detectron.lab.study.run_state import FAILED, FINISHED, RUNNING, write_state


def test_only_finished_runs_count(make_study) -> None:
    new, failed, running, *_ = study_runs(make_study(), {})
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


def test_resumed_runs_are_marked(make_study) -> None:
    (run, *_) = study_runs(make_study(), {})
    write_state(run, FINISHED)
    reach(run.folder, 5.0)
    (run.folder / "run_record.json").write_text(json.dumps({"starts": 3}))
    assert read_result(run).notes == ("resumed: 3 starts",)
