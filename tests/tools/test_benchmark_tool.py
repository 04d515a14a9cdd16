"""tools/benchmark.py as a user runs it; times are not judged here."""

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ws_detectron.lab.benchmark import measurements, operation


def test_help_shows_an_example(call_tool) -> None:
    status, output, _ = call_tool("benchmark.py", "--help")
    assert status == 0 and "python tools/benchmark.py variants --batches 1 2 4 8 16" in output
    status, output, _ = call_tool("benchmark.py", "step", "--help")
    assert status == 0 and "--modes" in output and "--arms" not in output


def test_config_keys_may_follow_options(call_tool, tmp_path: Path) -> None:
    options = ["step", "--device", "cpu", "--output", tmp_path, "--rounds", 1, "--modes", "plain"]
    status, _, errors = call_tool("benchmark.py", *options, "MODEL.NO_SUCH_KEY", 1)
    assert status == 2 and "MODEL.NO_SUCH_KEY" in errors and "unrecognized" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classifier", "--depth", 101], "unrecognized arguments: --depth 101"),
        (["operation", "--variants", "bn"], "unrecognized arguments: --variants bn"),
        (["operation", "MODEL.DEVICE", "cpu"], "unrecognized arguments: --opts MODEL.DEVICE cpu"),
        (["classifier", "--variants", "sync_bn"], "invalid choice: 'sync_bn' (choose from "),
        (["step", "--variants", "wn"], "invalid choice: 'wn' (choose from "),
        (["operation", "--budget", "8m"], "unrecognized arguments: --budget 8m"),
        (["gpu", "--budget", "8"], "'8' is no time; allowed: a number and s, m or h"),
        (["classifier", "--modes", "autocast"], "invalid choice: 'autocast' (choose from "),
    ],
)
def test_what_would_be_ignored_is_refused(call_tool, arguments: list, message: str) -> None:
    status, _, errors = call_tool("benchmark.py", *arguments)
    assert status == 2 and message in errors


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Nothing is measured; what would be is in the list, with its options."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def stand_in(what: str) -> Callable[..., Iterator[dict[str, Any]]]:
        replaced = measurements.MEASUREMENTS[what]

        @functools.wraps(replaced)
        def measure(**options: Any) -> Iterator[dict[str, Any]]:
            inspect.signature(replaced).bind(**options)
            calls.append((what, options))
            seconds = {operation.COPY: [1.0], operation.OURS["official"]: [2.0]}
            yield {"facts": {"images": 1}, "seconds": seconds}

        return measure

    for what in measurements.MEASUREMENTS:
        monkeypatch.setitem(measurements.MEASUREMENTS, what, stand_in(what))
    return calls


@pytest.mark.parametrize(
    ("arguments", "variants", "modes", "file"),
    [
        (["step"], ["gn", "gn_ws", "bn"], ["plain"], "cpu_step"),
        (["step", "--variants", "bn", "gn"], ["bn", "gn"], ["plain"], "cpu_step"),
        (["step", "--modes", "compile"], ["gn", "gn_ws", "bn"], ["compile"], "cpu_step_compile"),
        (
            ["variants", "--modes", "plain", "autocast"],
            ["bn", "frozen_bn", "sync_bn", "gn", "gn_ws"], ["plain", "autocast"],
            "cpu_variants_modes",
        ),
    ],
)  # fmt: skip
def test_variants_and_modes(
    call_tool, stand_ins, tmp_path: Path, arguments: list, variants: list, modes: list, file: str
) -> None:
    options = ["--device", "cpu", "--output", tmp_path, "--rounds", 3]
    status, _, errors = call_tool("benchmark.py", *arguments, *options)
    assert status == 0, errors
    ((_, used),) = stand_ins
    assert [*used["variants"]] == variants and [*used["modes"]] == modes and used["rounds"] == 3
    assert [path.stem for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("what", measurements.MEASUREMENTS)
def test_every_measurement_gets_its_options(call_tool, stand_ins, tmp_path: Path, what) -> None:
    status, output, errors = call_tool("benchmark.py", what, "--output", tmp_path)
    assert status == 0, errors
    assert [name for name, _ in stand_ins] == [what] and "1 rounds; images 1." in output
    assert f"measured {what}\n  measurements  {tmp_path}\nnext:" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_needs_one(call_tool, stand_ins) -> None:
    status, _, errors = call_tool("benchmark.py", "gpu")
    assert status == 2 and "gpu needs a CUDA device" in errors and stand_ins == []


def test_gpu_measures_until_the_budget_is_spent(
    call_tool, stand_ins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measurements, "environment", lambda packages: {})
    clock = iter([0.0, 0.0, 100.0, 470.0, 481.0])
    monkeypatch.setattr(measurements.time, "monotonic", lambda: next(clock))
    status, output, errors = call_tool(
        "benchmark.py", "gpu", "--budget", "8m", "--output", tmp_path
    )
    assert status == 0, errors
    assert [what for what, _ in stand_ins] == ["group_norm", "step", "operation"]
    options = {"device": "cuda", "rounds": 20, "warmup": 2}
    assert all(options.items() <= used.items() for _, used in stand_ins)
    variants = ["gn", "gn_ws", "bn", "gn_split", "gn_ws_split"]
    assert stand_ins[1][1]["variants"] == variants
    assert "inference is skipped: 481 s of 480 s are spent" in output
    assert {path.stem for path in tmp_path.iterdir()} == {
        "cuda_group_norm", "cuda_step", "cuda_operation"
    }  # fmt: skip


def test_group_norm_is_measured(call_tool, tmp_path: Path, monkeypatch) -> None:
    small = [(32, 4, 4, 2), (64, 2, 2, 1)]
    monkeypatch.setattr(operation, "_feature_shapes", lambda *size: small)
    options = ["--device", "cpu", "--output", tmp_path, "--rounds", 2]
    status, output, errors = call_tool("benchmark.py", "group_norm", *options)
    assert status == 0, errors
    content = json.loads((tmp_path / "cpu_group_norm.json").read_text())
    assert content["about"]["command"].startswith("python tools/benchmark.py group_norm --device")
    assert content["about"]["torch"] == torch.__version__.split("+")[0]
    assert content["kind"] == "group_norm" and len(content["parts"]) == 8
    assert sum("| nn.GroupNorm" in line for line in output.splitlines()) == 8


def test_page_is_written(call_tool, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- performance: begin -->\n<!-- performance: end -->\n")
    results = Path(__file__).resolve().parents[2] / "results" / "benchmark"
    status, _, errors = call_tool("benchmark.py", "page", "--output", page, "--results", results)
    assert status == 0, errors
    assert page.read_text().count("### ") == len(list(results.iterdir()))
