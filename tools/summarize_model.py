"""What a model consists of, by part: parameters, what is frozen, WS convs, FLOPs, activations."""

from detectron2.config import instantiate
from tabulate import tabulate

from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.lazy import load_lazy_config
from ws_detectron.errors import exit_on_user_error
from ws_detectron.modeling.summary import summarize, summary_line
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides, within

EXAMPLES = """
examples:
  python tools/summarize_model.py \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml

  # of another model, for another image
  python tools/summarize_model.py --config-file <config> --size 512 512 MODEL.RESNETS.DEPTH 101
"""

NOTE = """
One image of {height} x {width} pixels on the CPU, with WS folded and as many boxes in the heads as
the config allows. FLOPs: multiply-adds, as fvcore counts them. Activations: outputs of convolutions
and linear layers, in 32 bits; a training keeps those of norm layers as well."""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_argument(
        "--config-file", required=True, help="path or name of a config, YAML or .py"
    )
    parser.add_argument(
        "--size", nargs=2, type=within(int, 1), metavar=("HEIGHT", "WIDTH"),
        help="of the image; default: 3:4 at INPUT.MIN_SIZE_TEST, or 800 for a LazyConfig",
    )  # fmt: skip
    add_overrides(parser, device=False)
    args = parser.parse_args()
    with exit_on_user_error():
        short = 800
        if args.config_file.endswith(".py"):
            model = instantiate(load_lazy_config(args.config_file, overrides(args)).model)
        else:
            cfg = load_config(args.config_file, overrides(args))
            cfg.MODEL.DEVICE, short = "cpu", cfg.INPUT.MIN_SIZE_TEST
            model = Trainer.build_model(cfg)
        height, width = args.size or (short, short * 4 // 3)
        parts = summarize(model, height, width)
    columns = "part", "parameters", "frozen", "convs", "with WS", "GFLOPs", "activations, MiB"
    rows = [
        (p.part, f"{p.parameters:,}", f"{p.frozen:,}", p.convs, p.ws_convs, p.flops / 1e9,
         4 * p.activations / 2**20)
        for p in parts
    ]  # fmt: skip
    align = "left", *["right"] * 6
    print(tabulate(rows, columns, "github", floatfmt=",.1f", colalign=align))
    print(NOTE.format(height=height, width=width))
    tool = "lazyconfig_train_net.py" if args.config_file.endswith(".py") else "train_net.py"
    train = [tool, "--config-file", args.config_file, *overrides(args)]
    print(closing(f"\nModel: {summary_line(model)}", {}, train))


if __name__ == "__main__":
    main()
