"""Trains and evaluates a detector on the CPU, one GPU, many GPUs or many machines."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config, start_run
from ws_detectron.engine.output_dir import EVALUATION
from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.evaluate import RESULTS
from ws_detectron.evaluation.runs import main_metrics, read_run
from ws_detectron.utils.command_line import closing, overrides, training_parser

EXAMPLES = """
examples:
  # GN+WS at 1 image per GPU, on 8 GPUs
  python tools/train_net.py --num-gpus 8 \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml

  # resume it; or delete it and start again
  python tools/train_net.py --resume --config-file <config>
  python tools/train_net.py --overwrite --config-file <config>

  # evaluate a checkpoint
  python tools/train_net.py --eval-only --config-file output/config.yaml \\
      MODEL.WEIGHTS output/model_final.pth

  # two CPU processes; KEY VALUE pairs at the end override the config
  python tools/train_net.py --num-gpus 2 --config-file <config> MODEL.DEVICE cpu \\
      SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025

  # two machines of 8 GPUs, started by torchrun on each
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint <host>:29500 \\
      tools/train_net.py --config-file <config>
"""


def main() -> None:
    parser = training_parser(__doc__, EXAMPLES, "OUTPUT_DIR")
    args = parser.parse_args()
    with exit_on_user_error():
        output = ["OUTPUT_DIR", args.output] if args.output else []
        cfg = load_config(args.config_file, [*overrides(args), *output])
        start_run(cfg, args)
        folder = Path(cfg.OUTPUT_DIR)
        config, weights = folder / "config.yaml", folder / "model_final.pth"
        trained = ["--config-file", config, "MODEL.WEIGHTS", weights]
        draw = ["visualize.py", "--output", folder / "pictures", *trained]
        print_ending(args, folder, cfg.DATASETS.TEST, ["evaluate_coco.py", *trained], draw)


def print_ending(
    args: argparse.Namespace, folder: Path, test_sets: Sequence[str], *steps: Sequence
) -> None:
    """Says on the main process what came out, where it is, and how to continue.

    Args:
        args: with `eval_only` and `machine_rank`.
        folder: of the run.
        test_sets: on which it was evaluated; curves of the first can be computed from its files.
        steps: what can follow a training, see `closing`.
    """
    if int(os.environ.get("RANK", args.machine_rank)) != 0:
        return
    files = {"weights": "model_final.pth", "config": "config.yaml", "log": "log.txt"}
    if args.eval_only:
        rows = [flatten_results_dict(json.loads((folder / EVALUATION).read_text()))]
        files = {"metrics": EVALUATION, "log": "inference/log.txt"}
        name = next(iter(test_sets), "__none__")
        found = folder / "inference" / (name if len(test_sets) > 1 else "") / RESULTS
        truth = MetadataCatalog.get(name).get("json_file")
        curves = ["evaluate_coco.py", "--predictions", found, "--annotations", truth]
        steps = (curves,) if truth else ()
    else:
        rows = read_run(folder, "").rows
    made = next(filter(None, map(main_metrics, reversed(rows))), "not evaluated")
    made = f"{'evaluated' if args.eval_only else 'trained'}, {made}"
    print(closing(made, {what: folder / name for what, name in files.items()}, *steps))


if __name__ == "__main__":
    main()
