"""tools/benchmark.py as a user runs it."""

import json
from pathlib import Path

import pytest
import torch

from ws_detectron.lab.benchmark import classifier, operation


def test_the_operation_is_measured(run_tool, tmp_path: Path) -> None:
    options = ["--rounds", 1, "--warmup", 0, "--depth", 50, "--output", tmp_path]
    result = run_tool("benchmark.py", "operation", "--device", "cpu", *options)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "cpu_operation.json").read_text())
    assert content["about"]["command"].startswith("python tools/benchmark.py operation --device")
    assert content["about"]["torch"] and content["values"] == 23_454_912
    assert "times the floor" in result.stdout and "ws_detectron, paper" in result.stdout


def test_help_shows_an_example(call_tool) -> None:
    status, output, _ = call_tool("benchmark.py", "--help")
    assert status == 0 and "python tools/benchmark.py arms --batches 1 2 4 8 16" in output


def test_config_keys_may_follow_options(call_tool, tmp_path: Path) -> None:
    options = ["step", "--device", "cpu", "--output", tmp_path, "--rounds", 1, "--short-side", 64]
    status, _, errors = call_tool("benchmark.py", *options, "MODEL.NO_SUCH_KEY", 1)
    assert status == 2 and "MODEL.NO_SUCH_KEY" in errors and "unrecognized" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["classifier", "--depth", 101],
            "--depth has no effect with classifier; allowed are --dev",
        ),
        (["operation", "--arms", "bn"], "--arms has no effect with operation"),
        (
            ["classifier", "--arms", "sync_bn"],
            "--arms of classifier: sync_bn is none; allowed: none",
        ),
        (["step", "--arms", "wn"], "--arms of step: wn is none; allowed: bn, frozen_bn"),
        (["operation", "--budget", "8m"], "--budget has no effect with operation"),
        (["gpu", "--budget", "8"], "'8' is no time; allowed: a number and s, m or h"),
        (["classifier", "--variants", "autocast"], "autocast is none; allowed: plain, compile"),
    ],
)
def test_what_would_be_ignored_is_refused(call_tool, arguments: list, message: str) -> None:
    status, _, errors = call_tool("benchmark.py", *arguments)
    assert status == 2 and message in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_needs_one(call_tool) -> None:
    status, _, errors = call_tool("benchmark.py", "gpu")
    assert status == 2 and "gpu needs a CUDA device" in errors


def test_group_norm_is_measured(call_tool, tmp_path: Path, monkeypatch) -> None:
    small = [(32, 4, 4, 2), (64, 2, 2, 1)]
    monkeypatch.setattr(operation, "_feature_shapes", lambda *size: small)
    options = ["--device", "cpu", "--output", tmp_path, "--rounds", 2]
    status, output, errors = call_tool("benchmark.py", "group_norm", *options)
    assert status == 0, errors
    assert (tmp_path / "cpu_group_norm.md").read_text() in output
    assert len([line for line in output.splitlines() if " of 2 " in line]) == 8


def test_the_classifier_is_measured_with_the_arms_asked_for(
    call_tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "MOST_STEPS", 1)
    options = ["--device", "cpu", "--output", tmp_path, "--rounds", 1, "--warmup", 0]
    options += ["--batches", 4]
    status, output, errors = call_tool("benchmark.py", "classifier", *options, "--arms", "bn", "wn")
    assert status == 0, errors
    content = json.loads((tmp_path / "cpu_classifier.json").read_text())
    assert list(content["parts"][0]["seconds"]) == ["bn", "wn"]
