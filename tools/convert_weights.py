"""Converts weights of mmdetection, the WS authors, torchvision, timm and BiT for detectron2.

Nothing in the input file is executed, and unexpected keys are errors.
"""

from pathlib import Path

from ws_detectron.checkpoint import (
    SOURCES,
    convert_file,
    describe_file,
    write_detectron2,
    write_mmdet,
)
from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.utils.command_line import ToolParser, closing
from ws_detectron.utils.io import check_folder, refuse_overwrite, write_text
from ws_detectron.utils.yaml_files import config_text

EXAMPLES = """examples:
  # a mmdetection detector, then its AP (the published files have names: docs/weights.md)
  python tools/convert_weights.py mask_rcnn_r50_fpn_gn_ws-all_2x_coco_20200226-16acb762.pth r50.pth
  python tools/train_net.py --eval-only --config-file \\
      configs/COCO-InstanceSegmentation/mmdet/mask_rcnn_r50_fpn_gn_ws-all_2x_coco.yaml \\
      MODEL.WEIGHTS r50.pth

  # the WS authors' ImageNet weights
  python tools/convert_weights.py R-50-GN-WS.pth.tar R-50-GN-WS.pth

  # BiT, from timm's file of huggingface.co/timm/resnetv2_50x1_bit.goog_in21k, then a training
  python tools/convert_weights.py model.safetensors bit.pth
  python tools/train_net.py --num-gpus 8 --config-file \\
      configs/COCO-InstanceSegmentation/mask_rcnn_BiT_R_50x1_FPN_1x_gn_ws_2img.yaml \\
      MODEL.WEIGHTS bit.pth

  # what a file is, whether it is whole, and what it needs; nothing is written
  python tools/convert_weights.py model.safetensors --check

  # a detector trained here, for mmdetection
  python tools/convert_weights.py output/model_final.pth for_mmdet.pth --to mmdet
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_either("input", "the file to convert")
    parser.add_either("output", "the file to write; .pth, or .pkl for detectron2", required=False)
    parser.add_argument(
        "--check",
        action="store_true",
        help="print what the input is, whether it is whole and what it needs, and write nothing",
    )
    source = "format of the input; default: found by its keys"
    parser.add_argument("--source", choices=["auto", *SOURCES], default="auto", help=source)
    parser.add_argument(
        "--to", choices=("detectron2", "mmdet"), default="detectron2", help="format of the output"
    )
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--ws", action="store_true", default=None, help="trained with WS")
    trained.add_argument("--no-ws", dest="ws", action="store_false", help="trained without WS")
    allow = "unexpected keys to leave out; * matches anything"
    parser.add_argument("--allow", nargs="+", default=[], metavar="KEY", help=allow)
    table = "write a TSV table of what became of each key"
    parser.add_argument("--report", metavar="FILE", help=table)
    args = parser.parse_args()
    if args.check:
        if args.output or args.report or args.to != "detectron2":
            parser.error("--check writes nothing; leave out the output, --to and --report")
        found = describe_file(args.input, args.source, args.ws, args.allow)
        print(closing(found, {}, ["convert_weights.py", args.input, "converted.pth"]))
        return
    if not args.output:
        parser.error("name the output, or pass --check")
    outputs = [Path(path) for path in (args.output, args.report) if path]
    refuse_overwrite(outputs, [args.input])
    for path in outputs:
        check_folder(path.parent)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UserError(f"--report {args.report} is the output itself; choose another file")
    if args.to == "mmdet":
        record = write_mmdet(args.input, args.output, args.allow)
    else:
        converted = convert_file(args.input, args.source, args.ws, args.allow)
        write_detectron2(converted, args.output)
        record, metadata = converted.record, converted.metadata
        print(f"{metadata.origin}: {metadata.source}, {metadata.architecture or 'any model'}")
        ws = f"WS in {len(metadata.ws_convs)} convs" if metadata.ws_convs else "no WS"
        preprocessing = metadata.preprocessing or "input not recorded"
        print(f"{ws}, norm {metadata.norm or 'not recorded'}, {preprocessing}")
    print(record.summary())
    files, train = {"weights": args.output}, []
    if args.report:
        write_text(args.report, record.table())
        files["keys"] = args.report
    if args.to == "detectron2":
        keys = {"MODEL.WEIGHTS": str(Path(args.output).absolute()), **converted.needs()}
        builder = str(keys.get("MODEL.BACKBONE.NAME", ""))
        if builder:  # of three; most models have an FPN
            keys["MODEL.BACKBONE.NAME"] = builder.replace("*", "resnet_fpn_backbone")
        print(f"\nin your config:\n\n{config_text(keys)}")
        train = [["train_net.py", "--config-file", "my_config.yaml"]]
    print(closing(f"converted {args.input} for {args.to}", files, *train))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
