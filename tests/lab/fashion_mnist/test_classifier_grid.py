import json
from pathlib import Path
from typing import Any

import pytest

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist import grid as grid_module
from ws_detectron.lab.fashion_mnist.accuracy_results import FinishedRun
from ws_detectron.lab.fashion_mnist.grid import grid, run_grid
from ws_detectron.lab.fashion_mnist.loop import Progress
from ws_detectron.lab.fashion_mnist.training_settings import TrainingSettings
from ws_detectron.utils.locking import AlreadyLocked


def test_grid_has_every_variant_batch_and_seed_once() -> None:
    runs = grid(["bn", "gn_ws"], [2, 32], [0, 5], epochs=3)
    found = [(r.variant, r.batch_size, r.seed) for r in runs]
    assert sorted(found) == sorted(
        (v, b, s) for v in ("bn", "gn_ws") for b in (2, 32) for s in (0, 5)
    )
    assert {r.epochs for r in runs} == {3}
    assert [r.batch_size for r in runs] == [32] * 4 + [2] * 4  # fast ones first
    # all variants of a seed before the next seed: an interrupted grid can be compared
    assert [r.seed for r in runs[:4]] == [0, 0, 5, 5]


def test_batch_2_has_one_seed_unless_asked_otherwise() -> None:
    seeds = {batch: [r.seed for r in grid(["gn"], [batch])] for batch in (2, 32)}
    assert seeds == {2: [0], 32: [0, 1, 2]}
    assert len(grid(["gn"], [2], [0, 1, 2, 3])) == 4


def test_failing_trainings_are_named_and_finished_ones_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[str] = []

    def train(settings: TrainingSettings, folder: Path, **_: Any) -> dict[str, float]:
        if settings.variant == "ln":
            raise RuntimeError("out of memory")
        if settings.variant == "wn":
            raise UserError("its data are damaged")
        if settings.variant == "none":
            raise AlreadyLocked("another process is training")
        trained.append(folder.name)
        return {"test_accuracy": 0.5}

    monkeypatch.setattr(grid_module, "train", train)
    monkeypatch.setattr(grid_module, "find_fashion_mnist", lambda *_, **__: None)
    runs = grid(["bn", "ln", "wn", "none", "gn"], [32], [0])
    (tmp_path / runs[0].name).mkdir()
    (tmp_path / runs[0].name / "result.json").write_text("{}")
    lines: list[str] = []
    failures = run_grid(runs, tmp_path, echo=lines.append, progress=lambda _: Progress())
    assert failures == [
        "ln_batch32_seed0: out of memory",
        "wn_batch32_seed0: its data are damaged",
    ]
    assert "[1/5] bn_batch32_seed0: already finished" in lines
    assert "[4/5] none_batch32_seed0: another process is training it" in lines
    assert "[5/5] gn_batch32_seed0: test accuracy 50.00%" in lines
    assert lines[-1] == "left to other processes: none_batch32_seed0"
    assert trained == [
        "bn_batch32_seed0",
        "gn_batch32_seed0",
    ]  # "bn": only its settings are checked


def test_what_another_process_left_undone_is_trained_in_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was training "bn" at first, and was killed then."""
    calls: list[str] = []

    def train(settings: TrainingSettings, *_: Any, **__: Any) -> dict[str, float]:
        calls.append(settings.variant)
        if calls == ["bn"]:
            raise AlreadyLocked("another process is training")
        return {"test_accuracy": 0.5}

    monkeypatch.setattr(grid_module, "train", train)
    monkeypatch.setattr(grid_module, "find_fashion_mnist", lambda *_, **__: None)
    lines: list[str] = []
    run_grid(
        grid(["bn", "gn"], [32], [0]), tmp_path, echo=lines.append, progress=lambda _: Progress()
    )
    assert calls == ["bn", "gn", "bn"]
    assert lines[-1] == "[1/2] bn_batch32_seed0: test accuracy 50.00%"


def test_recorded_trainings_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grid_module, "find_fashion_mnist", lambda *_, **__: None)
    monkeypatch.setattr(grid_module, "train", None)  # calling it would fail
    (run,) = grid(["gn"], [32], [0])
    record = FinishedRun(run.name, None, run.as_dict(), [], {})
    lines: list[str] = []
    show = {"echo": lines.append, "progress": lambda _: Progress()}
    assert run_grid([run], tmp_path, records=[record], **show) == []  # type: ignore[arg-type]
    assert lines == ["[1/1] gn_batch32_seed0: already finished"]
    (other,) = grid(["gn"], [32], [0], lr=0.5)
    with pytest.raises(UserError, match="recorded with lr 0.02, requested is 0.5"):
        run_grid([other], tmp_path, records=[record], **show)  # type: ignore[arg-type]
    # also if it was only started: the error must not come after hours of other runs
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "settings.json").write_text(json.dumps(run.as_dict()))
    with pytest.raises(UserError, match="with lr 0.02, requested is 0.5; choose another --output"):
        run_grid([other], tmp_path, **show)  # type: ignore[arg-type]
