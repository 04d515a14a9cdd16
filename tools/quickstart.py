"""Trains and evaluates a small GN+WS Mask R-CNN on drawn shapes, and draws its predictions.

Needs no download and no GPU; takes five to ten minutes on two cores.
"""

import argparse
import os
import sys
from pathlib import Path

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config, run
from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.coco_eval import load_predictions
from ws_detectron.evaluation.runs import read_run
from ws_detectron.evaluation.visualize import visualize_dataset
from ws_detectron.model_zoo import get_config_file
from ws_detectron.utils.command_line import add_overrides

CONFIG = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
EXAMPLES = r"""
examples:
  python tools/quickstart.py
  python tools/quickstart.py --output /tmp/first_run \
      SOLVER.MAX_ITER 300 TEST.EXPECTED_RESULTS "[]"
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=None, help=f"default: {CONFIG}")
    parser.add_argument("--output", default="output/quickstart", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="resume the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="delete that run and train again")
    add_overrides(parser)
    args = parser.parse_args()
    args.config_file = args.config_file or get_config_file(CONFIG)
    args.eval_only = False
    with exit_on_user_error():
        cfg = load_config(args.config_file, [*args.opts, "OUTPUT_DIR", args.output])
        output = Path(args.output)
        status = 0
        try:
            run(cfg, args)
        except SystemExit as end:  # misses TEST.EXPECTED_RESULTS; pictures may show why
            status = int(end.code or 0)
        predictions = output / "inference" / "coco_instances_results.json"
        pictures = output / "pictures"
        visualize_dataset(cfg.DATASETS.TEST[0], load_predictions(predictions), pictures)
    print(summary(output, pictures))
    if status:
        print(
            f"error: expected (task, metric, value, tolerance): {cfg.TEST.EXPECTED_RESULTS}",
            file=sys.stderr,
        )
        sys.exit(status)


def summary(output: Path, pictures: Path) -> str:
    """Final AP and the paths of all outputs."""
    python = os.path.relpath(sys.executable)
    final = [row for row in read_run(output, "quickstart").rows if "bbox/AP" in row][-1]
    return f"""
GN+WS Mask R-CNN: box AP {final["bbox/AP"]:.1f}, mask AP {final["segm/AP"]:.1f} on the val scenes
  predictions beside ground truth  {pictures / "first.png"} (and best.png, worst.png)
  weights                          {output / "model_final.pth"}
  config                           {output / "config.yaml"}
  losses and AP                    {output / "metrics.json"} (or: tensorboard --logdir {output})
  log                              {output / "log.txt"}
evaluate again:
  {python} tools/train_net.py --eval-only --config-file {output / "config.yaml"} \\
      MODEL.WEIGHTS {output / "model_final.pth"}"""


if __name__ == "__main__":
    main()
