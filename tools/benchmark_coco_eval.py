"""Measures how much faster COCO evaluation is through faster-coco-eval than through pycocotools."""

import argparse
import os
from pathlib import Path

from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.coco_files import load_annotations
from ws_detectron.lab.benchmark.coco_eval_timing import (
    BACKENDS,
    enlarged,
    measure,
    write_measurement,
)
from ws_detectron.lab.benchmark.perturb import Perturbation, perturbed_predictions
from ws_detectron.utils.environment import environment
from ws_detectron.utils.io import check_folder, refuse_overwrite

EXAMPLES = """
example:
  python tools/benchmark_coco_eval.py \\
      --annotations $DETECTRON2_DATASETS/coco/annotations/instances_val2017.json

The annotations may be those of a few images: they are repeated under new ids. Predictions are made
of them with the errors that detectors make. Run it on an idle machine.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, metavar="JSON", help="COCO instances")
    parser.add_argument("--num-images", type=int, default=5000, help="default: %(default)s")
    parser.add_argument(
        "--background",
        type=float,
        default=30,
        help="mean number of predictions per image that are on no object (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/coco_eval_benchmark", metavar="DIR")
    args = parser.parse_args()
    with exit_on_user_error():
        check_folder(args.output)
        outputs = [Path(args.output, f"benchmark.{ending}") for ending in ("json", "md")]
        refuse_overwrite(outputs, [args.annotations])
        about = environment((*BACKENDS, "numpy"))
        source = load_annotations(args.annotations)
        annotations = enlarged(source, args.num_images)
        perturbation = Perturbation(background=args.background)
        predictions = perturbed_predictions(annotations, args.seed, perturbation)
    about["data"] = (
        f"{args.num_images} images with {len(annotations['annotations'])} objects "
        f"({len(source['images'])} images of {os.path.basename(args.annotations)}, repeated), "
        f"{len(predictions)} predictions made of them, seed {args.seed}"
    )
    about["rounds"] = args.rounds
    print(write_measurement(args.output, about, measure(annotations, predictions, args.rounds)))


if __name__ == "__main__":
    main()
