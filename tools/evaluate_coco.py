"""Computes COCO metrics for boxes and masks, of a checkpoint or a results file."""

import argparse
import os
from pathlib import Path

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config, start
from ws_detectron.engine.checks import Purpose
from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.coco_curves import FILES, best_text, curve_tables, write_curves
from ws_detectron.evaluation.coco_eval import TASKS, evaluate, load_annotations, load_predictions
from ws_detectron.evaluation.coco_report import (
    JSON_NAME,
    KEYPOINTS,
    as_text,
    check_reports,
    write_reports,
)
from ws_detectron.evaluation.evaluate import evaluate_in_process, set_up_logging
from ws_detectron.evaluation.runs import main_metrics, read_run
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides
from ws_detectron.utils.io import refuse_overwrite

EXAMPLES = """
examples:
  # a results file; needs no model
  python tools/evaluate_coco.py --predictions output/inference/coco_instances_results.json \\
      --annotations datasets/coco/annotations/instances_val2017.json

  # a checkpoint, on two GPUs (with MODEL.DEVICE cpu: in two processes)
  python tools/evaluate_coco.py --config-file output/config.yaml --num-gpus 2 \\
      MODEL.WEIGHTS output/model_final.pth

Writes coco_evaluation.json and coco_evaluation.csv, and as PNG and CSV precision_recall,
f1_over_confidence, confusion_matrix and ap_by_group, beside the results file, or for a checkpoint
to OUTPUT_DIR/inference. For keypoints use tools/train_net.py --eval-only.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_argument("--predictions", metavar="JSON", help="COCO results file")
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotations of its data set")
    parser.add_argument("--config-file", metavar="YAML", help="config of the checkpoint")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all possible")
    parser.add_argument("--reference", action="store_true", help="use pycocotools, which is slower")
    parser.add_argument("--output", metavar="DIR", help="folder for the metrics")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs or processes per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="of the job")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine")
    parser.add_argument("--dist-url", default="auto", help="init URL of torch.distributed")
    add_overrides(parser)
    args = parser.parse_args()
    files = bool(args.predictions) + bool(args.annotations)
    if (files, bool(args.config_file)) not in ((2, False), (0, True)):
        parser.error("give both --predictions and --annotations, or --config-file")
    with exit_on_user_error():
        if files and overrides(args):
            parser.error(f"config overrides need --config-file: {' '.join(overrides(args))}")
        evaluate_config(args) if args.config_file else evaluate_files(args)


def evaluate_files(args: argparse.Namespace) -> None:
    folder = Path(args.output or Path(args.predictions).parent)
    check_reports(folder, args.predictions, args.annotations)
    refuse_overwrite([folder / name for name in FILES], [args.predictions, args.annotations])
    set_up_logging()
    predictions = load_predictions(args.predictions)
    annotations = load_annotations(args.annotations)
    names = {"annotations_name": args.annotations, "predictions_name": args.predictions}
    result = evaluate(annotations, predictions, args.task, reference=args.reference, **names)
    files = {"annotations_file": args.annotations, "predictions_file": args.predictions}
    write_reports(result, folder, **files)
    tables = curve_tables(annotations, predictions, result)
    write_curves(tables, folder, Path(args.annotations).stem)
    print(as_text(result), best_text(tables), sep="\n")
    if any("keypoints" in entry for entry in predictions):
        print(f"note: {KEYPOINTS}")
    print(ending(folder))


def evaluate_config(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, overrides(args))
    extra = (args.task, args.reference, args.output)
    start(evaluate_in_process, cfg, args, Purpose.REPORT, args=extra)
    folder = Path(args.output or Path(cfg.OUTPUT_DIR, "inference"))
    if int(os.environ.get("RANK", args.machine_rank)) == 0:
        names = cfg.DATASETS.TEST
        for name in names if len(names) > 1 else [""]:
            print(ending(folder / name))


def ending(folder: Path) -> str:
    """AP, the files, and the comparison with another run."""
    found = main_metrics(read_run(folder / JSON_NAME, "").metrics)
    compare = ["compare_runs.py", f"this={folder / JSON_NAME}", "other=<run>"]
    files = {"metrics": folder / JSON_NAME, "tables and curves": folder / "*.csv, *.png"}
    return closing(f"evaluated, {found}", files, compare)


if __name__ == "__main__":
    main()
