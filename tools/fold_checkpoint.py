"""Exports a trained GN+WS model to stock detectron2: folded weights, and a config to build it.

Using them does not need ws_detectron.
"""

import argparse
import os

from ws_detectron.engine import load_config
from ws_detectron.engine.inference import write_folded
from ws_detectron.errors import exit_on_user_error
from ws_detectron.utils.command_line import add_overrides
from ws_detectron.utils.io import refuse_overwrite

EXAMPLES = """
examples:
  python tools/fold_checkpoint.py --config-file output/quickstart/config.yaml \\
      --output folded.pth MODEL.WEIGHTS output/quickstart/model_final.pth

then, with detectron2 alone:
  cfg = detectron2.config.get_cfg()
  cfg.merge_from_file("folded.yaml")
  predictor = detectron2.engine.DefaultPredictor(cfg)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the config of the trained model")
    parser.add_argument(
        "--output",
        required=True,
        metavar="PTH",
        help="weights to write; the config is written beside them as .yaml",
    )
    add_overrides(parser)
    args = parser.parse_args()
    with exit_on_user_error():
        refuse_overwrite(
            [args.output, os.path.splitext(args.output)[0] + ".yaml"], [args.config_file]
        )
        weights, config = write_folded(load_config(args.config_file, args.opts), args.output)
    print(f"folded weights  {weights}\nstock config    {config}")


if __name__ == "__main__":
    main()
