"""tools/run_study.py as a user runs it, with real trainings of a few steps."""

import json
import re
import shlex
from pathlib import Path

import pytest

from ws_detectron.engine import load_config

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


def rows_of_runs(report: str) -> list[str]:
    """Of the variants gn_ws and broken."""
    return re.findall(r"^\| (?:gn_ws|broken)_2img_seed1 .*$", report, re.MULTILINE)


def test_runs_train_and_are_reported_and_a_broken_one_is_named(
    run_tool, call_tool, study: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    result = run_tool(TOOL, study, "--jobs", 2, "--records", records)
    assert result.returncode == 1, result.stderr
    assert "broken_2img_seed1 is failed: " in result.stderr and "GN_GROUPS is 48" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "gn_ws_2img_seed1 finished in" in result.stdout
    assert re.search(r"^\| GN\+WS +\| [\d.]+ \(1\) +\|$", result.stdout, re.M)  # the mean box AP
    made, report, _, _, again = result.stdout.splitlines()[-5:]
    assert made == "1 of 2 runs finished" and str(records / "report.md") in report
    assert again.endswith(f"tools/run_study.py {study} --jobs 2 --records {records}")
    assert {path.name for path in records.iterdir()} == {
        *("runs.jsonl", "metrics.csv", ".lock"),
        *("report.md", "ap_by_variant.png", "learning_curves.png"),
    }
    report = (records / "report.md").read_text()
    run, broken = rows_of_runs(report)
    assert re.match(r"\| gn_ws_2img_seed1 +\| finished +(\| [\d.]+ +){2}\| 0.01 +\| 4 / 4 ", run)
    assert re.search(r"\| [\d,]{3,} MiB ", run) and "| failed " in broken
    assert "GN_GROUPS is 48" in broken
    (recorded,) = map(json.loads, (records / "runs.jsonl").read_text().splitlines()[1:])
    assert (recorded["name"], recorded["state"]) == ("gn_ws_2img_seed1", "finished")
    assert recorded["run_record"]["peak_memory_bytes"] > 1e8
    assert len((records / "metrics.csv").read_text().splitlines()) > 2
    ran = load_config(str(tmp_path / "out" / "runs" / "gn_ws_2img_seed1" / "config.yaml"))
    # the config: LR 0.02 at 4 images
    assert ran.SOLVER.BASE_LR == pytest.approx(0.01) and ran.SEED == 1
    assert not list((tmp_path / "out").glob("runs/*/*.pth"))

    again = tmp_path / "again" / "report.md"
    options = ["--report-only", "--report", again.parent]
    status, output, errors = call_tool(TOOL, "--input", study, *options, "--html")
    assert status == 1 and "broken_2img_seed1 is failed" in errors
    assert f"report  {again.with_suffix('.html')}" in output and "--report-only" not in output
    assert again.read_text() == report
    assert "GN_GROUPS is 48" in again.with_suffix(".html").read_text()

    (tmp_path / "out").rename(tmp_path / "elsewhere")
    status, output, errors = call_tool(TOOL, study, *options, "--records", records)
    assert status == 1 and "1 of 2 not started: broken_2img_seed1" in errors
    from_records, _ = rows_of_runs(again.read_text())
    assert from_records.split() == run.split()


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
    (tmp_path / "study.yaml").write_text("seeds: [1]")
    status, _, errors = call_tool(TOOL, tmp_path / "study.yaml")
    assert status == 2 and "`variants` is missing" in errors
    status, _, errors = call_tool(TOOL, tmp_path / "study.yaml", "--jobs", 0)
    assert status == 2 and "it is 0; allowed: 1 or more" in errors


def test_scenes_are_registered(run_tool, study: Path) -> None:
    """In a process of its own: those of the tests have them already."""
    text = study.read_text().replace("TRAIN: [coco_2017_val]", "TRAIN: [scenes_shapes_128_train]")
    study.write_text(text.replace("TEST: [coco_2017_val]", "TEST: [no_set]"))
    result = run_tool(TOOL, study)
    assert result.returncode == 2 and "DATASETS.TEST names 'no_set'" in result.stderr


def test_records_that_do_not_exist_are_refused(call_tool, study: Path, tmp_path: Path) -> None:
    status, _, error = call_tool(TOOL, study, "--report-only", "--records", tmp_path / "mistyped")
    assert status == 2 and "mistyped has no runs.jsonl; check --records" in error
    assert not (tmp_path / "mistyped").exists()
