"""tools/quickstart.py: what it says on the screen, and where the rest is."""

import json
from pathlib import Path

from ws_detectron.lab.scenes import SceneSpec, ensure_scenes

SMALL = """
SOLVER.MAX_ITER 21 SOLVER.IMS_PER_BATCH 1 SOLVER.REFERENCE_IMS_PER_BATCH 1 SOLVER.BASE_LR 0.02
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 64 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 64
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.001 TEST.DETECTIONS_PER_IMAGE 3 DATALOADER.NUM_WORKERS 0
DATASETS.TRAIN ('quickstart_test',) DATASETS.TEST ('quickstart_test',)
""".split()


def test_it_says_what_it_does_and_what_comes_next(run_tool, tmp_path: Path) -> None:
    spec = SceneSpec(image_size=64, num_images=3, object_scale=(0.2, 0.5))
    scenes = ensure_scenes(spec, tmp_path)
    mine = ["quickstart_test", str(scenes / "annotations.json"), str(scenes / "images")]
    output = tmp_path / "run"
    options = [*SMALL, "DATASETS.REGISTER", [mine]]
    expected = ["TEST.EXPECTED_RESULTS", [["bbox", "AP", 200.0, 1.0]]]
    result = run_tool("quickstart.py", "--output", output, *options, *expected)
    said, errors = result.stdout, result.stderr
    assert result.returncode == 1 and "error: expected (task, metric, value, tolerance)" in errors
    steps = ("training a Mask R-CNN", "100 %", "testing it", "drawing", "bbox AP", "next:")
    places = [said.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), said
    assert "total_loss" not in said and "INFO" not in said  # the log is in its file
    log = (output / "log.txt").read_text()
    assert "Starting training" in log and "total_loss" in log
    assert "\x1b" not in log and log.count("MAX_ITER:") == 1  # the config once, without colours
    final = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert f"bbox AP {final['bbox/AP']:.1f}, segm AP {final['segm/AP']:.1f}" in said
    assert (output / "pictures" / "first.png").is_file()
