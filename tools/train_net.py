"""Trains and evaluates a detector on the CPU, one GPU, many GPUs or many machines."""

import os
from pathlib import Path

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config, start_run
from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.runs import read_run
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
        if int(os.environ.get("RANK", args.machine_rank)) == 0:
            print(ending(Path(cfg.OUTPUT_DIR), args.eval_only))


def ending(folder: Path, evaluated: bool) -> str:
    """AP of the last evaluation, files, and what can be done with the model."""
    if evaluated:
        return closing(f"evaluated; config and log: {folder / 'inference'}")
    rows = [row for row in read_run(folder, "").rows if "bbox/AP" in row] or [{}]
    ap = [f"{t} AP {rows[-1][f'{t}/AP']:.1f}" for t in ("bbox", "segm") if f"{t}/AP" in rows[-1]]
    weights, config = folder / "model_final.pth", folder / "config.yaml"
    trained = ["--config-file", config, "MODEL.WEIGHTS", weights]
    return closing(
        ", ".join(["trained", *ap]),
        {"weights": weights, "config": config, "log": folder / "log.txt"},
        ["evaluate_coco.py", *trained],
        ["visualize.py", "--output", folder / "pictures", *trained],
    )


if __name__ == "__main__":
    main()
