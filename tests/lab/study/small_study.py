"""A small study file, and the stand-in for tools/train_net.py that trains its runs."""

import json
from pathlib import Path
from typing import Any

import yaml

from ws_detectron.lab.study import Study, read_study

FAKE = Path(__file__).with_name("fake_train_net.py")
VARIANT = "quickstart/mask_rcnn_R_18_FPN_fashion_{}_8img.yaml"


def write_study(folder: Path, **changes: Any) -> Study:
    """Two variants, two batches, two seeds: eight runs of 80 images, in `folder`/out.

    Args:
        folder: for the file, study.yaml.
        changes: other keys; None leaves one out.
    """
    content = {
        "title": "A study",
        "command": str(FAKE),
        "output": str(folder / "out"),
        "variants": {"bn": VARIANT.format("bn"), "gn": VARIANT.format("gn")},
        "batches": [1, 4],
        "seeds": [1, 2],
        "images": 80,
        "overrides": {
            "DATASETS.TRAIN": ["scenes_shapes_128_train"],
            "DATASETS.TEST": ["scenes_shapes_128_val"],
        },
        **changes,
    }
    kept = {k: v for k, v in content.items() if v is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return read_study(path)


def reach(folder: Path, box: float) -> None:
    """Gives a run's folder the metrics of a run that ended with this box AP; masks have half."""
    row = {"iteration": 20, "bbox/AP": box, "segm/AP": box / 2}
    (folder / "metrics.json").write_text(json.dumps(row) + "\n")
