"""tools/fold_checkpoint.py, and its files in a process that never sees ws_detectron."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluated_model import OPTIONS, QUICKSTART

from ws_detectron.engine import load_config
from ws_detectron.engine.inference import load_model_for_inference

TOOL = "fold_checkpoint.py"
STOCK = """
import json, sys
sys.modules["ws_detectron"] = None  # importing it is an error from here on
import cv2, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone" and "WS" not in cfg.MODEL
torch.set_num_threads(1)
predictor = DefaultPredictor(cfg)
found = predictor(cv2.imread(sys.argv[2]))["instances"]
print(json.dumps({
    "boxes": found.pred_boxes.tensor.tolist(), "scores": found.scores.tolist(),
    "classes": found.pred_classes.tolist(), "areas": found.pred_masks.sum((1, 2)).tolist(),
}))
"""


def test_stock_detectron2_finds_the_same(
    one_thread, call_tool, evaluation_files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    options = [*OPTIONS, "MODEL.WEIGHTS", str(evaluation_files.weights)]
    folded = tmp_path / "folded.pth"
    monkeypatch.chdir(tmp_path)
    status, output, errors = call_tool(
        TOOL, "--config-file", QUICKSTART, "--output", "folded.pth", "--opts", *options
    )
    assert status == 0, output + errors
    assert str(folded) in output and str(tmp_path / "folded.yaml") in output
    paste = yaml.safe_load(output.partition("\n\n")[2].partition("\n\n")[0])
    assert paste["MODEL"]["WEIGHTS"] == str(folded)
    assert paste["MODEL"]["BACKBONE"] == {"NAME": "build_resnet_fpn_backbone"}

    picture = sorted(evaluation_files.images.iterdir())[0]
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "folded.yaml"), str(picture)],
        capture_output=True, text=True, timeout=600, cwd="/",  # any folder
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    stock = json.loads(result.stdout.splitlines()[-1])

    cfg = load_config(QUICKSTART, options)
    image = cv2.imread(str(picture))
    with torch.no_grad():
        model = load_model_for_inference(cfg)
        inputs = torch.as_tensor(image.astype(np.float32).transpose(2, 0, 1))
        side = cfg.INPUT.MIN_SIZE_TEST
        inputs = torch.nn.functional.interpolate(inputs[None], (side, side))[0]
        assert image.shape[:2] == (side, side)
        found = model([{"image": inputs, "height": side, "width": side}])[0]["instances"]
    assert len(found) == len(stock["scores"]) > 0
    assert found.pred_classes.tolist() == stock["classes"]
    assert found.scores.tolist() == pytest.approx(stock["scores"], abs=1e-5)
    boxes = torch.tensor(stock["boxes"])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes, atol=1e-2, rtol=1e-5)
    areas = np.array(stock["areas"])
    assert np.abs(found.pred_masks.sum((1, 2)).numpy() - areas).max() <= 2


def test_mistakes_are_one_message(call_tool, evaluation_files, tmp_path: Path) -> None:
    weights = ["MODEL.WEIGHTS", str(evaluation_files.weights)]
    cases = {
        "must end in .pth": (tmp_path / "folded.onnx", weights),
        "MODEL.WS.GN_GROUPS is 8": (tmp_path / "a.pth", [*weights, "MODEL.WS.GN_GROUPS", "8"]),
        "MODEL.WEIGHTS is empty": (tmp_path / "a.pth", []),
        "which is not a file": (tmp_path / "a.pth", ["MODEL.WEIGHTS", "/no/such.pth"]),
    }
    for words, (output, options) in cases.items():
        status, _, errors = call_tool(
            TOOL, "--config-file", QUICKSTART, "--output", output, *OPTIONS, *options
        )
        assert status == 2 and words in errors and "Traceback" not in errors, errors
    assert not list(tmp_path.glob("a.*"))
    status, output, _ = call_tool(TOOL, "--help")
    assert status == 0 and "python tools/fold_checkpoint.py --config-file" in output


def test_inputs_are_not_written_over(call_tool, evaluation_files, tmp_path: Path) -> None:
    weights, config = tmp_path / "a.pth", tmp_path / "b.yaml"
    weights.write_bytes(evaluation_files.weights.read_bytes())
    config.write_text(load_config(QUICKSTART).dump())
    before = weights.read_bytes(), config.read_bytes()
    for output in (weights, tmp_path / "b.pth"):
        command = ["--config-file", config, "--output", output, "MODEL.WEIGHTS", weights]
        status, _, errors = call_tool(TOOL, *command)
        assert status == 2 and "is an input" in errors and errors.count("\n") == 1
    assert (weights.read_bytes(), config.read_bytes()) == before
    assert not (tmp_path / "b.pth").exists()
