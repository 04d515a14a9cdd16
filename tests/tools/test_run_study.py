"""tools/run_study.py as a user runs it, with real trainings of a few steps."""

import csv
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ws_detectron.engine import load_config

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TOOL = "run_study.py"
STUDY = """
title: Two variants, one of which cannot be built
output: {output}
variants:
  gn_ws: quickstart/mask_rcnn_R_18_FPN_coco_gn_ws.yaml
  broken:
    config: quickstart/mask_rcnn_R_18_FPN_coco_gn_ws.yaml
    overrides: {{MODEL.WS.GN_GROUPS: 48}}
batches: [2]
seeds: [1]
images: 8
evaluations: 2
checkpoints: none
overrides:
  DATASETS.TRAIN: [coco_2017_val]
  DATASETS.TEST: [coco_2017_val]
  DATALOADER.NUM_WORKERS: 0
  INPUT.MASK_FORMAT: bitmask
  INPUT.MIN_SIZE_TRAIN: [64]
  INPUT.MAX_SIZE_TRAIN: 64
  INPUT.MIN_SIZE_TEST: 64
  INPUT.MAX_SIZE_TEST: 64
  MODEL.RPN.POST_NMS_TOPK_TEST: 5
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(output=tmp_path / "out"))
    return path


def test_runs_train_and_are_reported_and_a_broken_one_is_named(
    run_tool, call_tool, study: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    result = run_tool(TOOL, study, "--jobs", 2, "--records", records)
    assert result.returncode == 1, result.stderr
    assert "broken_2img_seed1 is failed: " in result.stderr and "GN_GROUPS is 48" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "gn_ws_2img_seed1 finished in" in result.stdout
    report = tmp_path / "out" / "report"
    run, broken = csv.DictReader((report / "cells.csv").open())
    assert (run["state"], run["iterations"], broken["state"]) == ("finished", "4", "failed")
    assert float(run["bbox/AP"]) >= 0 and float(run["segm/AP"]) >= 0
    assert float(run["peak_memory_bytes"]) > 1e8 and float(run["training_seconds"]) > 0
    assert "GN_GROUPS is 48" in (report / "index.html").read_text()
    ran = load_config(str(tmp_path / "out" / "cells" / "gn_ws_2img_seed1" / "config.yaml"))
    # the config: LR 0.02 at 4 images
    assert ran.SOLVER.BASE_LR == pytest.approx(0.01) and ran.SEED == 1
    assert not list((tmp_path / "out").glob("cells/*/*.pth"))

    options = ["--report-only", "--report", tmp_path / "again"]
    status, output, errors = call_tool(TOOL, study, *options)
    assert status == 1 and "broken_2img_seed1 is failed" in errors
    assert (tmp_path / "again" / "cells.csv").read_text() == (report / "cells.csv").read_text()

    (tmp_path / "out").rename(tmp_path / "elsewhere")
    status, output, errors = call_tool(TOOL, study, *options, "--records", records)
    assert status == 1 and "1 of 2 not started: broken_2img_seed1" in errors
    (again, _) = csv.DictReader((tmp_path / "again" / "cells.csv").open())
    assert again == run


def test_a_killed_study_goes_on_from_the_checkpoint_of_its_run(
    run_tool, study: Path, tmp_path: Path
) -> None:
    run = tmp_path / "out" / "cells" / "gn_ws_2img_seed1"
    job = [sys.executable, str(TOOLS / TOOL), str(study), "--variants", "gn_ws"]
    with subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runner:
        while not (run / "last_checkpoint").is_file():  # an evaluation follows
            assert runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(signal.SIGTERM)
    assert json.loads((run / "cell.json").read_text())["state"] == "running"
    result = run_tool(TOOL, study, "--variants", "gn_ws")
    assert "gn_ws_2img_seed1 finished in" in result.stdout, result.stderr
    assert "Starting training from iteration 2" in (run / "log.txt").read_text()
    first, _ = csv.DictReader((tmp_path / "out" / "report" / "cells.csv").open())
    assert (first["state"], first["iterations"]) == ("finished", "4")
    assert "resumed: 2 starts" in first["notes"] and float(first["bbox/AP"]) >= 0


def test_dry_run_prints_commands_and_runs_nothing(call_tool, study: Path, tmp_path: Path) -> None:
    status, output, _ = call_tool(TOOL, study, "--dry-run", "--variants", "gn_ws")
    (line,) = output.splitlines()
    words = shlex.split(line)
    assert status == 0 and words[1].endswith("tools/train_net.py") and "--resume" in words
    assert words[words.index("SOLVER.MAX_ITER") + 1] == "4"
    assert words[words.index("MODEL.DEVICE") + 1] == "cpu"
    status, output, _ = call_tool(
        TOOL, study, "--dry-run", "--variants", "gn_ws", "--device", "cuda"
    )
    assert status == 0 and output == line.replace("MODEL.DEVICE cpu", "MODEL.DEVICE cuda") + "\n"
    assert not (tmp_path / "out").exists()


def test_help_and_mistakes(call_tool, tmp_path: Path) -> None:
    status, output, _ = call_tool(TOOL, "--help")
    assert status == 0 and "configs/studies/fashion_scenes.yaml --jobs 2" in output
    (tmp_path / "study.yaml").write_text("variant: {}")
    status, _, errors = call_tool(TOOL, tmp_path / "study.yaml")
    assert status == 2 and "`variants` is missing" in errors
    status, _, errors = call_tool(TOOL, tmp_path / "study.yaml", "--jobs", 0)
    assert status == 2 and "less than 1" in errors
