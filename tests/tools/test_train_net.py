"""tools/train_net.py as a user runs it: on real COCO images, in one process and in two."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bit_reference import NARROW, random_timm_state
from torchvision.models import resnet18

from ws_detectron.checkpoint import convert_file, write_detectron2
from ws_detectron.lab.scenes import builtin_scenes, ensure_scenes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "COCO-InstanceSegmentation"
QUICKSTART = ROOT / "configs" / "quickstart" / "mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"

# The configs stay as they are but for the machine (CPU, no download of weights), the image size
# and the number of proposals and iterations.
SMALL = """
MODEL.DEVICE cpu MODEL.WEIGHTS '' DATALOADER.NUM_WORKERS 0 SEED 7
SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH 1 SOLVER.BASE_LR 0.001 SOLVER.MAX_ITER 3
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
MODEL.RPN.POST_NMS_TOPK_TRAIN 30 MODEL.RPN.POST_NMS_TOPK_TEST 10
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.001
TEST.PRECISE_BN.NUM_ITER 1 TEST.EVAL_PERIOD 0 TEST.DETECTIONS_PER_IMAGE 3
""".replace("''", "").split()
SMALL.insert(SMALL.index("MODEL.WEIGHTS") + 1, "")


def train_net(*args: object, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environ},
    )


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.fixture
def few(coco_root: Path, tmp_path: Path) -> list[object]:
    """Overrides that evaluate on 8 COCO images: all 128 take a quarter of a minute each time."""
    truth = json.loads((coco_root / "annotations" / "instances_val2017.json").read_text())
    shown = list(dict.fromkeys(entry["image_id"] for entry in truth["annotations"]))[:8]
    truth["images"] = [image for image in truth["images"] if image["id"] in shown]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in shown]
    (tmp_path / "few.json").write_text(json.dumps(truth))
    data = ["few", str(tmp_path / "few.json"), str(coco_root / "val2017")]
    return ["DATASETS.REGISTER", [data], "DATASETS.TEST", "('few',)"]


def test_coco_config_trains_evaluates_resumes_and_evaluates_again(
    few: list[object], tmp_path: Path
) -> None:
    config = CONFIGS / "mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml"
    common = ["--config-file", config, *SMALL, *few, "OUTPUT_DIR", tmp_path]

    first = train_net(*common, "DATASETS.TEST", "()")  # the resumed run evaluates
    assert first.returncode == 0, first.stderr
    assert "Total training time" in first.stdout
    for name in ("model_final.pth", "config.yaml", "metrics.json"):
        assert (tmp_path / name).is_file(), name

    resumed = train_net("--resume", *common, "SOLVER.MAX_ITER", 5)
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 3" in resumed.stdout
    last = [row for row in metrics(tmp_path) if row["iteration"] == 4][-1]
    # Warm-up is linear from a thousandth of the base LR, and never longer than the training, so
    # here it spans the 5 iterations: four fifths of it are done at iteration 4.
    assert last["lr"] == pytest.approx(0.001 * (0.001 + 4 / 5 * 0.999))

    again = train_net("--eval-only", *common, "MODEL.WEIGHTS", tmp_path / "model_final.pth")
    assert again.returncode == 0, again.stderr
    trained = [
        line.split("copypaste: ")[1]
        for line in resumed.stdout.splitlines()
        if "copypaste: " in line
    ]
    evaluated = [
        line.split("copypaste: ")[1] for line in again.stdout.splitlines() if "copypaste: " in line
    ]
    assert evaluated and evaluated == trained
    results = json.loads((tmp_path / "inference" / "results.json").read_text())
    shown = [f"{task} AP {results[task]['AP']:.1f}" for task in ("bbox", "segm")]
    made, metrics_line, *_, command = again.stdout.splitlines()[-5:]
    assert made == f"evaluated, {', '.join(shown)}" and "inference/results.json" in metrics_line
    _, tool, *files = shlex.split(command)
    assert tool == "tools/evaluate_coco.py" and all(Path(path).is_file() for path in files[1::2])


def test_from_a_timm_file_to_a_training_in_two_commands(
    few: list[object], call_tool, tmp_path: Path
) -> None:
    """BiT of half the width with random weights in timm's format, as timm's users download it."""
    torch.manual_seed(0)
    state = random_timm_state()
    torch.save(state, tmp_path / "pytorch_model.bin")
    paths = tmp_path / "pytorch_model.bin", tmp_path / "bit.pth"
    status, output, errors = call_tool("convert_weights.py", *paths)
    assert status == 0, errors
    assert "timm-bit, BiT R-50x0.5" in output

    options = [*SMALL, *NARROW, *few, "SOLVER.MAX_ITER", 2, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]
    options += ["MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32]
    options += ["MODEL.WEIGHTS", tmp_path / "bit.pth", "OUTPUT_DIR", tmp_path / "out"]
    config = CONFIGS / "mask_rcnn_BiT_R_50x1_FPN_1x_gn_ws_1img.yaml"
    trained = train_net("--config-file", config, *options)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "Total training time" in trained.stdout and "copypaste: " in trained.stdout
    assert re.search(
        r"^trained, bbox AP [\d.]+, segm AP [\d.]+\n  weights +\S+model_final.pth$",
        trained.stdout,
        re.M,
    )

    final = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    body = "backbone.bottom_up"
    frozen, learned = final[f"{body}.stem.conv1.weight"], final[f"{body}.res3.0.conv1.weight"]
    assert torch.equal(frozen, state["stem.conv.weight"])
    start = state["stages.1.blocks.0.conv1.weight"]
    assert not torch.equal(learned, start)
    torch.testing.assert_close(learned, start, rtol=0, atol=0.1)  # two small steps away
    assert torch.equal(final[f"{body}.res2.out.norm.bias"], state["stages.1.blocks.0.norm1.bias"])


def test_affine_ws_trains_from_plain_weights_and_evaluates(
    few: list[object], tmp_path: Path
) -> None:
    """From random ones in torchvision's format; gamma and beta stay those of the start."""
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    write_detectron2(convert_file(tmp_path / "resnet18.pth"), tmp_path / "start.pth")
    config = CONFIGS / "mask_rcnn_R_50_FPN_1x_frozen_bn_aws_1img.yaml"
    options = [*SMALL, "MODEL.WEIGHTS", tmp_path / "start.pth", "OUTPUT_DIR", tmp_path]
    options += ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    options += [*few, "DATASETS.TRAIN", "('few',)"]
    options += ["SOLVER.MAX_ITER", 2]
    result = train_net("--config-file", config, *options)
    assert result.returncode == 0, result.stderr
    assert "plain filters give the affine WS of 20 convs" in result.stdout
    assert "copypaste: " in result.stdout
    last = [row for row in metrics(tmp_path) if "total_loss" in row][-1]
    assert last["iteration"] == 1 and math.isfinite(last["total_loss"])
    start, end = (
        torch.load(tmp_path / name, weights_only=True)["model"]
        for name in ("start.pth", "model_final.pth")
    )
    conv = "res5.1.conv2.weight"
    trained = {key.removeprefix("backbone.bottom_up."): value for key, value in end.items()}
    assert not torch.equal(trained[conv], start[conv])
    beta = start[conv].mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(trained[f"{conv}_beta"], beta)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["gn_ws", "bn", "sync_bn"])
