"""tools/train_fashion_mnist.py as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from train_fashion_mnist import build_parser

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_fashion_mnist.py"


@pytest.fixture
def command(datasets_root: Path, tmp_path: Path) -> list[str]:
    return [
        sys.executable,
        str(TOOL),
        "--data-dir",
        str(datasets_root),
        "--output",
        str(tmp_path),
    ]


def replace_output(job: list[str], folder: Path) -> list[str]:
    position = job.index("--output") + 1
    return [*job[:position], str(folder), *job[position + 1 :]]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=600)


def test_quick_check_passes(command: list[str], tmp_path: Path) -> None:
    """GN+WS learns at batch 2 and BN does not: the effect itself."""
    result = run(*command, "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed: GN+WS at batch 2 learns" in result.stdout
    assert "passed: BN at batch 2 collapses" in result.stdout
    assert "passed: GN+WS leads BN" in result.stdout
    found = json.loads((tmp_path / "quick" / "gn_ws_batch2_seed0" / "result.json").read_text())
    assert found["test_images"] == 800


def test_a_killed_training_is_resumed(call_tool, command: list[str], tmp_path: Path) -> None:
    job = [*command, "--variant", "gn_ws", "--batch-size", "50", "--images", "500", "--epochs", "8"]
    folder = tmp_path / "gn_ws_batch50_seed0"
    process = subprocess.Popen(job, stdout=subprocess.DEVNULL)
    while not (folder / "history.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(json.loads((folder / "history.json").read_text()))
    assert 1 <= done < 8 and not (folder / "result.json").exists()

    status, _, errors = call_tool(TOOL.name, *job[2:])
    assert status == 2 and "resume it with --resume" in errors
    status, output, errors = call_tool(TOOL.name, *job[2:], "--resume")
    assert status == 0, errors
    assert f"epoch {done}/8" not in output and "epoch 8/8" in output
    assert "test accuracy" in output
    whole = replace_output(job, tmp_path / "whole")
    status, _, errors = call_tool(TOOL.name, *whole[2:])
    assert status == 0, errors
    logits = [
        np.load(path / "test_logits.npy") for path in (folder, tmp_path / "whole" / folder.name)
    ]
    np.testing.assert_array_equal(*logits)
    assert len(json.loads((folder / "history.json").read_text())) == 8


def test_grid_is_trained_and_reported(call_tool, command: list[str], tmp_path: Path) -> None:
    job = [
        *command[2:],
        "--all",
        "--variants",
        "bn",
        "gn_ws",
        "--batch-sizes",
        "50",
        "--seeds",
        "0",
    ]
    job += ["--images", "500", "--epochs", "1"]
    status, output, errors = call_tool(TOOL.name, *job)
    assert status == 0, errors
    assert "[2/2] gn_ws_batch50_seed0: test accuracy" in output
    assert "GN+WS" in (tmp_path / "report" / "README.md").read_text()
    _, output, _ = call_tool(TOOL.name, *job)
    assert "[2/2] gn_ws_batch50_seed0: already finished" in output

    # the report needs nothing but what it has recorded
    (tmp_path / "report" / "README.md").unlink()
    paths = ["--output", str(tmp_path / "gone"), "--report", str(tmp_path / "report")]
    status, _, errors = call_tool(TOOL.name, "--report-only", *paths)
    assert status == 0, errors
    text = (tmp_path / "report" / "README.md").read_text()
    assert "    python tools/train_fashion_mnist.py --data-dir" in text and "GN+WS" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --variant and --batch-size, or --all"),
        (["--variant", "bn", "--batch-size", "1"], "--batch-size is 1; allowed: from 2"),
        (["--report-only", "--report", "nowhere"], "holds no finished trainings"),
        (["--all", "--seed", "1"], "--seed has no effect with --all; allowed are --variants"),
        (["--variant", "bn", "--seeds", "1"], "--seeds has no effect without --all"),
        (["--quick", "--amp"], "--amp has no effect with --quick; allowed are --data-dir"),
    ],
)
def test_errors_are_one_line(
    call_tool, command: list[str], arguments: list[str], message: str
) -> None:
    status, _, errors = call_tool(TOOL.name, *command[2:], *arguments)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1


def test_missing_data_are_named(command: list[str], tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (raw / name).write_bytes(b"not gzip")
    job = [*command, "--variant", "gn", "--batch-size", "50"]
    job[job.index("--data-dir") + 1] = str(tmp_path)
    result = run(*job)
    assert (
        result.returncode == 2
        and "train-images-idx3-ubyte.gz is not the published" in result.stderr
    )


def test_help_has_examples() -> None:
    result = run(sys.executable, TOOL, "--help")
    assert result.returncode == 0 and "--variant gn_ws --batch-size 2 --resume" in result.stdout


def test_option_names_of_version_0_1_work_but_are_not_shown() -> None:
    parser = build_parser()
    args = parser.parse_args("--arm bn --arms gn wn --output-dir runs".split())
    assert (args.variant, args.variants, args.output) == ("bn", ["gn", "wn"], Path("runs"))
    assert "--arm" not in parser.format_help() and "--output-dir" not in parser.format_help()
