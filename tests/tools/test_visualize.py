"""tools/visualize.py as a user runs it: on a data set, and on images and a video."""

import json
from pathlib import Path

import cv2
from evaluated_model import IN_PROCESS, OPTIONS, QUICKSTART

from ws_detectron.evaluation.inputs import read_video, write_video

TOOL = "visualize.py"


def test_predictions_are_drawn_beside_ground_truth(
    run_tool, evaluation_files, tmp_path: Path
) -> None:
    result = run_tool(
        TOOL,
        *["--dataset", "coco_2017_val", "--predictions", evaluation_files.predictions],
        *["--output", tmp_path, "--num-images", 2, "--confidence-threshold", 0.3],
    )
    assert result.returncode == 0, result.stderr
    for name in ("first.png", "best.png", "worst.png", "errors.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture is not None and picture.std() > 10
    errors = json.loads((tmp_path / "errors.json").read_text())
    truth = json.loads(evaluation_files.annotations.read_text())
    assert 0 < errors["counts"]["correct"] <= len(truth["annotations"])
    assert f"correct {errors['counts']['correct']}" in result.stdout


def test_a_checkpoint_draws_images_and_videos(run_tool, evaluation_files, tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    scenes = [cv2.imread(str(path)) for path in sorted(evaluation_files.images.glob("*.png"))]
    write_video(inputs / "clip.mp4", 5.0, [scene[:, :, ::-1] for scene in scenes[:2]])
    (inputs / "corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    result = run_tool(
        TOOL,
        *["--config-file", QUICKSTART, "--output", tmp_path / "out", "--confidence-threshold", 0.0],
        *["--input", inputs, evaluation_files.images / "*1.png"],
        *[*OPTIONS, "MODEL.WEIGHTS", evaluation_files.weights],  # keys end the inputs
    )
    assert result.returncode == 0, result.stderr + result.stdout
    assert "drawn 2 of 3 files: " in result.stdout
    assert f"1 could not be read and were skipped: {inputs / 'corrupt.jpg'}" in result.stdout
    assert "corrupt.jpg" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    outputs = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert outputs == ["000001.png", "clip.mp4"]
    drawn = cv2.imread(str(tmp_path / "out" / "000001.png"))
    assert drawn.shape == scenes[0].shape and (cv2.absdiff(drawn, scenes[0]) > 20).any()
    assert "\n3 images of less than 448 pixels" in result.stdout
    assert " detections in 3 images (score ≥ 0 %), " in result.stdout
    assert "tools/export_model.py" in result.stdout.splitlines()[-1]
    assert len(list(read_video(tmp_path / "out" / "clip.mp4")[2])) == 2


def test_a_checkpoint_draws_a_data_set(call_tool, evaluation_files, tmp_path: Path) -> None:
    status, _, errors = call_tool(
        TOOL,
        *["--config-file", QUICKSTART, "--output", tmp_path, "--num-images", 1, *OPTIONS],
        *["MODEL.WEIGHTS", evaluation_files.weights, "DATASETS.TEST", f"('{IN_PROCESS}',)"],
    )
    assert status == 0, errors
    assert (tmp_path / "worst.png").is_file() and (tmp_path / "coco_evaluation.json").is_file()
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in predictions} == {1, 2, 3, 4, 5, 6}


def test_wrong_commands_and_help(call_tool, evaluation_files, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "out"]
    predictions = ["--predictions", evaluation_files.predictions]
    status, _, errors = call_tool(TOOL, *predictions, *output)
    assert status == 2 and "--predictions needs --dataset" in errors
    status, _, errors = call_tool(TOOL, *predictions, "--dataset", "coco_2018_val", *output)
    assert status == 2 and "coco_2018_val" in errors and "did you mean" in errors
    arguments = ["--config-file", QUICKSTART, *output, "--input", evaluation_files.images]
    status, _, errors = call_tool(TOOL, *arguments, "--opts", "MODEL.WEIGHTS", "no.pth")
    assert status == 2 and "no.pth" in errors
    status, _, errors = call_tool(TOOL, *arguments)
    assert status == 2 and "MODEL.WEIGHTS is empty" in errors
    data = [*predictions, "--dataset", IN_PROCESS]
    for options in (data, arguments):
        for option, value in (
            ("--confidence-threshold", "nan"),
            ("--score-threshold", 2),  # the former name
            ("--num-images", 0),
        ):
            status, _, errors = call_tool(TOOL, *options, *output, option, value)
            assert status == 2 and option in errors and f": it is {value}; allowed: " in errors
    status, _, errors = call_tool(TOOL, *arguments, "--dataset", "coco_2018_val")
    assert status == 2 and "coco_2018_val" in errors and "did you mean" in errors
    status, _, errors = call_tool(
        TOOL, "--config-file", QUICKSTART, *output, "--opts", "DATASETS.TEST", "()"
    )
    assert status == 2 and "DATASETS.TEST is empty; choose a data set" in errors
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    for options in ([*data, *output], arguments[:4]):
        status, _, errors = call_tool(TOOL, *options)
        assert status == 2 and "out is not a folder; choose another output" in errors
    wrong = ["--config-file", QUICKSTART, "--output", tmp_path / "new.png"]
    wrong += ["--input", tmp_path / "none.png", *OPTIONS]
    status, _, errors = call_tool(TOOL, *wrong, "MODEL.WEIGHTS", evaluation_files.weights)
    assert status == 2 and "none.png matches no file" in errors
    status, _, errors = call_tool(TOOL, *arguments, "--webcam")
    assert status == 2 and "not allowed with" in errors
    status, text, _ = call_tool(TOOL, "--help")
    assert status == 0 and "python tools/visualize.py --dataset coco_2017_val" in text
