"""Compares our models with those of mmdetection, the WS authors, torchvision, timm and BiT.

Both get the same weights, through the converter, and the same COCO images; every layer and the
final detections must agree. The exit status is 1 if they do not.
"""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.utils.command_line import ToolParser, progress, verdict, within
from ws_detectron.utils.environment import environment
from ws_detectron.utils.io import write_json, write_text

EXAMPLES = """once, an environment with mmdetection (6 GB, from the package index):
  python -m venv parity-venv
  parity-venv/bin/pip install "setuptools<81" wheel torch==2.11.0 torchvision==0.26.0
  parity-venv/bin/pip install mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0 timm==1.0.31 six
  parity-venv/bin/python tools/install_detectron2.py
  parity-venv/bin/pip install --no-deps --no-build-isolation --editable .

the comparison, with DETECTRON2_DATASETS naming the folder that holds coco/:
  parity-venv/bin/python tools/check_parity.py --output results/parity
"""
PACKAGES = ("torch", "torchvision", "detectron2", "mmdet", "mmengine", "mmcv-lite", "timm")
SEED, SHORT_SIDE, RESIZED = 0, 256, 50
REPORT = """\
# Output parity with the systems that weights come from

Written by `tools/check_parity.py`. Each model is built by its own system with random
weights, saved, converted by `ws_detectron.checkpoint`, and run on the same images in
both systems. Differences are max \\|a - b\\| / max \\|a\\| over a tensor, the largest of
all images and layers. RoIAlign and the inner loop of NMS are torchvision's kernels on
both sides, because mmcv-lite has none; everything above them is each system's own code.

- command: `{command}`
- seed {seed}, {images} COCO val2017 images at {short_side} pixels (in float64: the first one)
- {environment}

## Largest differences

Limits: 1e-5 in float32, 1e-10 in float64; all detections in both, boxes within 0.01 pixels,
scores within 2e-4, masks but for 0.1 % of their pixels. Of ResNets res2 to res5 are compared, of
BiT after the norm and ReLU that follow each. Google's own BiT code is no package: its row is timm's
model with Google's eps, 1e-10, and with the weights that timm reads from the same file.

{table}

{settings}

## What differs by design

Image resizing, on {resized} images at 800 pixels: mean absolute difference {mean:.2f} grey levels,
largest {largest:.0f}; {other_size} images of another size. The rest is in
[docs/weights.md]({docs}).
"""

Results = dict[str, dict[str, dict[str, list[Any]]]]
"""Model -> group -> what -> value (the largest of all images) and limit."""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    output = Path("results/parity")
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="folder")
    parser.add_argument("--images", type=within(int, 1), default=2, help="of COCO val2017")
    parser.add_argument(
        "--only", default="", help="only models with this in their name; default: all"
    )
    args = parser.parse_args()
    try:
        from parity.detectors import DETECTORS, compare_detector
        from parity.resnets import RESNETS, compare_resnet
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; see the environment in --help") from None
    resize = ResizeShortestEdge(SHORT_SIDE, SHORT_SIDE * 1333 // 800)
    images = [
        torch.from_numpy(resize.get_transform(im).apply_image(im).transpose(2, 0, 1).copy())
        for im in read_images(args.images)
    ]
    results: Results = {}
    for names, compare in ((DETECTORS, compare_detector), (RESNETS, compare_resnet)):
        for name in progress([n for n in names if args.only in n], "comparing", "model"):
            groups = results.setdefault(name, {})
            with tempfile.TemporaryDirectory() as folder:
                for group, what, value, limit in compare(name, images, SEED, Path(folder)):
                    known = groups.setdefault(group, {}).setdefault(what, [value, limit])
                    known[0] = max(known[0], value)
            print(name, "agrees" if holds(groups) else "DIFFERS", flush=True)
    about = {
        "environment": environment(PACKAGES),
        "command": shlex.join(["python", *sys.argv]),
        **{"seed": SEED, "images": len(images), "short_side": SHORT_SIDE},
        **resizing_difference(RESIZED),
    }
    write_json(args.output / "parity.json", {**about, "results": results})
    docs = os.path.relpath(Path(__file__).parents[1] / "docs" / "weights.md", args.output)
    write_text(args.output / "README.md", report(results, {**about, "docs": docs}))
    checked = {name: holds(groups) for name, groups in results.items()}
    then = "convert weights of such models: tools/convert_weights.py --help"
    what = f"models agree with their source on {len(images)} images"
    sys.exit(verdict(checked, what, args.output / "README.md", then))


def holds(groups: dict[str, dict[str, list[Any]]]) -> bool:
    """Whether every value of a model is within its limit."""
    measures = [measure for group in groups.values() for measure in group.values()]
    return all(limit is None or value <= limit for value, limit in measures)


def read_images(count: int) -> list[np.ndarray]:
    """The first images of COCO val2017, RGB (H, W, 3)."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
    annotations = root / "annotations" / "instances_val2017.json"
    if not annotations.is_file():
        raise UserError(
            f"there is no {annotations}; set DETECTRON2_DATASETS to the folder that holds coco/"
        )
    names = sorted(image["file_name"] for image in json.loads(annotations.read_text())["images"])
    return [
        np.asarray(Image.open(root / "val2017" / name).convert("RGB")) for name in names[:count]
    ]


def resizing_difference(count: int) -> dict[str, Any]:
    """Grey levels by which images at 800 / 1333 pixels differ.

    mmdetection resizes with OpenCV's bilinear interpolation, detectron2 with Pillow's, which
    averages when it shrinks an image.
    """
    import mmcv

    differences, other_size = [], 0
    for image in read_images(count):
        ours = ResizeShortestEdge(800, 1333).get_transform(image).apply_image(image)
        theirs = mmcv.imrescale(image, (1333, 800), interpolation="bilinear")
        if ours.shape == theirs.shape:
            differences.append(np.abs(ours.astype(float) - theirs.astype(float)))
        else:
            other_size += 1
    mean, largest = (float(f([f(d) for d in differences])) for f in (np.mean, np.max))
    return {"resized": count, "mean": mean, "largest": largest, "other_size": other_size}


def report(results: Results, about: dict[str, Any]) -> str:
    """The page of the results."""
    columns = ("detections", "in one only", "box (pixels)", "score", "mask (share)")
    table = [("model", "float32", "float64", *columns), ["---"] * (3 + len(columns))]
    settings: dict[str, float] = {}
    for model, groups in results.items():
        worst = (max(groups[t].items(), key=lambda m: m[1][0]) for t in ("float32", "float64"))
        of_layers = [f"{value:.1e} ({what})" for what, (value, _) in worst]
        found = groups.get("detections", {})
        of_detections = [f"{found[name][0]:.3g}" if name in found else "" for name in columns]
        table.append([model, *of_layers, *of_detections])
        for what, (value, _) in groups.get("settings", {}).items():
            settings[what] = max(value, settings.get(what, 0))
    return REPORT.format(
        **{**about, "environment": ", ".join(f"{k} {v}" for k, v in about["environment"].items())},
        table="\n".join(f"| {' | '.join(row)} |" for row in table),
        settings="\n".join(f"- {what}: {value}" for what, value in settings.items()),
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
