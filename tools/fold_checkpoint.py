"""Exports a trained GN+WS model to stock detectron2: folded weights, and a config to build it.

Using them does not need ws_detectron.
"""

from pathlib import Path

from ws_detectron.engine import load_config
from ws_detectron.engine.checks import check_device, check_weights
from ws_detectron.engine.inference import write_folded
from ws_detectron.errors import exit_on_user_error
from ws_detectron.modeling import registrations_in
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides
from ws_detectron.utils.io import refuse_overwrite
from ws_detectron.utils.yaml_files import config_text

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
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_argument("--config-file", required=True, help="the config of the trained model")
    about = "weights to write; the config is written beside them as .yaml"
    parser.add_argument("--output", type=Path, required=True, metavar="PTH", help=about)
    add_overrides(parser)
    args = parser.parse_args()
    with exit_on_user_error():
        refuse_overwrite([args.output, args.output.with_suffix(".yaml")], [args.config_file])
        cfg = load_config(args.config_file, overrides(args))
        check_device(cfg)
        check_weights(cfg)
        weights, config = write_folded(cfg, args.output)
    keys = {row.key: row.stock for row in registrations_in(cfg)}
    print("in a config of your own that has the settings of this model:\n")
    print(config_text({"MODEL.WEIGHTS": str(weights), **keys}))
    made = "folded for stock detectron2; after moving the weights, change MODEL.WEIGHTS"
    draw = [
        "visualize.py",
        "--config-file",
        config,
        *"--input photo.jpg --output drawn.jpg".split(),
    ]
    print(closing(made, {"weights": weights, "config": config}, draw))


if __name__ == "__main__":
    main()
