"""Trains and evaluates a small GN+WS Mask R-CNN on drawn shapes, and draws its predictions.

Needs no download and no GPU; takes some minutes on two cores.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Optional

from detectron2.utils.events import get_event_storage
from tqdm import tqdm

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import load_config, run
from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.coco_eval import load_predictions
from ws_detectron.evaluation.runs import main_metrics, read_run
from ws_detectron.evaluation.visualize import visualize_dataset
from ws_detectron.model_zoo import get_config_file
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides

CONFIG = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
BN = "quickstart/mask_rcnn_R_18_FPN_shapes_bn_1img.yaml"
EXAMPLES = r"""
examples:
  python tools/quickstart.py
  python tools/quickstart.py --output /tmp/first_run \
      SOLVER.MAX_ITER 300 TEST.EXPECTED_RESULTS "[]"
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    default = get_config_file(CONFIG)
    parser.add_argument("--config-file", default=default, help=f"default: {CONFIG}")
    parser.add_argument("--output", default="output/quickstart", help="folder")
    parser.add_argument("--resume", action="store_true", help="resume the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="delete that run and train again")
    add_overrides(parser)
    args = parser.parse_args()
    args.eval_only = False
    with exit_on_user_error():
        cfg = load_config(args.config_file, [*overrides(args), "OUTPUT_DIR", args.output])
        output = Path(args.output)
        status = 0
        try:
            with Progress(cfg.SOLVER.MAX_ITER).instead_of_the_log():
                run(cfg, args)
        except SystemExit as end:  # misses TEST.EXPECTED_RESULTS; pictures may show why
            status = int(end.code or 0)
        print("drawing what it found beside the truth")
        predictions = output / "inference" / "coco_instances_results.json"
        pictures = output / "pictures"
        visualize_dataset(cfg.DATASETS.TEST[0], load_predictions(predictions), pictures)
    print(summary(output, pictures))
    if status:
        expected = f"(task, metric, value, tolerance): {cfg.TEST.EXPECTED_RESULTS}"
        print(f"error: expected {expected}", file=sys.stderr)
        sys.exit(status)


class Progress(logging.Handler):
    """Says on the screen what a training does, while its log goes to log.txt alone.

    Args:
        steps: SOLVER.MAX_ITER.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(logging.INFO)
        self._steps = steps
        self._screen = sys.stdout
        self._bar: Optional[tqdm] = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("ws_detectron.lab.scenes"):
            self._say(record.getMessage())
        elif record.name == "detectron2.engine.train_loop" and record.levelno == logging.INFO:
            self._say("training a Mask R-CNN with GN and WS to find shapes, from random weights")
            self._bar = tqdm(
                total=self._steps,
                file=self._screen,
                bar_format="  {percentage:3.0f} % |{bar:30}| {remaining} left, {desc}",
                mininterval=5,
            )
        elif record.name == "detectron2.utils.events" and self._bar is not None:
            storage = get_event_storage()
            loss = storage.history("total_loss").median(20)
            self._bar.set_description_str(f"loss {loss:.2f} (falls as it learns)", refresh=False)
            self._bar.update(storage.iter + 1 - self._bar.n)
        elif record.name == "detectron2.evaluation.evaluator" and "Start" in record.getMessage():
            self._say("testing it on pictures that it has not seen")
        elif record.levelno >= logging.WARNING:
            self._say(record.getMessage())

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        print(text, file=self._screen, flush=True)

    @contextmanager
    def instead_of_the_log(self) -> Iterator[None]:
        """Within it, loggers that detectron2 sets up write to files, and this on the screen."""
        loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "ws_detectron")]
        for logger in loggers:
            logger.addHandler(self)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            try:
                yield
            finally:
                for logger in loggers:
                    logger.handlers.clear()  # also those that write to `nowhere`


def summary(output: Path, pictures: Path) -> str:
    """Final AP, the paths of all outputs, and what to do next."""
    rows = map(main_metrics, reversed(read_run(output, "").rows))
    config, weights = output / "config.yaml", output / "model_final.pth"
    files = {
        "predictions beside ground truth": f"{pictures / 'first.png'} (and best.png, worst.png)",
        **{"weights": weights, "config": config, "log": output / "log.txt"},
        "losses and AP": f"{output / 'metrics.json'} (or: tensorboard --logdir {output})",
    }
    mine = ["--output", output / "mine", "--input", "<pictures>", "--opts"]
    train, one_image = ["train_net.py", "--config-file"], ["SOLVER.IMS_PER_BATCH", 1]
    return closing(
        f"\nGN+WS Mask R-CNN on the val scenes: {next(filter(None, rows))}",
        files,
        "# draw what it finds in pictures of yours with such shapes, files or a folder",
        ["visualize.py", "--config-file", config, *mine, "MODEL.WEIGHTS", weights],
        "# see what BN makes of one image per step, and GN+WS beside it (each takes longer)",
        [*train, BN, "OUTPUT_DIR", "output/bn"],
        [*train, CONFIG, "OUTPUT_DIR", "output/gn_ws", *one_image, "TEST.EXPECTED_RESULTS", "[]"],
        ["compare_runs.py", "output/bn", "output/gn_ws", "--output", "output/comparison"],
        "# train on your own data: docs/data.md",
    )


if __name__ == "__main__":
    main()
