"""BestCheckpoint: keeps the best, also after a resume, and a run never resumes from it."""

import json
import runpy
import sys
from pathlib import Path
from typing import Optional

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, TrainerBase
from torch import nn

from ws_detectron.engine import hooks
from ws_detectron.engine.hooks import BestCheckpoint, RunRecord, read_record
from ws_detectron.utils.environment import package_version


class Scores(HookBase):
    """Stands for the evaluation: writes a metric at the iterations given."""

    def __init__(self, scores: dict[int, float]) -> None:
        self._scores = scores

    def after_step(self) -> None:
        if self.trainer.iter in self._scores:
            self.trainer.storage.put_scalar("segm/AP", self._scores[self.trainer.iter])


class Counting(TrainerBase):
    """A training in which the model's weight is the number of steps done."""

    def __init__(self, model: nn.Linear, hooks: list[HookBase]) -> None:
        super().__init__()
        self.model = model
        self.register_hooks(hooks)

    def run_step(self) -> None:
        self.model.weight.data.fill_(self.iter + 1)


def train(folder: Path, scores: dict[int, float], start: int = 0, end: int = 6) -> nn.Linear:
    model = nn.Linear(1, 1)
    hooks = [Scores(scores), BestCheckpoint(model, str(folder), "segm/AP")]
    Counting(model, hooks).train(start, end)
    return model


def best(folder: Path) -> Optional[tuple[float, float]]:
    """(weight of the best model, its recorded value)"""
    if not (folder / "model_best.pth").is_file():
        return None
    weight = torch.load(folder / "model_best.pth")["model"]["weight"].item()
    return weight, json.loads((folder / "model_best.json").read_text())["value"]


def test_keeps_the_best_and_not_the_last(tmp_path: Path) -> None:
    train(tmp_path, {1: 10.0, 3: 30.0, 5: 20.0})
    assert best(tmp_path) == (4.0, 30.0)
    record = json.loads((tmp_path / "model_best.json").read_text())
    assert record == {"metric": "segm/AP", "value": 30.0, "iteration": 3}


def test_a_resumed_run_remembers_the_best_value(tmp_path: Path) -> None:
    train(tmp_path, {1: 30.0})
    train(tmp_path, {7: 20.0}, start=6, end=8)
    assert best(tmp_path) == (2.0, 30.0)
    train(tmp_path, {9: 40.0}, start=8, end=10)
    assert best(tmp_path) == (10.0, 40.0)


def test_a_new_run_in_the_same_folder_starts_anew(tmp_path: Path) -> None:
    train(tmp_path, {1: 30.0})
    train(tmp_path, {2: 5.0})
    assert best(tmp_path) == (3.0, 5.0)


def test_nan_is_never_best(tmp_path: Path) -> None:
    train(tmp_path, {1: float("nan")})
    assert best(tmp_path) is None


def test_record_tells_of_all_starts(tmp_path: Path) -> None:
    def record(start: int, end: int) -> dict:
        Counting(nn.Linear(1, 1), [RunRecord(str(tmp_path), "cpu")]).train(start, end)
        return json.loads((tmp_path / "run_record.json").read_text())

    first = record(0, 3)
    assert (first["starts"], first["iterations"], first["processes"]) == (1, 3, 1)
    assert first["versions"]["torch"] == torch.__version__ and first["device"]
    assert first["ws_detectron"] == package_version()
    ballast = bytearray(b"x") * (64 << 20)  # written to, so resident
    resumed = record(3, 5)
    assert (resumed["starts"], resumed["iterations"]) == (2, 5)
    assert resumed["wall_seconds"] > first["wall_seconds"] > 0
    assert resumed["peak_memory_bytes"] > len(ballast)
    killed = Counting(nn.Linear(1, 1), [RunRecord(str(tmp_path), "cpu")])
    killed.start_iter = 5
    killed.before_train()
    assert record(5, 6)["starts"] == 4
    anew = record(0, 1)
    assert (anew["starts"], anew["iterations"]) == (1, 1)


def test_is_not_what_resume_takes(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    DetectionCheckpointer(model, str(tmp_path)).save("model_0000001")
    train(tmp_path, {1: 10.0})
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize("name", ["run_record.json", "model_best.json"])
@pytest.mark.parametrize(
    "content", ['{"starts": 1, "itera', '{"starts": null, "value": "high"}', "7", "\x00", ""]
)
def test_a_damaged_record_is_written_anew(
    tmp_path: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text(content)
    assert read_record(tmp_path / name) == {}
    model = nn.Linear(1, 1)
    hooks = [Scores({4: 30.0}), BestCheckpoint(model, str(tmp_path), "segm/AP")]
    Counting(model, [*hooks, RunRecord(str(tmp_path), "cpu")]).train(3, 5)
    assert best(tmp_path) == (5.0, 30.0)
    record = read_record(tmp_path / "run_record.json")
    assert (record["starts"], record["iterations"]) == (1, 5)
    assert f"{tmp_path / name} is damaged and not used" in caplog.text


@pytest.mark.parametrize("content", ['{"metric": "segm/AP", "val', '{"value": "high"}', None])
def test_best_weights_of_an_unknown_value_are_kept(tmp_path: Path, content: Optional[str]) -> None:
    train(tmp_path, {1: 30.0})
    (tmp_path / "model_best.json").unlink()
    if content is not None:
        (tmp_path / "model_best.json").write_text(content)
    train(tmp_path, {7: 20.0}, start=6, end=8)
    assert best(tmp_path) == (8.0, 20.0)
    kept = torch.load(tmp_path / "model_best_before_resume.pth")["model"]["weight"].item()
    assert kept == 2.0


def test_hooks_import_without_the_module_that_windows_lacks(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "RunRecord" in runpy.run_module(hooks.__name__)
