"""tools/evaluate_coco.py as a user runs it: on a results file, and on a checkpoint in processes."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from evaluated_model import IN_PROCESS, OPTIONS, QUICKSTART

from ws_detectron.evaluation.coco_curves import FILES, MEAN, read_curves

TOOL = "evaluate_coco.py"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "coco_evaluation.json").read_text())


def test_a_results_file_is_evaluated(run_tool, call_tool, evaluation_files, tmp_path: Path) -> None:
    files = ["--predictions", evaluation_files.predictions]
    files += ["--annotations", evaluation_files.annotations]
    result = run_tool(TOOL, *files, "--output", tmp_path / "fast")
    assert result.returncode == 0, result.stderr
    fast = read(tmp_path / "fast")
    assert 0 < fast["bbox"]["AP"] < 100 and fast["segm"]["APl"] is None
    for task, title in (("bbox", "box"), ("segm", "mask")):
        line = next(s.split() for s in result.stdout.splitlines() if s.split()[:1] == [title])
        assert line[1] == f"{fast[task]['AP']:.2f}" and line[6] == "–"
    assert f"  metrics            {tmp_path}/fast/coco_evaluation.json\n" in result.stdout
    assert f"evaluating {fast['predictions']} predictions on 6 images" in result.stdout
    found = (f"{task} AP {fast[task]['AP']:.1f}" for task in ("bbox", "segm"))
    assert f"\nevaluated, {', '.join(found)}\n" in result.stdout
    assert "faster-coco-eval" in result.stdout
    curves = read_curves(tmp_path / "fast")
    for task, title in (("bbox", "box"), ("segm", "mask")):
        rows = [r for r in curves["precision_recall"] if (r["task"], r["iou"]) == (task, MEAN)]
        assert sum(r["precision"] for r in rows) / 101 == pytest.approx(fast[task]["AP"])
        assert f"best {title} F1 " in result.stdout
    assert all((tmp_path / "fast" / name).is_file() for name in FILES)

    status, _, _ = call_tool(TOOL, *files, "--output", tmp_path / "slow", "--reference")
    assert status == 0
    slow = read(tmp_path / "slow")
    assert slow["backend"].startswith("pycocotools")
    for task in ("bbox", "segm"):
        assert slow[task] == pytest.approx(fast[task], abs=1e-9)
    rows = list(csv.DictReader((tmp_path / "slow" / "coco_evaluation.csv").open()))
    assert len(rows) == 2 * 81 and rows[0]["category"] == "all"

    status, _, _ = call_tool(TOOL, *files, "--output", tmp_path / "one", "--task", "segm")
    assert status == 0 and "bbox" not in read(tmp_path / "one")


def test_two_processes_give_the_metrics_of_one(
    one_thread, run_tool, call_tool, evaluation_files, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*OPTIONS, "MODEL.WEIGHTS", evaluation_files.weights]
    config = ["--config-file", QUICKSTART, "--output"]
    # a set that only the config names
    mine = ["mine", str(evaluation_files.annotations), str(evaluation_files.images)]
    mine = ["DATASETS.REGISTER", [mine], "DATASETS.TEST", ("mine",)]
    result = run_tool(TOOL, *config, two, "--num-gpus", 2, *options, *mine)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "mine" in result.stdout and "box AP50" in result.stdout
    status, output, errors = call_tool(
        TOOL, *config, one, *options, "DATASETS.TEST", f"('{IN_PROCESS}',)"
    )
    assert status == 0, output + errors

    name = "coco_instances_results.json"
    predictions = json.loads((one / name).read_text())
    assert {entry["image_id"] for entry in predictions} == {1, 2, 3, 4, 5, 6}
    others = json.loads((two / name).read_text())
    assert len(others) == len(predictions)
    for other, prediction in zip(others, predictions):
        assert other == {
            **prediction,
            "bbox": pytest.approx(prediction["bbox"], abs=1e-3),
            "score": pytest.approx(prediction["score"], rel=1e-5),
        }
    for task in ("bbox", "segm"):
        assert read(two)[task] == pytest.approx(read(one)[task], abs=1e-9)
    assert read(two)["weights"] == str(evaluation_files.weights)


def test_bad_input_gets_one_message(call_tool, evaluation_files, tmp_path: Path) -> None:
    good = json.loads(evaluation_files.predictions.read_text())
    bad = tmp_path / "bad.json"

    def evaluate(predictions: Any) -> tuple[int, str]:
        bad.write_text(json.dumps(predictions))
        status, output, errors = call_tool(
            TOOL, "--predictions", bad, "--annotations", evaluation_files.annotations
        )
        return status, output + errors

    cases = {
        "image ids that the annotations": [{**good[0], "image_id": 77}],
        "category ids that the annotations": [{**good[0], "category_id": 0}],
        "malformed RLE": [{**good[0], "segmentation": {"size": [64, 64], "counts": "11Q"}}],
        "score must be a finite number": [{**good[0], "score": None}],
        "swapped": {"images": [], "annotations": [], "categories": []},
    }
    for message, predictions in cases.items():
        status, text = evaluate(predictions)
        assert status == 2 and message in text and "Traceback" not in text
        assert text.startswith("error: ") and str(bad) in text
    status, text = evaluate([])
    assert status == 0 and read(tmp_path)["bbox"]["AP"] == 0
    line = next(line.split() for line in text.splitlines() if line.split()[:1] == ["box"])
    assert line[1] == "0.00" and "–" in line


def test_wrong_commands_and_help(call_tool, evaluation_files) -> None:
    files = ["--predictions", evaluation_files.predictions]
    annotations = ["--annotations", evaluation_files.annotations]
    for arguments in (files, [], [*files, *annotations, "--config-file", QUICKSTART]):
        status, _, errors = call_tool(TOOL, *arguments)
        assert status == 2 and "give both --predictions and --annotations" in errors
    status, _, errors = call_tool(TOOL, *files, *annotations, "MODEL.DEVICE", "cpu")
    assert status == 2 and "config overrides need --config-file" in errors
    status, _, errors = call_tool(TOOL, "--config-file", QUICKSTART, *OPTIONS, "MODEL.WEIGHTS", "")
    assert status == 2 and ("MODEL.WEIGHTS is empty" in errors or "DETECTRON2_DATASETS" in errors)
    status, output, _ = call_tool(TOOL, "--help")
    assert status == 0 and "python tools/evaluate_coco.py --predictions" in output


def test_inputs_are_not_written_over(call_tool, evaluation_files, tmp_path: Path) -> None:
    curve = tmp_path / "ap_by_group.csv"
    curve.write_bytes(evaluation_files.predictions.read_bytes())
    annotations = ["--annotations", evaluation_files.annotations]
    status, _, errors = call_tool(TOOL, "--predictions", curve, *annotations)
    assert status == 2 and "ap_by_group.csv is an input" in errors
    curve.unlink()
    mine = tmp_path / "coco_evaluation.json"
    for source, other in (
        (evaluation_files.predictions, ["--annotations", evaluation_files.annotations]),
        (evaluation_files.annotations, ["--predictions", evaluation_files.predictions]),
    ):
        mine.write_bytes(source.read_bytes())
        option = "--predictions" if source == evaluation_files.predictions else "--annotations"
        status, _, errors = call_tool(TOOL, option, mine, *other, "--output", tmp_path)
        assert status == 2 and "coco_evaluation.json is an input" in errors
        assert errors.count("\n") == 1 and mine.read_bytes() == source.read_bytes()
    mine.unlink()
    (tmp_path / "file").touch()
    status, _, errors = call_tool(
        TOOL,
        *["--predictions", evaluation_files.predictions],
        *["--annotations", evaluation_files.annotations, "--output", tmp_path / "file"],
    )
    assert status == 2 and "file is not a folder; choose another output" in errors


@pytest.mark.parametrize("tool", [TOOL, "visualize.py"])
def test_weights_are_not_written_over(
    call_tool, evaluation_files, tmp_path: Path, tool: str
) -> None:
    weights = tmp_path / "coco_instances_results.json"
    weights.write_bytes(evaluation_files.weights.read_bytes())
    status, _, errors = call_tool(
        tool,
        *["--config-file", QUICKSTART, "--output", tmp_path, *OPTIONS, "MODEL.WEIGHTS", weights],
        *["DATASETS.TEST", f"('{IN_PROCESS}',)"],
    )
    assert status == 2 and "coco_instances_results.json is an input" in errors
    assert weights.read_bytes() == evaluation_files.weights.read_bytes()


def test_keypoints_are_said_not_to_be_evaluated(
    call_tool, evaluation_files, tmp_path: Path
) -> None:
    predictions = json.loads(evaluation_files.predictions.read_text())
    predictions[0]["keypoints"] = [1.0, 2.0, 0.9]
    (tmp_path / "mine.json").write_text(json.dumps(predictions))
    files = ["--annotations", evaluation_files.annotations, "--predictions"]
    status, output, _ = call_tool(TOOL, *files, tmp_path / "mine.json")
    assert status == 0 and "keypoints are not evaluated here" in output
    status, output, _ = call_tool(TOOL, *files, evaluation_files.predictions, "--output", tmp_path)
    assert status == 0 and "are not evaluated here" not in output
