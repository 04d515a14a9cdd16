"""Trains the Fashion-MNIST classifier: one normalization, the grid of them, or a quick check."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.lab.fashion_mnist.accuracy_report import write_report
from ws_detectron.lab.fashion_mnist.accuracy_results import read_records
from ws_detectron.lab.fashion_mnist.epoch_progress import BarProgress
from ws_detectron.lab.fashion_mnist.grid import (
    GRID_SEEDS,
    OTHER_SEEDS,
    REPORT_BATCHES,
    grid,
    run_grid,
)
from ws_detectron.lab.fashion_mnist.quick import quick_check
from ws_detectron.lab.fashion_mnist.recipe import SCHEDULES
from ws_detectron.lab.fashion_mnist.training import train
from ws_detectron.lab.fashion_mnist.training_settings import TrainingSettings
from ws_detectron.lab.fashion_mnist.variants import ARMS, ORDERS
from ws_detectron.utils.command_line import refuse_options_without_effect

PLACES = ("data_dir", "output_dir", "device")
SETTINGS = ("epochs", "lr", "schedule", "order", "groups", "images", "amp", "compile")
FORMS = {
    "all": ("arms", "batch_sizes", "seeds", "report", *SETTINGS, *PLACES),
    "quick": PLACES,
    "report_only": ("report", "data_dir", "output_dir"),
    "one": ("arm", "batch_size", "seed", "resume", "overwrite", *SETTINGS, *PLACES),
}
"""What is asked for -> the options that it takes."""

EXAMPLES = """
examples:
  # GN+WS at 2 images per step, the report's 10 epochs; the second goes on where the first stopped
  python tools/train_fashion_mnist.py --arm gn_ws --batch-size 2
  python tools/train_fashion_mnist.py --arm gn_ws --batch-size 2 --resume

  # does it work? GN+WS learns at batch 2, BN does not; exit status 1 otherwise
  python tools/train_fashion_mnist.py --quick

  # every arm at every batch size, and the report; the same again does what is left, and a second
  # process beside it takes a part
  python tools/train_fashion_mnist.py --all
  python tools/train_fashion_mnist.py --all --arms bn gn gn_ws --batch-sizes 32 128 --seeds 0

  # only the report of what is finished
  python tools/train_fashion_mnist.py --report-only

Data: the four official gz files in DATA_DIR or DATA_DIR/FashionMNIST/raw; by default in
$DETECTRON2_DATASETS/FashionMNIST/raw, else they are downloaded.
"""


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    with exit_on_user_error():
        _check_form(parser, args)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.quick:
            problems = quick_check(
                args.output_dir / "quick",
                say=_say,
                progress=_bar,
                data_dir=args.data_dir,
                device=args.device,
            )
        elif args.all or args.report_only:
            problems = _grid(args)
        else:
            problems = []
            _one(args)
    if problems:
        print("failed:", *problems, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def _check_form(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    form = next((name for name in FORMS if getattr(args, name, False)), "one")
    where = "without --all" if form == "one" else f"with --{form.replace('_', '-')}"
    refuse_options_without_effect(parser, args, form, FORMS[form], where)


def _one(args: argparse.Namespace) -> None:
    if args.arm is None or args.batch_size is None:
        raise UserError("say --arm and --batch-size, or one of --all, --quick and --report-only")
    settings = TrainingSettings(args.arm, args.batch_size, seed=args.seed, **_common(args))
    folder = args.output_dir / settings.name
    result = train(
        settings,
        folder,
        data_dir=args.data_dir,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=_bar(settings.name),
        command=_command(),
    )
    _say(
        f"{settings.name}: test accuracy {result['test_accuracy']:.2%} on "
        f"{result['test_images']:,} images, by epoch {result['best_epoch']} (validation "
        f"{result['validation_accuracy']:.2%}); {result['seconds_per_epoch']:.1f} s per epoch\n"
        f"everything is in {folder}"
    )


def _grid(args: argparse.Namespace) -> list[str]:
    problems: list[str] = []
    report = args.report or args.output_dir / "report"
    if not args.report_only:
        cells = grid(args.arms, args.batch_sizes, args.seeds, **_common(args))
        problems = run_grid(
            cells,
            args.output_dir,
            say=_say,
            progress=_bar,
            data_dir=args.data_dir,
            records=read_records(report),
            command=_command(),
        )
    paths = write_report(args.output_dir, report, args.data_dir)
    _say("\n".join(["wrote", *(f"  {path}" for path in paths)]))
    return problems


def _command() -> str:
    return shlex.join(["python", "tools/train_fashion_mnist.py", *sys.argv[1:]])


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (*SETTINGS, "device")}


def _bar(name: str) -> BarProgress:
    return BarProgress(name, _say)


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    usual = TrainingSettings("gn_ws", 2)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="run the grid, then write its report")
    what.add_argument("--quick", action="store_true", help="GN+WS and BN, a part of an epoch")
    what.add_argument("--report-only", action="store_true", help="run nothing")

    one = parser.add_argument_group("one training")
    one.add_argument("--arm", choices=ARMS)
    one.add_argument("--batch-size", type=int, metavar="IMAGES", help="in a step")
    one.add_argument("--seed", type=int, default=usual.seed, help="default: %(default)s")
    one.add_argument("--resume", action="store_true", help="resume a training, if there is one")
    one.add_argument("--overwrite", action="store_true", help="delete one there is; train anew")

    many = parser.add_argument_group("the grid")
    many.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    many.add_argument(
        "--batch-sizes", nargs="+", type=int, default=REPORT_BATCHES, metavar="IMAGES"
    )
    few = "; ".join(f"{' '.join(map(str, seeds))} at batch {b}" for b, seeds in GRID_SEEDS.items())
    many.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help=f"default: {few}, {' '.join(map(str, OTHER_SEEDS))} otherwise",
    )
    many.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="where to; what an earlier report there holds counts as finished; default: "
        "OUTPUT_DIR/report",
    )

    every = parser.add_argument_group("every training")
    every.add_argument("--epochs", type=int, default=usual.epochs, help="default: %(default)s")
    every.add_argument("--lr", type=float, help="highest LR; default: by batch size")
    every.add_argument("--schedule", choices=SCHEDULES, default=usual.schedule)
    every.add_argument(
        "--order", choices=ORDERS, default=usual.order,
        help="conv, ReLU, norm as in the report, or conv, norm, ReLU as in detectors",
    )  # fmt: skip
    every.add_argument("--groups", type=int, default=usual.groups, help="of GN (%(default)s)")
    every.add_argument(
        "--images", type=int, default=usual.images, help="training images (%(default)s)"
    )
    every.add_argument("--data-dir", type=Path, help="default: $DETECTRON2_DATASETS, else a cache")
    every.add_argument(
        "--output-dir",
        type=Path,
        default=Path("output/fashion_mnist"),
        help="holds a folder for each training; default: %(default)s",
    )
    every.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if any")
    every.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    every.add_argument("--compile", action="store_true", help="torch.compile; on a GPU CUDA graphs")
    return parser


if __name__ == "__main__":
    main()
