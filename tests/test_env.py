"""DETECTRON2_ENV_MODULE: scripts that know nothing of this package use our configs."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_coco import annotations

from ws_detectron.engine import load_config
from ws_detectron.model_zoo import get_config_file

LEAF = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
# detectron2's own, which tools/install_detectron2.py installs from the checked source distribution
SCRIPTS = Path(sys.prefix, "share", "detectron2", "tools")
needs_scripts = pytest.mark.skipif(
    not SCRIPTS.is_dir(), reason=f"detectron2's scripts are not in {SCRIPTS}"
)
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
        env={
            **os.environ,
            "DETECTRON2_ENV_MODULE": module,
            "PYTHONWARNINGS": "ignore::FutureWarning",  # torch 2.14 deprecates jit.script
            **variables,
        },
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


@pytest.fixture(params=["leaf", "run"])
def config(request: pytest.FixtureRequest, run_config: str) -> str:
    """A shipped config, or that of a run."""
    return get_config_file(LEAF) if request.param == "leaf" else run_config


@pytest.fixture
def squares(tmp_path: Path) -> str:
    """A YAML file that registers `squares`, two images with an object each."""
    content = annotations([(1, 1, (10, 10, 40, 30)), (2, 2, (30, 20, 50, 40))])
    for image in content["images"]:
        pixels = np.full((image["height"], image["width"], 3), 99, np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    (tmp_path / "squares.json").write_text(json.dumps(content))
    path = tmp_path / "squares.yaml"
    path.write_text(yaml.safe_dump([["squares", str(tmp_path / "squares.json"), str(tmp_path)]]))
    return str(path)


def start(
    script: str, config: str, data_sets: str, *arguments: str, opts: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Starts a script of detectron2, unchanged, on the squares."""
    names = [value for key in ("TRAIN", "TEST") for value in (f"DATASETS.{key}", "('squares',)")]
    return subprocess.Popen(
        [
            *(sys.executable, str(SCRIPTS / script), *arguments, "--config-file", config),
            *(*names, "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "1", *opts),
        ],
        env={
            **os.environ,
            "DETECTRON2_ENV_MODULE": "ws_detectron.env",
            "WS_DETECTRON_DATASETS": data_sets,
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


@needs_scripts
def test_analyze_model_counts_convs_with_ws_as_convs(run_config: str, squares: str) -> None:
    # without heads, the work does not depend on random weights
    opts = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    plain = (*opts, "MODEL.WS.BACKBONE", "False", "MODEL.WS.FPN", "False")
    tasks = ["--num-inputs", "2", "--tasks", "parameter", "flop", "activation", "structure"]
    found = []
    for config, chosen in ((get_config_file(LEAF), opts), (run_config, plain)):
        output = finish(start("analyze_model.py", config, squares, *tasks, opts=chosen))
        flops, activations = re.findall(r"\('conv', ([\d.e-]+)\)", output)
        assert float(flops) > 0.1  # GFlops
        parameters = re.search(r"\| +model +\| +(\S+)", output)
        assert parameters is not None
        found.append((flops, activations, parameters[1]))
        assert ("WSConv2d(" in output) is (chosen is opts)
    assert found[0] == found[1]


@needs_scripts
@pytest.mark.parametrize(
    ("config", "source"), [("leaf", "annotation"), ("run", "dataloader")], indirect=["config"]
)
def test_visualize_data_draws(tmp_path: Path, config: str, squares: str, source: str) -> None:
    pictures = tmp_path / "pictures"
    arguments = ["--source", source, "--output-dir", str(pictures)]
    process = start("visualize_data.py", config, squares, *arguments)
    if source == "annotation":
        finish(process)
    else:  # reads the training loader, which has no end
        deadline = time.monotonic() + 300
        while process.poll() is None and len(list(pictures.glob("*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
        assert process.wait() < 0, process.communicate()[0]
    assert {path.stem for path in pictures.iterdir()} == {"1", "2"}


@needs_scripts
def test_plain_train_net_trains_and_evaluates(tmp_path: Path, config: str, squares: str) -> None:
    output = tmp_path / "output"
    opts = ("SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(output), "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    text = finish(start("plain_train_net.py", config, squares, opts=opts))
    assert (output / "model_final.pth").exists()
    assert "Task: bbox" in text and "Task: segm" in text
    warned = "SOLVER.ACCUMULATE_STEPS is 2, but this trainer does not" in text
    assert warned is (config != get_config_file(LEAF))


@needs_scripts
def test_benchmark_reads_data(config: str, squares: str) -> None:
    pytest.importorskip("psutil")
    opts = ("INPUT.MIN_SIZE_TRAIN", "(8,)")  # 2,750 images
    text = finish(start("benchmark.py", config, squares, "--task", "data", opts=opts))
    assert "Iteration 9 RAM Usage" in text


BUILD = """
from detectron2.modeling import build_model
print(type(build_model(cfg)).__name__)
"""


def test_without_the_variable_the_config_of_a_run_is_refused(run_config: str) -> None:
    assert run(BUILD, run_config) == "GeneralizedRCNN\n"
    assert "Non-existent config key: DATASETS.REGISTER" in run(BUILD, run_config, module="")


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
