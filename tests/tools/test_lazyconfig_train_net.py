"""tools/lazyconfig_train_net.py in two processes, on a data set that the config registers."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ws_detectron.lab.scenes import builtin_scenes, ensure_scenes

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
from detectron2.config import LazyConfig
from ws_detectron.data import register_coco_sets
from ws_detectron.model_zoo import get_config_file

register_coco_sets([["mine", {annotations!r}, {images!r}]])
base = LazyConfig.load(get_config_file("lazy/mask_rcnn_R_18_FPN_shapes_gn_ws.py"))
model, dataloader, optimizer = base.model, base.dataloader, base.optimizer
train, lr_multiplier = base.train, base.lr_multiplier
dataloader.train.dataset.names = dataloader.test.dataset.names = "mine"
"""


def test_two_cpu_processes_train_and_evaluate_as_one_job(tmp_path: Path) -> None:
    folder = ensure_scenes(builtin_scenes()["scenes_shapes_128_val"])
    content = json.loads((folder / "annotations.json").read_text())
    content["images"] = content["images"][:6]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(content))
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(annotations=str(annotations), images=str(folder / "images")))
    options = [f"train.output_dir={tmp_path / 'run'}", "train.max_iter=1", "train.log_period=1"]
    options += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    options += ["dataloader.train.total_batch_size=2"]
    options += ["model.module.roi_heads.box_predictor.test_topk_per_image=5"]
    command = [sys.executable, str(ROOT / "tools" / "lazyconfig_train_net.py"), "--num-gpus", "2"]
    done = subprocess.run(
        [*command, "--dist-url", "auto", "--config-file", str(config), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "World size: 2" in done.stdout and "copypaste: Task: segm" in done.stdout
    assert re.search(r"^trained, bbox AP [\d.]+, segm AP [\d.]+$", done.stdout, re.M)
    again = shlex.split(done.stdout.splitlines()[-1])
    assert again[1] == "tools/lazyconfig_train_net.py" and "--eval-only" in again
    rows = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert "total_loss" in json.loads(rows[0]) and "segm/AP" in json.loads(rows[-1])
    assert json.loads((tmp_path / "run" / "run_record.json").read_text())["processes"] == 2
