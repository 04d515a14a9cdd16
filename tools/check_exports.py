"""Exports several detectors in every format that can and writes how far they are from detectron2.

The exit status is 1 if an export differs.
"""

import itertools
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.checks import check_datasets
from ws_detectron.errors import ConfigError, exit_on_user_error
from ws_detectron.export import FORMATS, PARTS, check_export, export_model
from ws_detectron.utils.command_line import ToolParser, progress, verdict
from ws_detectron.utils.environment import environment
from ws_detectron.utils.io import write_text

EXAMPLES = """
examples (the second needs COCO in DETECTRON2_DATASETS):
  python tools/check_exports.py --run output/quickstart --output results/export
  python tools/check_exports.py --output results/export/random_R50
"""
SEED, SHORT_SIDE, PROPOSALS = 0, 192, 100
CONFIGS = {
    "RetinaNet R-50": "COCO-Detection/retinanet_R_50_FPN_1x_gn_ws_towers_1img.yaml",
    "Mask R-CNN R-50": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml",
    "Faster R-CNN R-50": "COCO-Detection/faster_rcnn_R_50_FPN_1x_gn_ws_1img.yaml",
}
SAME_BACKBONE = ("Faster R-CNN R-50",)
"""Their backbone is exported with another model."""
SPREAD = {
    "proposal_generator.rpn_head.objectness_logits": 2.0,
    "proposal_generator.rpn_head.anchor_deltas": 0.3,
    "roi_heads.box_predictor.cls_score": 2.5,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "roi_heads.mask_head.predictor": 3.0,
    "head.cls_score": 1.0,
    "head.bbox_pred": 0.3,
}
"""Standard deviation to which the output of each last layer is scaled, so that scores spread, boxes
move and masks have both signs. As initialized, no score would pass the threshold."""
RESIDUAL = 0.2
"""Scale of the last norm of a residual block. At 1, random GN+WS blocks amplify rounding: PyTorch's
own float32 features of R-50 are then 1e-4 from its float64 ones, at 0.2 3e-6."""
PACKAGES = ("torch", "torchvision", "detectron2", "onnx", "onnxruntime")
REPORT = """\
# Exports compared with detectron2

Written by `tools/check_exports.py`. Each model is exported by `ws_detectron.export`, with WS
folded, and run by the format's own runtime on the CPU: `torch.jit`, ONNX Runtime, `torch.export`.
Every image is compared with detectron2's own inference twice: as it is, and with an input of 1.5
times its width. Differences are the largest of both.

- command: `{command}`
- {models}
- {environment}

{table}

Limits: the same detections, boxes within 0.01 pixels, scores within 1e-4, masks but for 0.1 % of
the pixels in either of the two; features within 1e-4 of the largest of their level.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    runs, output = "folders of trained models; default: random R-50 ones", Path("results/export")
    parser.add_argument("--run", nargs="+", type=Path, default=[], metavar="DIR", help=runs)
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="folder")
    args = parser.parse_args()
    if args.run:
        names = ", ".join(run.name for run in args.run)
        models = f"{names}: trained models, each on its own first test image"
    else:
        models = (
            f"COCO configs, the first image of val2017 at {SHORT_SIDE} pixels, {PROPOSALS} "
            f"proposals, random weights of seed {SEED}, the residual branches scaled by {RESIDUAL} "
            "and the last layers so that something is found"
        )
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "models": models,
        "environment": ", ".join(f"{key} {value}" for key, value in environment(PACKAGES).items()),
    }
    rows: list[dict[str, str]] = []
    with exit_on_user_error(), tempfile.TemporaryDirectory() as folder:
        for row in check_all(args.run, Path(folder)):
            rows.append(row)
            # after each, in case the next is interrupted
            table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
            write_text(args.output / "README.md", REPORT.format(**about, table=table))
    checked = {f"{r['format']} of {r['model']}, {r['part']}": r[""] == "equal" for r in rows}
    then = "docs/deploy.md has examples that run exports"
    sys.exit(verdict(checked, "exports equal detectron2", args.output / "README.md", then))


def check_all(runs: list[Path], folder: Path) -> Iterator[dict[str, str]]:
    """The rows of the table."""
    trained = {run.name: run for run in runs}
    for name in progress([*(trained or CONFIGS)], "exporting", "model"):
        if run := trained.get(name):
            weights = ["MODEL.WEIGHTS", str(run / "model_final.pth"), "MODEL.DEVICE", "cpu"]
            cfg = load_config(str(run / "config.yaml"), weights)
        else:
            cfg = random_detector(CONFIGS[name], folder)
        for part, (format, row) in itertools.product(PARTS, FORMATS.items()):
            if part == "backbone" and name in SAME_BACKBONE:
                continue
            try:
                check_export(cfg, format, part)
            except ConfigError:  # a detector by torch.export
                continue
            output = folder / f"export{row.suffixes[0]}"
            start = time.perf_counter()
            comparisons = export_model(cfg, output, format, part)
            found = {
                "model": name,
                "part": part,
                "format": format,
                "inputs": ", ".join("x".join(map(str, c.size)) for c in comparisons),
                "found": "; ".join(dict.fromkeys(c.found for c in comparisons)),
                **{
                    what: f"{max(c.differences[what][0] for c in comparisons):.1e}"
                    if what in comparisons[0].differences
                    else ""
                    for what in ("box (pixels)", "score", "mask (share)", "feature")
                },
                "": "equal" if all(c.holds for c in comparisons) else "DIFFERS",
            }
            print(*found.values(), f"{time.perf_counter() - start:.0f} s", flush=True)
            yield found


def random_detector(name: str, folder: Path) -> CfgNode:
    """The config of a COCO detector whose random weights find something."""
    options = f"""MODEL.DEVICE cpu MODEL.WEIGHTS "" DATASETS.TEST "('coco_2017_val',)"
        INPUT.MIN_SIZE_TEST {SHORT_SIDE} INPUT.MAX_SIZE_TEST {SHORT_SIDE * 5 // 3}
        MODEL.RPN.POST_NMS_TOPK_TEST {PROPOSALS} DATALOADER.NUM_WORKERS 0"""
    cfg = load_config(name, shlex.split(options))
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    torch.manual_seed(SEED)
    model = Trainer.build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("conv3.norm.weight"):
            parameter.data.mul_(RESIDUAL)
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    spread_outputs(model, next(iter(loader)))
    WSCheckpointer(model, str(folder)).save("random")
    cfg.MODEL.WEIGHTS = str(folder / "random.pth")
    return cfg


@torch.no_grad()
def spread_outputs(model: Any, batch: list[dict[str, Any]]) -> None:
    """Scales the last layers of a detector so that their outputs vary as `SPREAD` says."""
    for name, target in SPREAD.items():
        layer = dict(model.named_modules()).get(name)
        if layer is None:
            continue
        outputs: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))  # noqa: B023
        model(batch)
        handle.remove()
        layer.weight *= target / torch.cat([output.flatten() for output in outputs]).std()


if __name__ == "__main__":
    main()
