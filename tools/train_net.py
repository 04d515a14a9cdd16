"""Trains and evaluates a detector on the CPU, one GPU, many GPUs or many machines."""

from detectron2.engine import default_argument_parser

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config, start_run
from ws_detectron.errors import exit_on_user_error
from ws_detectron.utils.command_line import add_overrides

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
    parser = default_argument_parser(epilog=EXAMPLES)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete metrics, checkpoints and events of the run in OUTPUT_DIR and train again; "
        "without --overwrite or --resume, a folder that holds a run is refused",
    )
    add_overrides(parser, nargs=None)
    args = parser.parse_args()
    with exit_on_user_error():
        start_run(load_config(args.config_file, args.opts or []), args)


if __name__ == "__main__":
    main()
