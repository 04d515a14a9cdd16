"""tools/benchmark_coco_eval.py on a few images; its times are not judged here."""

import json
from pathlib import Path


def test_both_evaluators_are_timed_on_the_same_data(
    run_tool, call_tool, evaluation_files, tmp_path: Path
) -> None:
    options = ["--annotations", evaluation_files.annotations, "--output", tmp_path]
    result = run_tool(
        "benchmark_coco_eval.py", *options, "--num-images", 15, "--rounds", 2, "--background", 3
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["data"].startswith("15 images") and "seed 0" in content["data"]
    assert content["largest_difference"] < 1e-9
    assert all(len(task["ratio"]) == 2 for task in content["tasks"].values())
    assert (tmp_path / "benchmark.md").read_text() in result.stdout
    status, text, _ = call_tool("benchmark_coco_eval.py", "--help")
    assert status == 0 and "python tools/benchmark_coco_eval.py" in text


def test_inputs_are_not_written_over(call_tool, evaluation_files, tmp_path: Path) -> None:
    annotations = tmp_path / "benchmark.json"
    annotations.write_bytes(evaluation_files.annotations.read_bytes())
    status, _, errors = call_tool(
        "benchmark_coco_eval.py",
        *["--annotations", annotations, "--output", tmp_path, "--num-images", 2, "--rounds", 1],
    )
    assert status == 2 and "benchmark.json is an input" in errors
    assert annotations.read_bytes() == evaluation_files.annotations.read_bytes()
