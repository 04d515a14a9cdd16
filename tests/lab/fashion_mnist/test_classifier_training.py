"""Trainings of a few hundred images: they learn, resume bit for bit, and test once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist import loop, training
from ws_detectron.lab.fashion_mnist.files import find_fashion_mnist
from ws_detectron.lab.fashion_mnist.loop import Progress, compile_model
from ws_detectron.lab.fashion_mnist.training import (
    CHECKPOINT,
    ENVIRONMENT,
    HISTORY,
    RESULT,
    SETTINGS,
    WEIGHTS,
    train,
)
from ws_detectron.lab.fashion_mnist.training_settings import TrainingSettings

SMALL = TrainingSettings("gn_ws", 20, epochs=3, images=300, seed=3)


class Killed(Exception):
    """Ends a training as a signal would."""


class KillAfter(Progress):
    """Raises after an epoch was saved."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def end_epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] == self._epoch:
            raise Killed


@pytest.fixture(scope="module")
def finished(datasets_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(SMALL, folder, data_dir=datasets_root)
    return folder


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if "seconds" not in k} for entry in history]


def test_a_run_leaves_its_files_and_learns(finished: Path) -> None:
    result = json.loads((finished / RESULT).read_text())
    history = json.loads((finished / HISTORY).read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    # chance is 0.1; 300 images seen three times
    assert result["test_accuracy"] > 0.35
    assert result["test_images"] == 60 and result["settings"] == SMALL.as_dict()
    assert result["environment"]["torch"] == torch.__version__.split("+")[0]
    assert not (finished / CHECKPOINT).exists()
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "settings.json", "environment.json", "history.json", "result.json", "weights.pth",
        "test_logits.npy",
    }  # fmt: skip


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_killed_and_resumed_ends_with_the_same_bits(
    finished: Path, datasets_root: Path, tmp_path: Path, epoch: int
) -> None:
    with pytest.raises(Killed):
        train(SMALL, tmp_path, data_dir=datasets_root, progress=KillAfter(epoch))
    torch.manual_seed(99)  # another process has other generators
    train(SMALL, tmp_path, data_dir=datasets_root, resume=True)
    histories = [json.loads((folder / HISTORY).read_text()) for folder in (finished, tmp_path)]
    assert without_times(histories[0]) == without_times(histories[1])
    weights = [torch.load(folder / WEIGHTS, weights_only=True) for folder in (finished, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logits = [np.load(folder / "test_logits.npy") for folder in (finished, tmp_path)]
    np.testing.assert_array_equal(*logits)


def test_killed_between_checkpoint_and_history_ends_with_the_same_bits(
    finished: Path, datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_json(path: Path, *_: Any, **__: Any) -> None:
        if path.name == HISTORY:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "write_json", write_json)
        train(SMALL, tmp_path, data_dir=datasets_root)
    train(SMALL, tmp_path, data_dir=datasets_root, resume=True)
    histories = [json.loads((folder / HISTORY).read_text()) for folder in (finished, tmp_path)]
    assert without_times(histories[0]) == without_times(histories[1])
    logits = [np.load(folder / "test_logits.npy") for folder in (finished, tmp_path)]
    np.testing.assert_array_equal(*logits)


def test_every_start_of_a_run_is_recorded(
    datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dates = iter("abc")
    monkeypatch.setattr(training, "environment", lambda _: {"date": next(dates)})
    monkeypatch.setattr(training, "utc_now", lambda: next(dates))
    settings = replace(SMALL, epochs=2, images=100)
    with pytest.raises(Killed):
        train(settings, tmp_path, data_dir=datasets_root, progress=KillAfter(1))
    threads = torch.get_num_threads()
    first, second = ({"date": date, "threads": threads} for date in "ab")
    assert json.loads((tmp_path / ENVIRONMENT).read_text()) == [first]
    result = train(settings, tmp_path, data_dir=datasets_root, resume=True)
    assert (result["environment"], result["resumed"]) == (first, [second])
    assert result["finished"] == "c"


@pytest.mark.parametrize("variant", ["bn", "wn"])
def test_buffers_and_parametrizations_resume_as_well(
    datasets_root: Path, tmp_path: Path, variant: str
) -> None:
    settings = replace(SMALL, variant=variant, epochs=2, images=100)
    whole = train(settings, tmp_path / "whole", data_dir=datasets_root)
    with pytest.raises(Killed):
        train(settings, tmp_path / "cut", data_dir=datasets_root, progress=KillAfter(1))
    cut = train(settings, tmp_path / "cut", data_dir=datasets_root, resume=True)
    assert cut["test_loss"] == whole["test_loss"]
    weights = [torch.load(tmp_path / n / WEIGHTS, weights_only=True) for n in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_number_of_threads_is_warned_of(
    datasets_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SMALL, epochs=2, images=100)
    with pytest.raises(Killed):
        train(settings, tmp_path, data_dir=datasets_root, progress=KillAfter(1))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        train(settings, tmp_path, data_dir=datasets_root, resume=True)
    finally:
        torch.set_num_threads(before)
    assert f"made with {before} threads and is resumed with {before + 1}" in caplog.text


def test_a_compiled_model_computes_the_batches_of_full_size(
    datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile itself makes of the model is torch's to test, and takes a compiler."""
    settings = replace(SMALL, epochs=1, images=300, batch_size=40)
    plain = train(settings, tmp_path / "plain", data_dir=datasets_root)
    sizes = []

    def compiled(model: torch.nn.Module, **_: Any) -> Any:
        return lambda x: (sizes.append(len(x)), model(x))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(torch, "compile", compiled)
    same = train(replace(settings, compile=True), tmp_path / "same", data_dir=datasets_root)
    assert sizes == [40] * 7 and same["test_loss"] == plain["test_loss"]


def test_compiled_code_is_for_the_threads_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are part of the key under which torch caches code; its own threads are not."""
    seen: list[dict] = []
    monkeypatch.setattr(torch, "compile", lambda _, **how: seen.append(how["options"]))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            compile_model(torch.nn.ReLU(), "cpu")
    finally:
        torch.set_num_threads(before)
    assert [options["cpp.threads"] for options in seen] == [1, 2]


@pytest.mark.parametrize(("version", "called_from_cpp"), [((3, 11), False), ((3, 12), True)])
def test_a_python_whose_none_can_be_freed_does_not_call_from_cpp(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], called_from_cpp: bool
) -> None:
    seen: list[dict] = []
    monkeypatch.setattr(torch, "compile", lambda _, **how: seen.append(how["options"]))
    monkeypatch.setattr(loop.sys, "version_info", version)
    compile_model(torch.nn.ReLU(), "cpu")
    assert seen[0]["cpp_wrapper"] is called_from_cpp


def test_nothing_is_begun_without_data(
    datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a folder that has to be resumed, nor hours that end before a missing test."""
    raw = tmp_path / "data"
    raw.mkdir()
    run = tmp_path / "run"
    monkeypatch.setattr("ws_detectron.lab.fashion_mnist.files._download", _no_network)
    with pytest.raises(UserError, match="train split.* not found"):
        train(SMALL, run, data_dir=raw)
    for path in find_fashion_mnist("train", root=datasets_root).glob("train-*"):
        shutil.copy(path, raw)
    with pytest.raises(UserError, match="test split.* not found.*Give the folder that holds them"):
        train(SMALL, run, data_dir=raw)
    for path in find_fashion_mnist("test", root=datasets_root).glob("t10k-*"):
        (raw / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="t10k-images.* is not the published file"):
        train(SMALL, run, data_dir=raw)
    assert {path.name for path in run.iterdir()} == {".lock"}


def _no_network(*_: object) -> None:
    raise OSError("no network")


def test_test_images_are_seen_once_by_the_epoch_that_validation_chose(
    datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, accuracies = [], iter([0.5, 0.9, 0.9, 0.7])
    load, metrics = training.load_test_data, training.metrics

    def load_test_data(*args: Any) -> Any:
        asked.append(args)
        return load(*args)

    def validated(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        return replace(metrics(logits, labels), accuracy=next(accuracies))

    monkeypatch.setattr(training, "load_test_data", load_test_data)
    monkeypatch.setattr(training, "metrics", validated)
    states = []

    class Watch(Progress):
        def end_epoch(self, record: dict[str, Any]) -> None:
            assert not asked
            states.append(torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"])

    result = train(SMALL, tmp_path, data_dir=datasets_root, progress=Watch())
    assert len(asked) == 1
    assert result["best_epoch"] == 2  # of the two equal ones the first
    weights = torch.load(tmp_path / WEIGHTS, weights_only=True)
    assert all(torch.equal(weights[name], states[1][name]) for name in weights)
    assert not all(torch.equal(weights[name], states[2][name]) for name in weights)


def test_a_folder_is_not_trained_in_twice(finished: Path, datasets_root: Path) -> None:
    before = (finished / RESULT).stat().st_mtime_ns
    with pytest.raises(
        UserError, match="holds a training; resume it with --resume.* with --overwrite"
    ):
        train(SMALL, finished, data_dir=datasets_root)
    with pytest.raises(UserError, match="with batch_size 20, requested is 10"):
        train(replace(SMALL, batch_size=10), finished, data_dir=datasets_root, resume=True)
    result = train(SMALL, finished, data_dir=datasets_root, resume=True)
    assert result == json.loads((finished / RESULT).read_text())
    assert (finished / RESULT).stat().st_mtime_ns == before
    # a kill between the result and the clean-up, and one while a checkpoint was written
    for name in (CHECKPOINT, f".{CHECKPOINT}.abc"):
        (finished / name).touch()
    train(SMALL, finished, data_dir=datasets_root, resume=True)
    assert not [*finished.glob(f"*{CHECKPOINT}*")]


def test_a_run_of_version_0_1_calls_its_variant_arm(
    finished: Path, datasets_root: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "old")
    path = folder / SETTINGS
    path.write_text(path.read_text().replace('"variant"', '"arm"'))
    assert train(SMALL, folder, data_dir=datasets_root, resume=True)["test_images"] == 60


def test_a_training_is_overwritten_where_that_is_asked_for(
    datasets_root: Path, tmp_path: Path
) -> None:
    train(SMALL, tmp_path, data_dir=datasets_root)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / CHECKPOINT).write_text("of an earlier run")
    once = replace(SMALL, epochs=1, seed=5)
    with pytest.raises(UserError, match="--overwrite .*--resume"):
        train(once, tmp_path, data_dir=datasets_root, resume=True, overwrite=True)
    with training.run_lock(tmp_path), pytest.raises(UserError, match="another process is training"):
        train(once, tmp_path, data_dir=datasets_root, overwrite=True)
    assert json.loads((tmp_path / RESULT).read_text())["settings"]["seed"] == SMALL.seed
    train(once, tmp_path, data_dir=datasets_root, overwrite=True)
    assert json.loads((tmp_path / RESULT).read_text())["settings"]["seed"] == 5
    assert len(json.loads((tmp_path / HISTORY).read_text())) == 1
    assert len(json.loads((tmp_path / ENVIRONMENT).read_text())) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_share_a_folder(datasets_root: Path, tmp_path: Path) -> None:
    with training.run_lock(tmp_path), pytest.raises(UserError, match="another process is training"):
        train(SMALL, tmp_path, data_dir=datasets_root)


def test_a_damaged_checkpoint_is_named(datasets_root: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(SMALL, tmp_path, data_dir=datasets_root, progress=KillAfter(1))
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="checkpoint.pt"):
        train(SMALL, tmp_path, data_dir=datasets_root, resume=True)
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="is not a checkpoint of this training"):
        train(SMALL, tmp_path, data_dir=datasets_root, resume=True)


def test_seeds_differ_and_bfloat16_trains(datasets_root: Path, tmp_path: Path) -> None:
    short = replace(SMALL, epochs=1, images=100)
    results = {
        name: train(replace(short, **changes), tmp_path / name, data_dir=datasets_root)
        for name, changes in {"0": {}, "1": {"seed": 8}, "amp": {"amp": True}}.items()
    }
    losses = {name: result["test_loss"] for name, result in results.items()}
    assert len(set(losses.values())) == 3 and all(np.isfinite(list(losses.values())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "in"}, "--variant is in; allowed: none or bn"),
        ({"batch_size": 0}, "--batch-size is 0; allowed: from 1 to"),
        ({"variant": "bn", "batch_size": 1}, "--batch-size is 1; allowed: from 2 to"),
        (
            {"variant": "bn", "batch_size": 23, "images": 300},
            "leaves one image of 300 for the last batch",
        ),
        ({"epochs": 0}, "--epochs is 0"),
        ({"images": 120}, "--images is 120; allowed: a multiple of 50"),
        ({"images": 60_000}, "--images is 60000"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"groups": 12}, "--groups is 12"),
        ({"schedule": "step"}, "--schedule is step; allowed: cosine or constant"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device is cuda, but torch finds no GPU"):
        train(replace(SMALL, device="cuda"), tmp_path)
