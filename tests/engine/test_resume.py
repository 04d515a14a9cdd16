"""A resumed run is the run without interruption, bit for bit: order, randomness, state, metrics."""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.events import get_event_storage
from small_trainer import SmallTrainer, small_cfg
from torch import nn

from ws_detectron.engine import Trainer, run

TIMES = ("time", "data_time", "eta_seconds")


class Killed(BaseException):
    """Ends a training as if its process were killed."""


class Model(nn.Module):
    """Two convs with BN and dropout, whose loss has random weights from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 1, 3)
        )

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        images = torch.stack([example["image"] for example in batch]) / 255
        get_event_storage().put_scalar("flips", float(np.random.rand()))
        target = random.random() + np.random.rand()
        return {"loss": (self.net(images).mean((1, 2, 3)) - target).square().mean()}


class Run(Trainer):
    """Its training is killed in the step or evaluation of an iteration, if it is told so."""

    kill: tuple[str, int] = ("", -1)
    seen: list[tuple]  # files of each batch

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Model()

    def run_step(self) -> None:
        super().run_step()
        if self.kill == ("step", self.iter):
            raise Killed

    def after_train(self) -> None:
        if self.iter >= self.max_iter:  # nothing runs after a kill
            super().after_train()

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        if cls.kill == ("test", get_event_storage().iter):
            raise Killed
        return {"bbox": {"AP": sum(p.detach().double().sum().item() for p in model.parameters())}}


def start(cfg: CfgNode, *, resume: bool = False, kill: tuple[str, int] = ("", -1)) -> Run:
    torch.seed(), random.seed(), np.random.seed()  # as in a process of its own
    trainer = Run(cfg)
    trainer.resume_or_load(resume=resume)
    Run.kill = kill
    try:
        trainer.train()
    except Killed:
        pass
    finally:
        Run.kill = ("", -1)
    return trainer


def metrics(cfg: CfgNode) -> list[dict]:
    """metrics.json but for times."""
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def last_checkpoint(cfg: CfgNode) -> dict:
    """Weights, optimizer, schedule and recent metrics at the end, but for times."""
    checkpoint = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=False)
    state = checkpoint["trainer"]
    del state["config"], state["metrics"]["data_time"], state["metrics_size"]
    return {"model": checkpoint["model"], "trainer": state}


def assert_same_run(found: CfgNode, expected: CfgNode) -> None:
    torch.testing.assert_close(last_checkpoint(found), last_checkpoint(expected), rtol=0, atol=0)
    assert metrics(found) == metrics(expected)


@pytest.fixture
def resumable(tiny_cfg: CfgNode, tmp_path: Path) -> Callable[..., CfgNode]:
    """Configs of a run of 26 iterations in different folders, evaluated after every 8th."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS, tiny_cfg.SOLVER.WARMUP_ITERS = 26, (20,), 2
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD, tiny_cfg.TEST.EVAL_PERIOD = 4, 8
    tiny_cfg.TEST.PRECISE_BN.ENABLED, tiny_cfg.TEST.PRECISE_BN.NUM_ITER = True, 3

    def make(name: str, **options: Any) -> CfgNode:
        cfg = tiny_cfg.clone()
        cfg.merge_from_list([word for pair in options.items() for word in pair])
        cfg.OUTPUT_DIR = str(tmp_path / name)
        return cfg

    return make


@pytest.mark.parametrize(("parts", "grouping"), [(1, True), (2, False)])
def test_a_run_killed_anywhere_ends_as_the_others(
    resumable: Callable[..., CfgNode], parts: int, grouping: bool
) -> None:
    """Killed before the first checkpoint, in a step, in evaluations; with workers and without."""
    options = {"SOLVER.ACCUMULATE_STEPS": parts, "DATALOADER.ASPECT_RATIO_GROUPING": grouping}
    whole = resumable("whole", **options)
    start(whole)
    kills = [("step", 2), ("test", 7), ("step", 22), ("", -1)]
    for number, kill in enumerate(kills):
        killed = resumable("killed", **options, **{"DATALOADER.NUM_WORKERS": number % 2})
        trainer = start(killed, resume=number > 0, kill=kill)
        assert trainer.start_iter == [0, 0, 8, 20][number]
    assert_same_run(killed, whole)
    # metrics are written at iterations 19 and 25, and after the training: the last of each
    assert [m["iteration"] for m in metrics(whole) if "bbox/AP" in m] == [15, 23, 26]


