"""tools/train_fashion_mnist.py as a user runs it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "train_fashion_mnist.py"


def test_quick_check_passes(call_tool, datasets_root: Path) -> None:
    """GN+WS learns at batch 2 and BN does not: the effect itself."""
    status, output, errors = call_tool(TOOL.name, "--quick", "--data-dir", datasets_root)
    assert status == 0, output + errors
    assert "passed: GN+WS at batch 2 learns" in output
    assert "passed: BN at batch 2 collapses" in output
    assert "passed: GN+WS leads BN" in output


def test_a_killed_training_is_resumed(call_tool, datasets_root: Path, tmp_path: Path) -> None:
    options = ["--variant", "gn_ws", "--batch-size", "50", "--images", "500", "--epochs", "8"]
    options += ["--data-dir", str(datasets_root), "--output"]
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *options, str(folder)], stdout=subprocess.DEVNULL
    )
    metrics = folder / "metrics.json"
    while not metrics.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(metrics.read_text().splitlines())
    assert 1 <= done < 8 and "test_accuracy" not in metrics.read_text()

    status, _, errors = call_tool(TOOL.name, *options, folder)
    assert status == 2 and "resume it with --resume" in errors
    status, output, errors = call_tool(TOOL.name, *options, folder, "--resume")
    assert status == 0, errors
    assert f"epoch {done}/8" not in output and "epoch 8/8" in output
    assert "test accuracy" in output
    status, _, errors = call_tool(TOOL.name, *options, tmp_path / "whole")
    assert status == 0, errors
    killed, whole = (
        torch.load(path / "model_best.pth", weights_only=True)
        for path in (folder, tmp_path / "whole")
    )
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert len(metrics.read_text().splitlines()) == 8


def test_the_grid_is_a_study(call_tool, datasets_root: Path, tmp_path: Path) -> None:
    study = yaml.safe_load((ROOT / "configs/studies/fashion_mnist.yaml").read_text())
    study.update(
        output=str(tmp_path / "runs"), batches=[50], seeds=[0], comparisons=[["gn_ws", "bn"]]
    )
    study["options"] = {"images": 500, "epochs": 1, "data_dir": str(datasets_root)}
    study["variants"] = {name: {"options": {"variant": name}} for name in ("bn", "gn_ws")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    status, _, errors = call_tool("run_study.py", tmp_path / "small.yaml")
    assert status == 0, errors
    report = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert re.search(r"\| gn_ws_50img_seed0 +\| finished +\| \d+\.\d\d +\| 10 ", report)  # 10 steps
    metrics = tmp_path / "runs" / "runs" / "bn_50img_seed0" / "metrics.json"
    before = metrics.stat().st_mtime_ns
    assert call_tool("run_study.py", tmp_path / "small.yaml")[0] == 0
    assert metrics.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --variant and --batch-size, or --quick"),
        (["--variant", "bn", "--batch-size", "1"], "--batch-size is 1; allowed: from 2"),
        (["--quick", "--seed", "1"], "--quick takes --data-dir and --device alone, not --seed"),
    ],
)
def test_errors_are_one_line(call_tool, arguments: list[str], message: str) -> None:
    status, _, errors = call_tool(TOOL.name, *arguments)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1


def test_a_wrong_data_file_is_named(call_tool, datasets_root: Path, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (datasets_root / "FashionMNIST" / "raw").glob("*.gz"):
        (raw / path.name).write_bytes(b"not gzip")
    options = ["--variant", "gn", "--batch-size", "50", "--output", tmp_path / "run"]
    status, _, errors = call_tool(TOOL.name, *options, "--data-dir", tmp_path)
    assert status == 2 and "train-images-idx3-ubyte.gz is not the published file" in errors


def test_help_has_examples(call_tool) -> None:
    status, output, _ = call_tool(TOOL.name, "--help")
    assert status == 0 and "--variant gn_ws --batch-size 2 --resume" in output
