"""Exports a trained detector to TorchScript, ONNX or torch.export, with WS folded.

The export is run at once on an image and compared with detectron2; it is written if both find the
same. Using it needs neither ws_detectron nor detectron2: docs/deploy.md has an example.
"""

import sys

from tabulate import tabulate

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config
from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.evaluate import set_up_logging
from ws_detectron.export import FORMATS, PARTS, export_model, rows
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides
from ws_detectron.utils.io import refuse_overwrite

EXAMPLES = """
examples:
  python tools/export_model.py --config-file output/quickstart/config.yaml --format onnx \\
      --output model.onnx MODEL.WEIGHTS output/quickstart/model_final.pth

  # compared on images of yours, from a run on GPUs
  python tools/export_model.py --config-file output/gn_ws/config.yaml --format torchscript \\
      --output model.ts --input photo.jpg another.png --device cpu \\
      MODEL.WEIGHTS output/gn_ws/model_final.pth

  # normalization, ResNet and FPN alone
  python tools/export_model.py --config-file output/gn_ws/config.yaml --format torch-export \\
      --part backbone --output backbone.pt2 MODEL.WEIGHTS output/gn_ws/model_final.pth

The exit status is 1, and nothing is written, if the export finds something else than detectron2.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_argument("--config-file", required=True, help="the config of the trained model")
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file")
    parser.add_argument(
        "--output", required=True, metavar="FILE",
        help="; ".join(f"{name}: *{' or *'.join(row.suffixes)}" for name, row in FORMATS.items()),
    )  # fmt: skip
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="of the model")
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="IMAGE",
        help="images to compare on; default: the first image of DATASETS.TEST",
    )  # fmt: skip
    add_overrides(parser)
    args = parser.parse_args()
    set_up_logging()
    with exit_on_user_error():
        refuse_overwrite(args.output, [args.config_file])
        cfg = load_config(args.config_file, overrides(args))
        comparisons = export_model(cfg, args.output, args.format, args.part, args.input)
    print(tabulate(rows(comparisons), headers="keys", tablefmt="github", disable_numparse=True))
    if not all(comparison.holds for comparison in comparisons):
        print(f"error: the export differs from detectron2; {args.output} is not written",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)
    found = "; ".join(dict.fromkeys(comparison.found for comparison in comparisons))
    made = f"\nequal to detectron2 on {len(comparisons)} inputs: {found}"
    then = "docs/deploy.md has an example that runs it without detectron2"
    print(closing(made, {"exported": args.output}, then))


if __name__ == "__main__":
    main()