def test_coco_config_trains_with_amp_on_a_gpu(
    variant: str, coco_root: Path, tmp_path: Path
) -> None:
    config = CONFIGS / f"mask_rcnn_R_50_FPN_1x_{variant}_2img.yaml"
    options = [*SMALL, "OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True]
    options += ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2]
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", True]
    result = train_net("--num-gpus", 1, "--config-file", config, *options)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "copypaste: " in result.stdout
    last = [row for row in metrics(tmp_path) if "total_loss" in row][-1]
    assert last["iteration"] == 2 and math.isfinite(last["total_loss"])
    record = json.loads((tmp_path / "run_record.json").read_text())
    assert record["device"] == torch.cuda.get_device_name() and record["peak_memory_bytes"] > 2**26


def test_two_cpu_processes_train_and_evaluate_as_one_job(tmp_path: Path) -> None:
    """On a data set that the config brings with it, which each process has to register."""
    folder = ensure_scenes(builtin_scenes()["scenes_shapes_128_val"])
    mine = ["mine", str(folder / "annotations.json"), str(folder / "images")]
    options = ["DATASETS.REGISTER", [mine], "SOLVER.MAX_ITER", 2]
    options += ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)"]
    options += ["OUTPUT_DIR", tmp_path / "out", "DATALOADER.NUM_WORKERS", 0]
    options += ["SOLVER.REFERENCE_WORLD_SIZE", 4, "MODEL.RPN.POST_NMS_TOPK_TEST", 5]
    options += ["TEST.EXPECTED_RESULTS", "[]"]
    job = ["--num-gpus", 2, "--dist-url", "auto", "--config-file", QUICKSTART, *options]
    result = train_net(*job, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr + result.stdout
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "IMS_PER_BATCH: 2" in config and "MAX_ITER: 4" in config
    assert "World size: 2" in result.stdout
    assert re.search(r"Model: [\d.]+ M parameters, 32 WS convs .*, frozen: none", result.stdout)
    assert "left:" not in result.stdout  # a conv without WS is no fault
    assert metrics(tmp_path / "out")[-1]["iteration"] >= 3  # the evaluation may count one more


ERRORS = {
    "unknown key": (["MODEL.WS.MODES", "paper"], ["MODEL.WS.MODES", "MODEL.WS.MODE"]),
    "value that cannot work": (["MODEL.WS.GN_GROUPS", "48"], ["MODEL.WS.GN_GROUPS", "48"]),
    "missing weights": (["MODEL.WEIGHTS", "no.pth"], ["MODEL.WEIGHTS", "no.pth"]),
    "missing config": (["--config-file", "missing.yaml"], ["missing.yaml"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors_are_one_message(case: str, call_tool, tmp_path: Path) -> None:
    options, parts = ERRORS[case]
    if "--config-file" not in options:
        options = ["--config-file", QUICKSTART, "OUTPUT_DIR", tmp_path / "out", *options]
    status, output, text = call_tool("train_net.py", *options)
    assert status == 2, output + text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), text
    assert "Traceback" not in output + text


def test_missing_data_names_the_variable(tmp_path: Path) -> None:
    """In a process of its own, as the folder is settled at import."""
    options = ["OUTPUT_DIR", tmp_path / "out", "DATASETS.TRAIN", "('coco_2017_train',)"]
    job = ["--config-file", QUICKSTART, *options]
    result = train_net(*job, DETECTRON2_DATASETS="/nowhere")
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "DETECTRON2_DATASETS" in error
    assert "/nowhere/coco/annotations/instances_train2017.json" in error
