"""DETECTRON2_ENV_MODULE: scripts that know nothing of this package use our configs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ws_detectron.engine import load_config
from ws_detectron.model_zoo import get_config_file

LEAF = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
READ = """
import sys
from detectron2.config import get_cfg
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1], allow_unsafe=False)
cfg.MODEL.DEVICE = "cpu"
cfg.freeze()
"""


def run(script: str, *arguments: str, module: str = "ws_detectron.env", **variables: str) -> str:
    """Runs a script that starts like those of detectron2; returns its outputs."""
    done = subprocess.run(
        [sys.executable, "-c", READ + script, *arguments],
        env={**os.environ, "DETECTRON2_ENV_MODULE": module, **variables},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture
def run_config(tmp_path: Path) -> str:
    """The config.yaml of a run."""
    path = tmp_path / "config.yaml"
    path.write_text(load_config(LEAF, ["SOLVER.ACCUMULATE_STEPS", "2"]).dump())
    return str(path)


BUILD = """
from detectron2.modeling import build_model
print(sum(type(m).__name__ == "WSConv2d" for m in build_model(cfg).modules()))
"""


def test_models_are_built_from_a_leaf_and_from_the_config_of_a_run(run_config: str) -> None:
    leaf, own = (run(BUILD, path) for path in (get_config_file(LEAF), run_config))
    assert leaf.split() == own.split() and int(leaf) > 20
    assert "Non-existent config key: DATASETS.REGISTER" in run(BUILD, run_config, module="")


def test_flops_of_convs_do_not_depend_on_ws(run_config: str) -> None:
    script = """
import torch
from detectron2.modeling import build_backbone
from fvcore.nn import FlopCountAnalysis
counts = []
for ws in (True, False):
    cfg.defrost()
    cfg.MODEL.WS.BACKBONE = cfg.MODEL.WS.FPN = ws
    flops = FlopCountAnalysis(build_backbone(cfg), torch.ones(1, 3, 64, 64))
    counts.append(flops.unsupported_ops_warnings(False).by_operator()["conv"])
print("conv", *counts)
"""
    ws, plain = run(script, run_config).rpartition("conv ")[2].split()
    assert ws == plain and float(ws) > 1e6


@pytest.mark.parametrize("form", ["list", "config"])
def test_own_data_sets_are_registered(tmp_path: Path, run_config: str, form: str) -> None:
    entries = [["mine", "a.json", "images"]]
    path = tmp_path / "datasets.yaml"
    path.write_text(yaml.safe_dump({"DATASETS": {"REGISTER": entries}} if "c" in form else entries))
    script = "from detectron2.data import MetadataCatalog as M; print(M.get('mine').image_root)"
    found = run(script, run_config, WS_DETECTRON_DATASETS=str(path))
    assert found == f"{Path('images').absolute()}\n"


def test_a_file_without_data_sets_is_named(tmp_path: Path, run_config: str) -> None:
    path = tmp_path / "datasets.yaml"
    path.write_text("DATASETS: {TRAIN: []}")
    found = run("", run_config, WS_DETECTRON_DATASETS=str(path))
    assert f"{path} has no list of data sets; allowed: entries [name, annotations" in found


def test_scenes_are_registered_by_the_lab(run_config: str) -> None:
    script = (
        "from detectron2.data import DatasetCatalog; print(cfg.DATASETS.TEST[0] in DatasetCatalog)"
    )
    assert run(script, run_config, module="ws_detectron.lab.env") == "True\n"
    assert run(script, run_config) == "False\n"


TRAIN = """
import torch
from detectron2.engine import DefaultTrainer
if cfg.SOLVER.MAX_ITER == 7:
    cfg.__dict__["prepared"] = None
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
DefaultTrainer.build_lr_scheduler(cfg, optimizer)
from detectron2.solver import build_lr_scheduler
build_lr_scheduler(cfg, optimizer)
"""


def test_settings_that_another_trainer_ignores_are_warned_of(tmp_path: Path) -> None:
    cfg = load_config(LEAF, ["SOLVER.ACCUMULATE_STEPS", "2"])
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 3 * cfg.SOLVER.IMS_PER_BATCH
    cfg.DATASETS.REGISTER, cfg.SOLVER.EPOCHS = [["mine", "a.json", "images"]], 7
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    found = run(TRAIN, str(path))
    for text in (
        "SOLVER.ACCUMULATE_STEPS is 2, but this trainer does not",
        "SOLVER.EPOCHS is 7, but this trainer counts",
        "does not scale LR and schedule to SOLVER.IMS_PER_BATCH",
        "DATASETS.REGISTER has mine, which this script does not register",
    ):
        assert found.count(text) == 2, found  # in both ways to build a scheduler
    cfg.SOLVER.MAX_ITER = 7  # of our own trainer, which follows them
    path.write_text(cfg.dump())
    assert "SOLVER.ACCUMULATE_STEPS" not in run(TRAIN, str(path))