JOB = """
import random, sys, time
from test_resume import Run
from ws_detectron.engine import load_config

class Slow(Run):
    def run_step(self):
        super().run_step()
        time.sleep(0.1)

trainer = Slow(load_config(sys.argv[1]))
trainer.resume_or_load(resume=True)
trainer.train()
"""


def test_a_process_that_is_killed_ends_as_the_others(
    resumable: Callable[..., CfgNode], tmp_path: Path
) -> None:
    """By SIGKILL at a random time after a checkpoint; tools/check_resume.py does more of it."""
    whole, killed = resumable("whole"), resumable("killed", **{"DATALOADER.NUM_WORKERS": 1})
    start(whole)
    (name,) = killed.DATASETS.TRAIN
    metadata = MetadataCatalog.get(name)
    killed.DATASETS.REGISTER = [[name, metadata.json_file, metadata.image_root]]
    (tmp_path / "job.yaml").write_text(killed.dump())
    (tmp_path / "job.py").write_text(JOB)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    tag = tmp_path / "killed" / "last_checkpoint"
    for resumed in (False, True):
        with open(tmp_path / "job.txt", "w") as log:
            job = subprocess.Popen(
                [sys.executable, "job.py", "job.yaml"],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )
        if resumed:
            assert job.wait(300) == 0, (tmp_path / "job.txt").read_text()
            break
        while not tag.is_file():
            assert job.poll() is None, (tmp_path / "job.txt").read_text()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        job.kill()  # not its worker, which ends by itself
        job.wait()
    assert_same_run(killed, whole)
    record = json.loads((tmp_path / "killed" / "run_record.json").read_text())
    assert record["starts"] == 2


def test_a_drawn_seed_is_kept(
    tiny_cfg: CfgNode, resumable: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the checkpoint, from which also a subset of the images is drawn again."""
    monkeypatch.setattr(sys.modules["ws_detectron.engine.run"], "Trainer", Run)
    tiny_cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    tiny_cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5  # a key of the main branch
    cfg = resumable("drawn", SEED=-1, **{"SOLVER.MAX_ITER": 6})
    arguments = {"eval_only": False, "resume": True, "config_file": ""}
    monkeypatch.setattr(Run, "kill", ("step", 4))
    with pytest.raises(Killed):
        run(cfg.clone(), argparse.Namespace(**arguments))
    monkeypatch.setattr(Run, "kill", ("", -1))
    folder = Path(cfg.OUTPUT_DIR)
    drawn = CfgNode.load_cfg((folder / "config.yaml").read_text()).SEED
    assert drawn >= 0
    run(cfg.clone(), argparse.Namespace(**arguments))
    assert CfgNode.load_cfg((folder / "config.yaml").read_text()).SEED == drawn
    config = torch.load(folder / "model_final.pth", weights_only=False)["trainer"]["config"]
    assert config["SEED"] == drawn
    again = resumable("again", SEED=drawn, **{"SOLVER.MAX_ITER": 6})
    start(again)
    assert_same_run(again, cfg)


def test_a_loader_of_somebody_is_outside_the_guarantee(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, resumable: Callable[..., CfgNode]
) -> None:
    SmallTrainer(small_cfg(tmp_path / "small")).train()
    assert "The training loader is a repeat: its images, and what the model draws" in caplog.text
    caplog.clear()
    cfg = resumable("run", **{"SOLVER.MAX_ITER": 1})
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    start(cfg)
    assert "loader is" not in caplog.text
