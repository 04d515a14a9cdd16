"""What the evaluation tools are run on: a small COCO folder, predictions, a model."""

import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from evaluated_model import IN_PROCESS, OPTIONS, QUICKSTART
from perturbed import perturbed_predictions

from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.engine import Trainer, load_config
from ws_detectron.lab.scenes import SceneSpec, ensure_scenes

ROOT = Path(__file__).resolve().parents[2]
LOGGERS = ("detectron2", "ws_detectron", "fvcore")

RunTool = Callable[..., subprocess.CompletedProcess]


@dataclass(frozen=True)
class EvaluationFiles:
    """`datasets` is a DETECTRON2_DATASETS whose `coco_2017_val` is `annotations` and `images`."""

    datasets: Path
    annotations: Path
    images: Path
    predictions: Path
    weights: Path


@pytest.fixture(scope="session")
def evaluation_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvaluationFiles]:
    """Six scenes of 64 pixels in COCO's layout and categories, predictions, random weights.

    In this process the data set is `IN_PROCESS`: where `coco_2017_val` is was settled at import.
    """
    root = tmp_path_factory.mktemp("evaluation")
    spec = SceneSpec(image_size=64, num_images=6, object_scale=(0.2, 0.5))
    scenes = ensure_scenes(spec, root)
    files = EvaluationFiles(
        datasets=root,
        annotations=root / "coco" / "annotations" / "instances_val2017.json",
        images=root / "coco" / "val2017",
        predictions=root / "predictions.json",
        weights=root / "random.pth",
    )
    shutil.copytree(scenes / "images", files.images)
    truth = json.loads((scenes / "annotations.json").read_text())
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    truth["categories"] = [{"id": c["id"], "name": c["name"]} for c in things]
    files.annotations.parent.mkdir(parents=True)
    files.annotations.write_text(json.dumps(truth))
    files.predictions.write_text(json.dumps(perturbed_predictions(truth, seed=0)))
    torch.manual_seed(0)
    model = Trainer.build_model(load_config(QUICKSTART, OPTIONS))
    WSCheckpointer(model, str(root)).save("random")
    register_coco_instances(IN_PROCESS, {}, str(files.annotations), str(files.images))
    yield files
    DatasetCatalog.remove(IN_PROCESS)
    MetadataCatalog.remove(IN_PROCESS)


@pytest.fixture(scope="session")
def run_tool(evaluation_files: EvaluationFiles) -> RunTool:
    """Runs `tools/<name>` as a user does, on `evaluation_files`."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DETECTRON2_DATASETS": str(evaluation_files.datasets),
            },
        )

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as `run_tool` gives a process: a sum over more of them rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs `tools/<name>` in this process, which saves its start; status, output and errors."""

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    # tools set up logging to the screen, which other tests must not see
    loggers = [logging.getLogger(name) for name in (*LOGGERS, "detectron2.engine.defaults")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield call
    for logger, (level, propagate, handlers) in zip(loggers, before):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers
