"""Trains and evaluates what a LazyConfig, detectron2's config in Python, defines."""

from pathlib import Path

from train_net import print_ending

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine.lazy import load_lazy_config, start_lazy_run, test_sets
from ws_detectron.errors import exit_on_user_error
from ws_detectron.utils.command_line import training_parser

EXAMPLES = """
examples:
  # GN+WS in the recipe of detectron2's new baselines, on 8 GPUs
  python tools/lazyconfig_train_net.py --num-gpus 8 \\
      --config-file configs/lazy/mask_rcnn_R_50_FPN_100ep_LSJ_gn_ws.py

  # key=value pairs at the end override the config; resume it
  python tools/lazyconfig_train_net.py --resume --config-file <config> train.max_iter=200

  # evaluate a checkpoint
  python tools/lazyconfig_train_net.py --eval-only --config-file <config> \\
      train.init_checkpoint=output/model_final.pth
"""


def main() -> None:
    parser = training_parser(__doc__, EXAMPLES, "train.output_dir")
    args = parser.parse_args()
    with exit_on_user_error():
        given = {"train.device": args.device, "train.output_dir": args.output}
        args.opts += [f"{key}={value}" for key, value in given.items() if value]
        start_lazy_run(args)
        cfg = load_lazy_config(args.config_file, args.opts)
        folder = Path(cfg.train.output_dir)
        weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
        again = ["--eval-only", "--config-file", folder / "config.yaml", weights]
        print_ending(args, folder, test_sets(cfg)[:1], ["lazyconfig_train_net.py", *again])


if __name__ == "__main__":
    main()
