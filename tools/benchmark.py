"""Measures what WS and GN cost on this machine, all candidates interleaved."""

import argparse
import inspect
from typing import Any

import torch

from ws_detectron.errors import exit_on_user_error
from ws_detectron.lab.benchmark.detector_step import MODES, VARIANTS
from ws_detectron.lab.benchmark.measurements import (
    GPU,
    MEASUREMENTS,
    measure,
    measure_gpu,
    update_page,
)
from ws_detectron.lab.fashion_mnist.model import VARIANTS as CLASSIFIER_VARIANTS
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing
from ws_detectron.utils.io import check_folder

EXAMPLES = """
examples (on an idle machine; step, variants and inference need COCO in DETECTRON2_DATASETS):
  python tools/benchmark.py gpu --budget 8m
  python tools/benchmark.py step --modes channels_last autocast
  python tools/benchmark.py step --modes compile --variants gn gn_ws --rounds 6 --warmup 1
  python tools/benchmark.py variants --batches 1 2 4 8 16 --device cpu --rounds 4 --warmup 0 \\
      --short-side 160 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64
  python tools/benchmark.py classifier --batches 2 32 128
  python tools/benchmark.py page

Options of each: python tools/benchmark.py WHAT --help. Random weights: speed does not depend on
them, because all variants get the same proposals.
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"choices": ["cpu", "cuda"], "help": "where it runs"},
    "rounds": {"type": int, "help": "timed runs of each"},
    "warmup": {"type": int, "help": "runs that are not timed"},
    "depth": {"type": int, "choices": [50, 101, 152], "help": "of the ResNet"},
    "variants": {"nargs": "+", "choices": VARIANTS, "help": "the first is the baseline"},
    "modes": {"nargs": "+", "choices": MODES, "help": "of running a model"},
    "batches": {"type": int, "nargs": "+", "help": "images per step"},
    "short_side": {"type": int, "help": "pixels; default: 800 on a GPU, 320 on a CPU"},
    "opts": {},
}
CLASSIFIER = {"variants": tuple(CLASSIFIER_VARIANTS), "modes": ("plain", "compile")}
"""What it allows."""


def main() -> None:
    args = vars(build_parser().parse_args())
    what = args.pop("what")
    with exit_on_user_error():
        check_folder(args.get("output", "."))
        if what == "page":
            update_page(**args)
            print(closing("wrote the tables", {"page": args["page"]}))
            return
        for text in measure_gpu(**args) if what == "gpu" else [measure(what, **args)]:
            print(text, flush=True)
    files = {"measurements": args["output"]}
    print(closing(f"measured {what}", files, ["benchmark.py", "page"]))


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, text: str, options: dict[str, Any]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        for option, default in options.items():
            known = {**OPTIONS[option], "default": default}
            if name == "classifier" and option in CLASSIFIER:
                known["choices"] = CLASSIFIER[option]
            if option == "opts":
                add_overrides(command, device=False)
            else:
                command.add_argument(f"--{option.replace('_', '-')}", **known)
        command.add_argument("--output", default="results/benchmark", metavar="DIR", help="folder")
        return command

    for name, function in MEASUREMENTS.items():
        text = (inspect.getdoc(getattr(function, "func", function)) or "").splitlines()[0]
        defaults = {n: p.default for n, p in inspect.signature(function).parameters.items()}
        defaults["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        add(name, text, defaults)
    gpu = add("gpu", f"on a GPU {', '.join(GPU)}, one by one", {"rounds": 20, "warmup": 2})
    gpu.add_argument("--budget", type=duration, help="start nothing after it, such as 8m or 90s")
    text = "write the tables into docs/performance.md"
    page = commands.add_parser("page", help=text, description=text)
    page.add_argument(
        "--results", dest="folder", default="results/benchmark", metavar="DIR", help="read"
    )
    page.add_argument(
        "--output", dest="page", default="docs/performance.md", metavar="MD", help="written"
    )
    return parser


def duration(text: str) -> float:
    """Seconds of "8m" or "90s"."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        return float(text[:-1]) * units[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; allowed: a number and s, m or h, such as 8m"
        ) from None


if __name__ == "__main__":
    main()
