"""Compares our models with those of mmdetection, the WS authors, torchvision and timm.

Both get the same weights, through the converter, and the same COCO images; every layer and the
final detections must agree. The exit status is 1 if they do not.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from ws_detectron.errors import UserError, exit_on_user_error

EXAMPLES = """examples:
  # once: a virtual environment with mmdetection (6 GB, from the package index)
  python tools/check_parity.py --make-environment parity-venv

  # the comparison, with DETECTRON2_DATASETS naming the folder that holds coco/
  parity-venv/bin/python tools/check_parity.py --output results/parity
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--make-environment", metavar="DIR", type=Path, help="create the virtual environment"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("results/parity"),
        help="folder of the report (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=3, help="number of COCO val2017 images")
    parser.add_argument("--short-side", type=int, default=256, help="image size in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.make_environment:
        from parity.environment import make_environment

        print(f"done; now run {make_environment(args.make_environment)} {sys.argv[0]}")
        return
    try:
        import mmdet  # noqa: F401
    except ImportError:
        raise UserError("mmdetection is not installed; see --make-environment in --help") from None
    from parity.detectors import CONFIGS, compare_detector
    from parity.images import load_images, resizing_difference
    from parity.report import all_hold, write_report
    from parity.resnets import CASES, compare_resnet

    images = load_images(args.images, args.short_side)
    results = {}
    for names, compare in ((CONFIGS, compare_detector), (CASES, compare_resnet)):
        for name in (n for n in names if args.only in n):
            with tempfile.TemporaryDirectory() as folder:
                results[name] = compare(name, images, args.seed, Path(folder))
            print(name, "agrees" if all_hold({name: results[name]}) else "DIFFERS", flush=True)
    settings = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "images": args.images,
        "short_side": args.short_side,
        "resizing": resizing_difference(50),
    }
    write_report(results, settings, args.output)
    print(f"wrote {args.output}/README.md")
    sys.exit(0 if all_hold(results) else 1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
