"""What a search chooses."""

from small_study import reach

from ws_detectron.lab.study import search_cells
from ws_detectron.lab.study.cell_state import FAILED, FINISHED, write_state
from ws_detectron.lab.study.choice import at_the_edge, choose
from ws_detectron.lab.study.results import read_results


def test_search_takes_the_best_mean_of_box_and_mask_ap(make_study) -> None:
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
