"""Measures what WS and GN cost, everything interleaved, on this machine."""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.lab.benchmark.benchmark_report import update_readme, write_measurement
from ws_detectron.lab.benchmark.classifier import measure_classifier
from ws_detectron.lab.benchmark.detector_step import (
    ARMS,
    SPLIT,
    VARIANTS,
    measure_inference,
    measure_steps,
)
from ws_detectron.lab.benchmark.operation import measure_group_norm, measure_operation
from ws_detectron.lab.fashion_mnist.training_settings import VARIANTS as CLASSIFIER_ARMS
from ws_detectron.utils.command_line import refuse_options_without_effect
from ws_detectron.utils.environment import environment

PACKAGES = ("torch", "torchvision", "detectron2", "triton", "numpy", "timm", "mmcv-lite")
TIMING = ("device", "rounds", "warmup", "output")
STEPS = (*TIMING, "short_side", "batches", "variants", "arms", "opts")
OPTIONS = {
    "operation": (*TIMING, "depth"),
    "group_norm": TIMING,
    "step": STEPS,
    "inference": (*TIMING, "short_side", "opts"),
    "arms": STEPS,
    "classifier": (*TIMING, "batches", "variants", "arms", "keras_python"),
    "gpu": ("rounds", "warmup", "output", "budget"),
    "readme": ("output",),
}
"""What is measured -> the options that it takes."""
SPLIT_ARMS = tuple(f"{arm}{SPLIT}" for arm in ("gn", "gn_ws"))
GPU = ("group_norm", "step", "operation", "inference")
"""What `gpu` measures, the most wanted first."""

EXAMPLES = """
examples (on an idle machine; step, inference and arms need COCO in DETECTRON2_DATASETS):
  python tools/benchmark.py gpu --budget 8m
  python tools/benchmark.py operation
  python tools/benchmark.py step
  python tools/benchmark.py step --variants channels_last autocast
  python tools/benchmark.py step --variants compile --rounds 6 --warmup 1
  python tools/benchmark.py inference --device cuda
  python tools/benchmark.py arms --batches 1 2 4 8 16 --device cuda
  python tools/benchmark.py arms --batches 1 2 4 8 16 --device cpu --rounds 4 --warmup 0 \\
      --short-side 160 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64
  python tools/benchmark.py classifier --batches 2 32 128 --keras-python keras-venv/bin/python
  python tools/benchmark.py readme

Packages timm and mmcv-lite are measured where they are installed. Random weights: speed does not
depend on them, because every arm gets the same proposals.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", metavar="WHAT",
        choices=OPTIONS,
        help="operation, step (BN, GN, GN+WS), inference (GN, GN+WS folded and not), arms (five, "
        "by batch), group_norm (torch's and ours), classifier (of Fashion-MNIST), gpu "
        f"({', '.join(GPU)}, one after the other), or readme (write the tables into README.md)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=None, help="default: a GPU if any"
    )
    parser.add_argument("--rounds", type=int, default=None, help="timed runs of each candidate")
    parser.add_argument("--warmup", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--short-side", type=int, default=None, help="pixels; default: 800 on a GPU, 320 on a CPU"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1], metavar="IMAGES")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["plain"], metavar="VARIANT",
        help=", ".join(VARIANTS),
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", default=None, metavar="ARM",
        help=f"of the detector: {', '.join(ARMS)}; of the classifier: {', '.join(CLASSIFIER_ARMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--depth", type=int, choices=[50, 101, 152], default=50, help="of the ResNet, for operation"
    )
    parser.add_argument(
        "--keras-python", metavar="PYTHON",
        help="for classifier: an interpreter that has tensorflow-cpu",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=duration, default=None, metavar="TIME",
        help="for gpu: begin nothing after this time, such as 8m or 90s",
    )  # fmt: skip
    parser.add_argument("--output", default="results/benchmark", metavar="DIR")
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the configs")
    args = parser.parse_intermixed_args()  # KEY VALUE may stand behind options
    with exit_on_user_error():
        check(parser, args)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        args.short_side = args.short_side or (800 if args.device == "cuda" else 320)
        if args.what == "readme":
            update_readme("README.md", args.output)
            return
        if args.what == "gpu":
            measure_gpu(args)
        else:
            print(measure(args.what, args))


def duration(text: str) -> float:
    """Seconds of "8m" or "90s"."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        return float(text[:-1]) * units[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; allowed: a number and s, m or h, such as 8m"
        ) from None


def measure_gpu(args: argparse.Namespace) -> None:
    """All of `GPU`, each saved as it is finished, as long as the budget lasts."""
    if not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA device, and torch sees none; see `operation` and `step`")
    begin = time.monotonic()
    args.rounds = args.rounds or 20
    args.arms = ["gn", "gn_ws", "bn", *SPLIT_ARMS]
    for what in GPU:
        spent = time.monotonic() - begin
        if args.budget is not None and spent > args.budget:
            print(f"{what} is left out: {spent:.0f} s of {args.budget:.0f} s are spent")
            continue
        print(measure(what, args), flush=True)


def measure(what: str, args: argparse.Namespace) -> str:
    """Measures, saves, and returns the tables."""
    about = {
        **environment(PACKAGES),
        "threads": torch.get_num_threads(),
        "seed": 0,
        "command": f"python tools/benchmark.py {shlex.join(sys.argv[1:])}",
    }
    name = f"{args.device}_{what}"
    if args.variants != ["plain"]:
        name += "_variants" if len(args.variants) > 1 else f"_{args.variants[0]}"
    if what in ("operation", "group_norm"):
        rounds = args.rounds or 30
        if what == "operation":
            figures = measure_operation(args.device, rounds, args.warmup, args.depth)
        else:
            figures = measure_group_norm(args.device, rounds, args.warmup)
        return write_measurement(args.output, name, about, {"kind": what, **figures})
    kind = "classifier" if what == "classifier" else "detector"
    parts = []
    for part in measured_parts(what, args):
        # after each part, as the next may take long, or be stopped
        parts.append(part)
        text = write_measurement(args.output, name, about, {"kind": kind, "parts": parts})
    return text


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options and values that what is measured does not take."""
    taken = OPTIONS[args.what]
    refuse_options_without_effect(parser, args, "what", taken, f"with {args.what}")
    classifier = args.what == "classifier"
    for option, values, allowed in (
        ("arms", args.arms or (), CLASSIFIER_ARMS if classifier else (*ARMS, *SPLIT_ARMS)),
        ("variants", args.variants, ("plain", "compile") if classifier else VARIANTS),
    ):
        for value in values:
            if value not in allowed:
                raise UserError(
                    f"--{option} of {args.what}: {value} is none; allowed: {', '.join(allowed)}"
                )


def measured_parts(what: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The parts of all measurements but that of the operation, one by one as they are made."""
    rounds = args.rounds or 10
    if what == "classifier":
        for batch_size in args.batches:
            yield measure_classifier(
                args.arms or ["bn", "gn", "gn_ws"], batch_size, args.device, rounds, args.warmup,
                compiled="compile" in args.variants, keras_python=args.keras_python,
            )  # fmt: skip
        return
    if what == "inference":
        part = measure_inference(args.device, args.short_side, rounds, args.warmup, args.opts)
        yield {"what": "inference", **part}
        return
    arms = args.arms or (list(ARMS) if what == "arms" else ["gn", "gn_ws", "bn"])
    for images, variant in itertools.product(args.batches, args.variants):
        part = measure_steps(
            arms, args.device, images, args.short_side, rounds, args.warmup, variant, args.opts
        )
        yield {"what": "training step", **part}


if __name__ == "__main__":
    main()
