"""Draws predictions: beside ground truth on a data set, or on any images and videos."""

import argparse
from functools import partial
from pathlib import Path

from detectron2.data import MetadataCatalog

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.data import classes_of
from ws_detectron.engine import load_config
from ws_detectron.engine.checks import check_datasets, check_device, check_weights
from ws_detectron.errors import ConfigError, exit_on_user_error
from ws_detectron.evaluation.coco_eval import TASKS, load_predictions
from ws_detectron.evaluation.evaluate import (
    RESULTS,
    ImagePredictor,
    evaluate_checkpoint,
    set_up_logging,
)
from ws_detectron.evaluation.visualize import (
    Drawing,
    visualize_dataset,
    visualize_inputs,
    visualize_webcam,
)
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides, within
from ws_detectron.utils.io import check_folder

EXAMPLES = """
examples:
  # a results file beside ground truth: first, best and worst images, error types
  python tools/visualize.py --dataset coco_2017_val --output pictures \\
      --predictions output/inference/coco_instances_results.json

  # a checkpoint: evaluates it on the first data set of DATASETS.TEST, then the same
  python tools/visualize.py --config-file output/config.yaml --output pictures \\
      MODEL.WEIGHTS output/model_final.pth

  # any images and videos: files, folders, patterns
  python tools/visualize.py --config-file output/config.yaml --output pictures \\
      --input photos "clips/*.mp4" --device cpu MODEL.WEIGHTS output/model_final.pth

  # one image into a file; a camera in a window, until Esc, or with --output into a video
  python tools/visualize.py --config-file output/config.yaml --input photo.jpg \\
      --output drawn.jpg MODEL.WEIGHTS output/model_final.pth
  python tools/visualize.py --config-file output/config.yaml --webcam \\
      MODEL.WEIGHTS output/model_final.pth

Drawings of --input have its size. Without --output they are shown in a window.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", metavar="JSON", help="COCO results file")
    source.add_argument("--config-file", metavar="YAML", help="config of the checkpoint")
    parser.add_argument("--dataset", metavar="NAME", help="registered data set")
    drawn = parser.add_mutually_exclusive_group()
    drawn.add_argument("--input", nargs="+", help="images, videos, folders, patterns")
    drawn.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="N", help="a camera; default: the first"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH",
        help="folder, or file for a single image, video or camera; default: a window",
    )  # fmt: skip
    parser.add_argument(
        "--longer-side",
        type=within(int, 1),
        metavar="PIXELS",
        help="of drawings; default: that of the input",
    )
    parser.add_argument(  # --score-threshold is the former name
        "--confidence-threshold", "--score-threshold", type=within(float, 0, 1),
        default=0.5, metavar="SCORE", help="minimum score of drawn predictions",
    )  # fmt: skip
    parser.add_argument("--num-images", type=within(int, 1), default=8, help="per sheet")
    parser.add_argument("--task", choices=TASKS, help="to evaluate; default: segm if possible")
    parser.add_argument("--each", action="store_true", help="also draw every image separately")
    add_overrides(parser)
    args = parser.parse_args()
    of_inputs = args.input is not None or args.webcam is not None
    if args.predictions and (of_inputs or not args.dataset):
        parser.error("--predictions needs --dataset; --input and --webcam need --config-file")
    if not of_inputs and not args.output:
        parser.error("drawing a data set needs --output, a folder")
    set_up_logging()
    with exit_on_user_error():
        print(draw_inputs(args) if of_inputs else draw_dataset(args))


def draw_dataset(args: argparse.Namespace) -> str:
    check_folder(args.output)
    cfg = load_config(args.config_file or "", overrides(args))  # also for DATASETS.REGISTER
    dataset = args.dataset or next(iter(cfg.DATASETS.TEST), "")
    if not dataset:
        raise ConfigError("DATASETS.TEST is empty; choose a data set: --dataset NAME")
    check_datasets("--dataset", [dataset])
    results = args.predictions or str(args.output / RESULTS)
    if not args.predictions:
        cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (dataset,), str(args.output)
        evaluate_checkpoint(cfg, args.task and [args.task], output=str(args.output))
    made = visualize_dataset(
        dataset,
        load_predictions(results),
        args.output,
        score_threshold=args.confidence_threshold,
        num_images=args.num_images,
        each=args.each,
        task=args.task,
        predictions_name=results,
    )
    truth = MetadataCatalog.get(dataset).json_file
    return closing(made, {}, ["evaluate_coco.py", "--predictions", results, "--annotations", truth])


def draw_inputs(args: argparse.Namespace) -> str:
    cfg = load_config(args.config_file, overrides(args))
    if args.dataset:
        check_datasets("--dataset", [args.dataset], files=False)
    metadata = classes_of(args.dataset or next(iter(cfg.DATASETS.TEST), "__none__"))
    classes = dict(enumerate(metadata.get("thing_classes", ())))
    check_device(cfg)
    check_weights(cfg)
    model = partial(ImagePredictor, cfg)
    draw = Drawing(model, classes, args.confidence_threshold, args.longer_side)
    if args.input:
        made = visualize_inputs(args.input, args.output, draw)
    else:
        made = visualize_webcam(args.webcam, args.output, draw)
    weights = ["--config-file", args.config_file, "--output", "model.onnx", *overrides(args)]
    return closing(made, {}, ["export_model.py", "--format", "onnx", *weights])


if __name__ == "__main__":
    main()
