"""What a search chooses."""

from small_study import reach

from ws_detectron.lab.study import search_runs
from ws_detectron.lab.study.choice import at_the_edge, choose
from ws_detectron.lab.study.records import DIVERGED, FINISHED, read_results, write_state


def test_search_takes_the_best_mean_of_box_and_mask_ap(make_study) -> None:
    grid = {"SOLVER.BASE_LR": [0.04, 0.01, 0.02], "SOLVER.WEIGHT_DECAY": [0.0, 0.1]}
    study = make_study(search={"grid": grid, "images": 40, "batches": [4]})
    runs = search_runs(study)
    assert choose(study, read_results(runs, {})) == {("bn", 4): None, ("gn", 4): None}
    for run in runs:
        if run.variant == "bn":
            write_state(run, FINISHED)
            lr, decay = run.choice.values()
            reach(run.folder, 100 * lr + 10 * decay)
    best = next(c for c in runs if c.variant == "bn" and c.choice["SOLVER.BASE_LR"] == 0.04)
    write_state(
        next(
            c
            for c in runs
            if c.choice == {**best.choice, "SOLVER.WEIGHT_DECAY": 0.1} and c.variant == "bn"
        ),
        DIVERGED,
        reason="diverged",
    )
    choices = choose(study, read_results(runs, {}))
    # 0.04 with 0.1 would be best, but failed: 4.0 at (0.04, 0) against 3.0 at (0.02, 0.1)
    expected = {"SOLVER.BASE_LR": 0.04, "SOLVER.WEIGHT_DECAY": 0.0}
    assert choices == {("bn", 4): expected, ("gn", 4): None}
    # of two values, each is at the edge
    assert at_the_edge(study, expected) == ["SOLVER.BASE_LR"]
    assert at_the_edge(study, {**expected, "SOLVER.BASE_LR": 0.02}) == []
