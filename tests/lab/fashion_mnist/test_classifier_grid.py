import json
from pathlib import Path
from typing import Any

import pytest

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist import grid as grid_module
from ws_detectron.lab.fashion_mnist.accuracy_results import FinishedRun
from ws_detectron.lab.fashion_mnist.epoch_progress import Progress
from ws_detectron.lab.fashion_mnist.grid import grid, run_grid
from ws_detectron.lab.fashion_mnist.training_settings import TrainingSettings
from ws_detectron.utils.locking import AlreadyLocked


def test_grid_has_every_arm_batch_and_seed_once() -> None:
    cells = grid(["bn", "gn_ws"], [2, 32], [0, 5], epochs=3)
    found = [(c.arm, c.batch_size, c.seed) for c in cells]
    assert sorted(found) == sorted(
        (a, b, s) for a in ("bn", "gn_ws") for b in (2, 32) for s in (0, 5)
    )
    assert {c.epochs for c in cells} == {3}
    assert [c.batch_size for c in cells] == [32] * 4 + [2] * 4  # quick ones first
    # all arms of a seed before the next seed: a grid that was stopped can be compared
    assert [c.seed for c in cells[:4]] == [0, 0, 5, 5]


def test_batch_2_has_one_seed_unless_asked_otherwise() -> None:
    seeds = {batch: [c.seed for c in grid(["gn"], [batch])] for batch in (2, 32)}
    assert seeds == {2: [0], 32: [0, 1, 2]}
    assert len(grid(["gn"], [2], [0, 1, 2, 3])) == 4


def test_failing_trainings_are_named_and_finished_ones_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[str] = []

    def train(settings: TrainingSettings, folder: Path, **_: Any) -> dict[str, float]:
        if settings.arm == "ln":
            raise RuntimeError("out of memory")
        if settings.arm == "wn":
            raise UserError("its data are damaged")
        if settings.arm == "none":
            raise AlreadyLocked("another process is training")
        trained.append(folder.name)
        return {"test_accuracy": 0.5}

    monkeypatch.setattr(grid_module, "train", train)
    monkeypatch.setattr(grid_module, "find_fashion_mnist", lambda *_, **__: None)
    cells = grid(["bn", "ln", "wn", "none", "gn"], [32], [0])
    (tmp_path / cells[0].name).mkdir()
    (tmp_path / cells[0].name / "result.json").write_text("{}")
    lines: list[str] = []
    problems = run_grid(cells, tmp_path, say=lines.append, progress=lambda _: Progress())
    assert problems == [
        "ln_batch32_seed0: out of memory",
        "wn_batch32_seed0: its data are damaged",
    ]
    assert "[1/5] bn_batch32_seed0: finished already" in lines
    assert "[4/5] none_batch32_seed0: another process is at it" in lines
    assert "[5/5] gn_batch32_seed0: test accuracy 50.00%" in lines
    assert lines[-1] == "left to other processes: none_batch32_seed0"
    assert trained == ["bn_batch32_seed0", "gn_batch32_seed0"]  # the first only checks its settings


def test_what_another_process_left_undone_is_trained_in_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was at "bn" when this one came by, and was stopped since."""
    calls: list[str] = []

    def train(settings: TrainingSettings, *_: Any, **__: Any) -> dict[str, float]:
        calls.append(settings.arm)
        if calls == ["bn"]:
            raise AlreadyLocked("another process is training")
        return {"test_accuracy": 0.5}

    monkeypatch.setattr(grid_module, "train", train)
    monkeypatch.setattr(grid_module, "find_fashion_mnist", lambda *_, **__: None)
    lines: list[str] = []
    run_grid(
        grid(["bn", "gn"], [32], [0]), tmp_path, say=lines.append, progress=lambda _: Progress()
    )
    assert calls == ["bn", "gn", "bn"]
    assert lines[-1] == "[1/2] bn_batch32_seed0: test accuracy 50.00%"


def test_recorded_trainings_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grid_module, "find_fashion_mnist", lambda *_, **__: None)
    monkeypatch.setattr(grid_module, "train", None)  # calling it would fail
    (cell,) = grid(["gn"], [32], [0])
    record = FinishedRun(cell.name, None, cell.as_dict(), [], {})
    lines: list[str] = []
    show = {"say": lines.append, "progress": lambda _: Progress()}
    assert run_grid([cell], tmp_path, records=[record], **show) == []  # type: ignore[arg-type]
    assert lines == ["[1/1] gn_batch32_seed0: finished already"]
    (other,) = grid(["gn"], [32], [0], lr=0.5)
    with pytest.raises(UserError, match="recorded with lr 0.02, asked for is 0.5"):
        run_grid([other], tmp_path, records=[record], **show)  # type: ignore[arg-type]
    # so is one that was begun: hours of other trainings are not to end in that
    (tmp_path / cell.name).mkdir()
    (tmp_path / cell.name / "settings.json").write_text(json.dumps(cell.as_dict()))
    with pytest.raises(UserError, match="with lr 0.02, asked for is 0.5; choose another --output"):
        run_grid([other], tmp_path, **show)  # type: ignore[arg-type]
