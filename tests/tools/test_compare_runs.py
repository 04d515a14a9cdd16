"""tools/compare_runs.py as a user runs it."""

import csv
import json
from pathlib import Path

import cv2

from ws_detectron.engine import load_config
from ws_detectron.evaluation.coco_curves import COMPARED, curve_tables, write_curves
from ws_detectron.evaluation.coco_eval import evaluate
from ws_detectron.evaluation.coco_report import write_reports

TOOL = "compare_runs.py"
QUICKSTART = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"


def write_run(folder: Path, norm: str, ap: float) -> Path:
    """Two evaluations, the second of them after a resume that repeats iterations."""
    folder.mkdir(parents=True)
    cfg = load_config(QUICKSTART, ["MODEL.RESNETS.NORM", norm, "OUTPUT_DIR", str(folder)])
    (folder / "config.yaml").write_text(cfg.dump())
    rows = []
    for iteration in (19, 39, 59, 39, 59, 79):
        rows.append({"iteration": iteration, "total_loss": 3 - iteration / 40, "time": 0.5})
        if iteration in (39, 79):
            rows[-1].update({"bbox/AP": ap * iteration / 79, "segm/AP": ap * iteration / 100})
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_compared_and_broken_ones_named(run_tool, tmp_path: Path) -> None:
    bn, gn = write_run(tmp_path / "bn", "BN", 40.0), write_run(tmp_path / "gn", "GN", 50.0)
    broken = write_run(tmp_path / "broken", "GN", 45.0)
    (broken / "config.yaml").unlink()
    output = tmp_path / "out"
    result = run_tool(TOOL, bn, f"GN+WS={gn}", broken, tmp_path / "missing", "--output", output)
    assert result.returncode == 1
    for message in ("broken: ", "config.yaml is missing", "missing: there is no run folder"):
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    text = (output / "comparison.md").read_text()
    assert text in result.stdout
    assert "50.00 (+10.00)" in text and "45.00 (+5.00)" in text
    assert "| `MODEL.RESNETS.NORM` | `BN` | `GN`    |" in text
    rows = list(csv.DictReader((output / "comparison.csv").open()))
    assert [row["run"] for row in rows] == ["bn", "GN+WS", "broken", "missing"]
    assert [row["training_seconds"] for row in rows[:2]] == ["40.0", "40.0"]
    for name in ("learning_curves", "ap_curves"):
        assert cv2.imread(str(output / f"{name}.png")) is not None
    assert not list(output.glob("*.svg"))


def test_curves_of_evaluated_runs_lie_over_each_other(
    call_tool, evaluation_files, tmp_path: Path
) -> None:
    truth = json.loads(evaluation_files.annotations.read_text())
    found = json.loads(evaluation_files.predictions.read_text())
    for name, some in (("a", found), ("b", found[::2])):
        result = evaluate(truth, some, ["bbox"])
        write_reports(result, tmp_path / name)
        write_curves(curve_tables(truth, some, result), tmp_path / name)
    runs = [f"GN={tmp_path}/a/coco_evaluation.json", f"BN={tmp_path}/b/coco_evaluation.json"]
    status, _, errors = call_tool(TOOL, *runs, "--output", tmp_path / "out")
    assert status == 0, errors
    for name in COMPARED:
        assert cv2.imread(str(tmp_path / "out" / f"{name}.png")).std() > 5


def test_exit_status_of_valid_runs_and_of_nothing_to_compare(call_tool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "bn", "BN", 40.0)
    status, output, errors = call_tool(TOOL, "--input", run, "--output", tmp_path / "out")
    assert status == 0 and not errors and "40.00" in output
    status, _, errors = call_tool(TOOL, tmp_path / "none", "--output", tmp_path / "out2")
    assert status == 2 and "nothing to compare" in errors and "none" in errors
    assert not (tmp_path / "out2").exists()
    (tmp_path / "file").touch()
    status, _, errors = call_tool(TOOL, run, "--output", tmp_path / "file")
    assert status == 2 and "cannot write into" in errors


def test_help(call_tool) -> None:
    status, output, _ = call_tool(TOOL, "--help")
    assert status == 0 and "python tools/compare_runs.py output/bn_1img" in output


def test_inputs_are_not_written_over(call_tool, tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "bn", "BN", 40.0) / "metrics.json"
    for name in ("comparison.csv", "ap_curves.png"):
        copy = tmp_path / name
        copy.write_bytes(metrics.read_bytes())
        status, _, errors = call_tool(TOOL, metrics, f"mine={copy}", "--output", tmp_path)
        assert status == 2 and f"{name} is an input" in errors and errors.count("\n") == 1
        assert copy.read_bytes() == metrics.read_bytes()
        copy.unlink()
