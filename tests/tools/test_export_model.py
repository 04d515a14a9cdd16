"""tools/export_model.py, and the examples of docs/deploy.md in a process without detectron2."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluated_model import OPTIONS, QUICKSTART

from ws_detectron import export
from ws_detectron.data.images import read_rgb
from ws_detectron.engine import load_config
from ws_detectron.evaluation.evaluate import ImagePredictor

TOOL = "export_model.py"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text("utf-8")
MODEL_INPUT, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ALONE = """
import sys
sys.modules["detectron2"] = sys.modules["ws_detectron"] = None  # importing them is an error
"""


def arguments(files, format: str, output: Path, *more: object) -> list[object]:
    picture = sorted(files.images.iterdir())[0]
    return [
        *("--config-file", QUICKSTART, "--format", format, "--output", output, *more),
        *("--input", picture, "--opts", *OPTIONS, "MODEL.WEIGHTS", files.weights),
    ]


@pytest.mark.parametrize(
    ("format", "file"),
    [("onnx", "model.onnx"), ("torchscript", "model.ts"), ("torch-export", "backbone.pt2")],
)
def test_example_of_the_page_runs_alone(
    call_tool, evaluation_files, tmp_path: Path, monkeypatch, format: str, file: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(export.logger, "info", lambda text, *_: said.append(text.split()[3]))
    part = "backbone" if format == "torch-export" else "detector"
    output = tmp_path / file
    status, printed, errors = call_tool(
        TOOL, *arguments(evaluation_files, format, output, "--part", part)
    )
    assert status == 0, printed + errors
    assert printed.count("| equal |") == 2 and f"exported  {output}" in printed
    assert said == ["loading", "tracing", "comparing", "writing"]
    assert ("8 detections" in printed) is (part == "detector")

    photo = tmp_path / "photo.jpg"  # of another size, so that it is resized
    picture = sorted(evaluation_files.images.iterdir())[0]
    from PIL import Image

    Image.open(picture).convert("RGB").resize((150, 100)).save(photo, quality=95)
    (example,) = (code for code in EXAMPLES if f'"{file}"' in code)
    found = "features" if part == "backbone" else "found"
    code = [ALONE, MODEL_INPUT, example, f"np.savez('found.npz', **{found})"]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outputs = np.load(tmp_path / "found.npz")

    options = [*OPTIONS, "MODEL.WEIGHTS", str(evaluation_files.weights)]
    predictor = ImagePredictor(load_config(QUICKSTART, options))
    sample = predictor.prepare(read_rgb(photo))
    tensors = {name: export.torch.from_numpy(outputs[name]) for name in outputs.files}
    compared = export.compare("", predictor.model, sample, part, lambda _: tensors)
    assert compared.holds, compared
    if part == "detector":
        assert outputs["masks"].shape[1:] == (100, 150)
    if format == "onnx":
        assert len(result.stdout.splitlines()) == 8  # a line for each detection


def test_what_differs_is_not_written(
    call_tool, evaluation_files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = export.FORMATS["torchscript"]

    def load(content: bytes) -> export.Run:
        run = row.load(content)

        def shifted(inputs: export.Tensors) -> export.Tensors:
            outputs = dict(run(inputs))
            return {**outputs, "boxes": outputs["boxes"] + 0.02}

        return shifted

    monkeypatch.setitem(export.FORMATS, "torchscript", row._replace(load=load))
    output = tmp_path / "model.ts"
    status, printed, errors = call_tool(TOOL, *arguments(evaluation_files, "torchscript", output))
    assert status == 1 and printed.count("| DIFFERS |") == 2
    assert f"{output} is not written" in errors and not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--format": "torch-export"}, "--format torchscript or onnx, or --part backbone"),
        ({"--output": "model.pth"}, "--format onnx writes .onnx, but got model.pth"),
        ({"--input": "nowhere.jpg"}, "cannot read image nowhere.jpg"),
        ({"MODEL.WEIGHTS": "nowhere.pth"}, "MODEL.WEIGHTS is 'nowhere.pth', which is not a file"),
        ({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": "1.0"}, "finds nothing on "),
    ],
)
def test_mistakes_are_named(call_tool, evaluation_files, tmp_path, changes, message) -> None:
    given = [str(a) for a in arguments(evaluation_files, "onnx", tmp_path / "model.onnx")]
    for name, value in changes.items():
        given[given.index(name) + 1] = value
    status, _, errors = call_tool(TOOL, *given)
    assert status == 2 and message in errors
    assert [*tmp_path.iterdir()] == []


def test_config_is_not_overwritten(call_tool, evaluation_files, tmp_path: Path) -> None:
    config = tmp_path / "model.onnx"
    shutil.copy(evaluation_files.annotations, config)
    given = arguments(evaluation_files, "onnx", config)
    given[given.index("--config-file") + 1] = config
    status, _, errors = call_tool(TOOL, *given)
    assert status == 2 and "is an input" in errors


def test_first_test_image_is_the_default(coco_root: Path) -> None:
    cfg = load_config(QUICKSTART, OPTIONS)
    assert Path(export._first_test_image(cfg)).parent.name == "val2017"
    cfg.DATASETS.TEST = ()
    with pytest.raises(export.ConfigError, match="--input photo.jpg"):
        export._first_test_image(cfg)


def test_help_shows_an_example(call_tool) -> None:
    status, output, _ = call_tool(TOOL, "--help")
    assert status == 0 and "python tools/export_model.py --config-file output/quickstart" in output
