"""Measures what WS and GN cost on this machine, all candidates interleaved."""

import argparse
from typing import Any

import torch

from ws_detectron.errors import exit_on_user_error
from ws_detectron.lab.benchmark.benchmark_report import update_page
from ws_detectron.lab.benchmark.detector_step import MODES, VARIANTS
from ws_detectron.lab.benchmark.measurements import GPU, measure, measure_gpu
from ws_detectron.lab.fashion_mnist.model import VARIANTS as CLASSIFIER_VARIANTS

EXAMPLES = """
examples (on an idle machine; step, variants and inference need COCO in DETECTRON2_DATASETS):
  python tools/benchmark.py gpu --budget 8m
  python tools/benchmark.py step --modes channels_last autocast
  python tools/benchmark.py step --modes compile --variants gn gn_ws --rounds 6 --warmup 1
  python tools/benchmark.py variants --batches 1 2 4 8 16 --device cpu --rounds 4 --warmup 0 \\
      --short-side 160 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64
  python tools/benchmark.py classifier --batches 2 32 128
  python tools/benchmark.py coco_eval \\
      --annotations $DETECTRON2_DATASETS/coco/annotations/instances_val2017.json
  python tools/benchmark.py page

Options of each: python tools/benchmark.py WHAT --help. Random weights: speed does not depend on
them, because all variants get the same proposals.
"""

TIMED = "device warmup rounds output"
STEP = f"variants arms modes batches short-side {TIMED} opts"
COMMANDS = {
    "operation": (30, f"depth {TIMED}", "WS over all filters of a ResNet"),
    "group_norm": (30, TIMED, "GN over all features of R-50-FPN, torch's and ours"),
    "step": (10, STEP, "training step of Mask R-CNN: GN, GN+WS, BN"),
    "variants": (10, STEP, "training step with BN, FrozenBN, SyncBN, GN and GN+WS"),
    "inference": (10, f"short-side {TIMED} opts", "inference: GN, GN+WS folded and not"),
    "classifier": (10, f"variants arms modes batches {TIMED}", "an epoch of Fashion-MNIST"),
    "coco_eval": (5, "annotations num-images background seed rounds output", "COCO evaluators"),
    "gpu": (20, "budget warmup rounds output", f"on a GPU {', '.join(GPU)}, one by one"),
}
"""What is measured -> rounds, options, help."""
OF_CLASSIFIER = tuple(CLASSIFIER_VARIANTS), ("plain", "compile")
USUAL = {
    "step": ["gn", "gn_ws", "bn"],
    "variants": ["bn", "frozen_bn", "sync_bn", "gn", "gn_ws"],
    "classifier": ["bn", "gn", "gn_ws"],
}
"""The variants where none are named, the baseline first."""


def main() -> None:
    args = vars(build_parser().parse_args())
    what = args.pop("what")
    if what in USUAL:  # until 0.2 modes are also taken from --variants, where they were in 0.1
        named = args["variants"] or []
        args["modes"] = [name for name in named if name in MODES] or args["modes"]
        args["variants"] = [name for name in named if name not in MODES] or USUAL[what]
    with exit_on_user_error():
        if what == "page":
            update_page(**args)
        elif what == "gpu":
            for text in measure_gpu(**args):
                print(text, flush=True)
        else:
            print(measure(what, **args))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number: Any = {"type": int, "metavar": "N"}
    gpu, default = "cuda" if torch.cuda.is_available() else "cpu", "default: %(default)s"
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (rounds, options, text) in COMMANDS.items():
        aliases = ["arms"] if name == "variants" else []
        command = commands.add_parser(name, help=text, description=text, aliases=aliases)
        command.set_defaults(what=name)  # not the alias
        variants, modes = OF_CLASSIFIER if name == "classifier" else (VARIANTS, MODES)
        several: Any = {"nargs": "+", "action": "extend", "choices": [*variants, *modes]}
        known: dict[str, dict[str, Any]] = {
            "device": {"choices": ["cpu", "cuda"], "default": gpu, "help": default},
            "warmup": {**number, "default": 2, "help": f"runs that are not timed; {default}"},
            "rounds": {**number, "default": rounds, "help": f"timed runs of each; {default}"},
            "output": {"default": "results/benchmark", "metavar": "DIR", "help": default},
            "variants": {**several, "metavar": "VARIANT", "help": ", ".join(variants)},
            "arms": {**several, "dest": "variants", "help": argparse.SUPPRESS},
            "modes": {"nargs": "+", "choices": modes, "default": ["plain"]},
            "batches": {**number, "nargs": "+", "default": [1], "help": "images per step"},
            "short-side": {**number, "help": "pixels; default: 800 on a GPU, 320 on a CPU"},
            "depth": {**number, "choices": [50, 101, 152], "default": 50, "help": default},
            "annotations": {"required": True, "metavar": "JSON", "help": "COCO instances"},
            "num-images": {**number, "default": 5000, "help": default},
            "background": {"type": float, "default": 30, "help": f"per image; {default}"},
            "seed": {**number, "default": 0, "help": default},
            "budget": {"type": duration, "help": "start nothing after it, such as 8m or 90s"},
            "opts": {"nargs": "*", "help": "KEY VALUE overrides of the configs"},
        }  # fmt: skip
        for option in options.split():
            command.add_argument(option if option == "opts" else f"--{option}", **known[option])
    page = commands.add_parser("page", help="write the tables into docs/performance.md")
    page.add_argument("--results", dest="folder", default="results/benchmark", metavar="DIR")
    page.add_argument("--output", dest="page", default="docs/performance.md", metavar="MD")
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
