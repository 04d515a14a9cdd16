"""Trainings of a few hundred images: they learn, resume bit for bit, and test once."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ws_detectron.errors import DataError, DivergedError, UserError
from ws_detectron.lab.fashion_mnist import training
from ws_detectron.lab.fashion_mnist.misclassified import draw_misclassified
from ws_detectron.lab.fashion_mnist.model import build_classifier
from ws_detectron.lab.fashion_mnist.training import (
    BEST_WEIGHTS,
    CHECKPOINT,
    METRICS,
    RECORD,
    TrainingSettings,
    build_optimizer,
    default_lr,
    train,
)
from ws_detectron.utils.io import locked

SMALL = TrainingSettings("gn_ws", 20, epochs=3, images=300, seed=3)


class Killed(Exception):
    """Ends a training as a signal would."""


def kill_after(epoch: int) -> Any:
    """An `echo` that raises after the epoch was saved."""

    def echo(line: str) -> None:
        if line.startswith(f"epoch {epoch}/"):
            raise Killed

    return echo


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same_run(*folders: Path) -> None:
    """Bit for bit, but for the time."""
    rows = [read_rows(folder) for folder in folders]
    for row in (*rows[0], *rows[1]):
        assert row.pop("time") > 0
    assert rows[0] == rows[1]
    weights = [torch.load(folder / BEST_WEIGHTS, weights_only=True) for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def finished(datasets_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(SMALL, folder, data_dir=datasets_root)
    return folder


def test_a_run_leaves_its_files_and_learns(finished: Path) -> None:
    rows = read_rows(finished)
    # 15 steps an epoch; the study that runs it reads these keys
    assert [(row["epoch"], row["iteration"]) for row in rows] == [(1, 14), (2, 29), (3, 44)]
    assert rows[-1]["total_loss"] < rows[0]["total_loss"]
    assert rows[-1]["test_accuracy"] > 35  # chance is 10; 300 images seen three times
    assert [row["lr"] for row in rows] == [SMALL.lr_at(step) for step in (14, 29, 44)]
    record = json.loads((finished / RECORD).read_text())
    assert record["settings"] == asdict(SMALL) and record["starts"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "metrics.json", "run_record.json", "model_best.pth", "misclassified.png",
    }  # fmt: skip


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_killed_and_resumed_ends_with_the_same_bits(
    finished: Path, datasets_root: Path, tmp_path: Path, epoch: int
) -> None:
    with pytest.raises(Killed):
        train(SMALL, tmp_path, data_dir=datasets_root, echo=kill_after(epoch))
    torch.manual_seed(99)  # another process has other generators
    train(SMALL, tmp_path, data_dir=datasets_root, resume=True)
    assert_same_run(finished, tmp_path)
    assert json.loads((tmp_path / RECORD).read_text())["starts"] == 2


def test_killed_between_checkpoint_and_metrics_ends_with_the_same_bits(
    finished: Path, datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "write_text", write_text)
        train(SMALL, tmp_path, data_dir=datasets_root)
    train(SMALL, tmp_path, data_dir=datasets_root, resume=True)
    assert_same_run(finished, tmp_path)


@pytest.mark.parametrize("variant", ["bn", "wn"])
def test_buffers_and_parametrizations_resume_as_well(
    datasets_root: Path, tmp_path: Path, variant: str
) -> None:
    settings = replace(SMALL, variant=variant, epochs=2, images=100)
    train(settings, tmp_path / "whole", data_dir=datasets_root)
    with pytest.raises(Killed):
        train(settings, tmp_path / "cut", data_dir=datasets_root, echo=kill_after(1))
    train(settings, tmp_path / "cut", data_dir=datasets_root, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_nothing_is_begun_with_a_damaged_test_set(datasets_root: Path, tmp_path: Path) -> None:
    """Neither a folder that has to be resumed, nor hours that end before the test."""
    raw, run = tmp_path / "data", tmp_path / "run"
    raw.mkdir()
    for path in (datasets_root / "FashionMNIST" / "raw").glob("*.gz"):
        shutil.copyfile(path, raw / path.name)
    damaged = raw / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(DataError, match="t10k-images.* is not the published file: 1000 bytes"):
        train(SMALL, run, data_dir=raw)
    assert {path.name for path in run.iterdir()} == {".lock"}


def test_test_images_are_seen_once_by_the_epoch_that_validation_chose(
    datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # training and validation of each epoch, then the test
    accuracies = iter([10.0, 50.0, 10.0, 90.0, 10.0, 90.0, 70.0])
    metrics = training.metrics
    monkeypatch.setattr(training, "metrics", lambda *of: (metrics(*of)[0], next(accuracies)))
    states = []

    def echo(_: str) -> None:
        states.append(torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"])

    result = train(SMALL, tmp_path, data_dir=datasets_root, echo=echo)
    assert next(accuracies, None) is None
    assert (result["best_epoch"], result["test_accuracy"]) == (2, 70)  # the first of equal ones
    weights = torch.load(tmp_path / BEST_WEIGHTS, weights_only=True)
    assert all(torch.equal(weights[name], states[1][name]) for name in weights)
    assert not all(torch.equal(weights[name], states[2][name]) for name in weights)


def test_a_diverged_run_ends_at_once(datasets_root: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, variant="none", lr=1e6)
    with pytest.raises(DivergedError, match="epoch 1/3: .* is nan; choose a lower --lr than 1e.06"):
        train(settings, tmp_path, data_dir=datasets_root)


def test_a_folder_is_not_trained_in_twice(finished: Path, datasets_root: Path) -> None:
    before = (finished / METRICS).stat().st_mtime_ns
    with pytest.raises(
        UserError, match="holds a training; resume it with --resume.* with --overwrite"
    ):
        train(SMALL, finished, data_dir=datasets_root)
    with pytest.raises(UserError, match="with batch_size 20, requested is 10"):
        train(replace(SMALL, batch_size=10), finished, data_dir=datasets_root, resume=True)
    # a kill between the last metrics and the clean-up, and one while a checkpoint was written
    for name in (CHECKPOINT, f".{CHECKPOINT}.abc"):
        (finished / name).touch()
    assert train(SMALL, finished, data_dir=datasets_root, resume=True) == read_rows(finished)[-1]
    assert (finished / METRICS).stat().st_mtime_ns == before
    assert not [*finished.glob(f"*{CHECKPOINT}*")]


def test_a_training_is_overwritten_where_that_is_asked_for(
    finished: Path, datasets_root: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / CHECKPOINT).write_text("of an earlier run")
    once = replace(SMALL, epochs=1, seed=5)
    with pytest.raises(UserError, match="--overwrite .*--resume"):
        train(once, folder, data_dir=datasets_root, resume=True, overwrite=True)
    with locked(folder / ".lock", ""), pytest.raises(UserError, match="process is training in"):
        train(once, folder, data_dir=datasets_root, overwrite=True)
    assert len(read_rows(folder)) == 3
    train(once, folder, data_dir=datasets_root, overwrite=True)
    record = json.loads((folder / RECORD).read_text())
    assert (record["settings"]["seed"], record["starts"], len(read_rows(folder))) == (5, 1, 1)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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


def test_cosine_rises_and_falls() -> None:
    settings = TrainingSettings("gn", 50, epochs=10, images=500, lr=0.1)  # 100 steps
    assert [settings.lr_at(step) for step in (0, 4, 9)] == pytest.approx([0.01, 0.05, 0.1])
    assert settings.lr_at(10) == pytest.approx(0.1)
    assert settings.lr_at(55) == pytest.approx(0.05)  # half way down
    assert settings.lr_at(99) == pytest.approx(0.05 * (1 + math.cos(math.pi * 89 / 90)))
    assert replace(settings, batch_size=500, epochs=1).lr_at(0) == 0.1  # a single step
    constant = replace(settings, schedule="constant")
    assert {constant.lr_at(step) for step in range(100)} == {0.1}


def test_default_lr_scales_from_the_nearest_known_batch() -> None:
    assert TrainingSettings("gn", 32).lr == default_lr(32) == 0.02
    assert default_lr(4) == pytest.approx(2 * default_lr(2))
    assert default_lr(1) == pytest.approx(default_lr(2) / 2)
    assert default_lr(512) == pytest.approx(4 * default_lr(128))
    assert default_lr(40) == pytest.approx(default_lr(32) * 40 / 32)


@pytest.mark.parametrize("variant", ["gn_ws", "wn"])
def test_biases_norm_layers_and_lengths_do_not_decay(variant: str) -> None:
    model = build_classifier(variant)
    decayed, free = build_optimizer(model, 0.1).param_groups
    assert decayed["weight_decay"] == 5e-4 and free["weight_decay"] == 0
    assert {parameter.dim() for parameter in free["params"]} == {1}
    # four convs and two dense layers, and with weight norm the length of each of their vectors
    assert len(decayed["params"]) == (12 if variant == "wn" else 6)
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert decayed["nesterov"] and decayed["momentum"] == 0.9


def test_misclassified_images_are_sorted_by_confidence() -> None:
    logits = torch.zeros(4, 10)
    logits[0, 0] = 9  # correct
    logits[1, 5], logits[2, 6], logits[3, 7] = 2, 8, 4  # wrong, with rising confidence 1, 3, 2
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 28, 28)
    figure = draw_misclassified("GN", logits, images, torch.tensor([0, 1, 2, 3]))
    panels = [panel for panel in figure.axes if panel.get_title()]
    titles = [panel.get_title() for panel in panels]
    assert [title.split(",")[0].split(" ")[1] for title in titles] == ["Shirt", "Sneaker", "Sandal"]
    assert titles[0] == "predicted Shirt, 100 %\nlabeled Pullover"
    assert [np.unique(panel.images[0].get_array()).tolist() for panel in panels] == [[2], [3], [1]]
    assert figure.get_suptitle().split("\n")[0] == (
        "Fashion-MNIST, classifier of the 2019 report, GN: 3 of 4 test images are misclassified"
    )
