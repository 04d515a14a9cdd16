"""Checks a COCO annotation file and its images, and summarizes their content."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ws_detectron.data.images import image_findings
from ws_detectron.data.validate import ERROR, FIXED, WARNING, read_json, validate
from ws_detectron.errors import DataError, exit_on_user_error, shown
from ws_detectron.utils.command_line import ToolParser, add_input, closing, progress
from ws_detectron.utils.environment import package_version
from ws_detectron.utils.io import check_folder, refuse_overwrite, write_json

EXAMPLES = """
examples:
  # only the file; also its images, of which only the headers are read
  python tools/check_dataset.py instances.json
  python tools/check_dataset.py instances.json --images photos

  # only boxes, ignoring masks
  python tools/check_dataset.py instances.json --task bbox

  # write a fixed file, without the annotations that cannot be fixed
  python tools/check_dataset.py instances.json --output fixed.json

Exit status 1 if the file or an image cannot be used. The rules are in docs/data.md; every tool
applies them before it starts.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    add_input(parser, "COCO annotations (JSON)")
    parser.add_argument("--images", metavar="FOLDER", type=Path, help="folder of the images")
    parser.add_argument(
        "--task", choices=("bbox", "segm"), help="default: segm if any object has a mask"
    )
    parser.add_argument("--output", metavar="JSON", type=Path, help="write a fixed file")
    args = parser.parse_intermixed_args()
    if not args.input:
        parser.error("name the file to check")
    args.file = Path(args.input)
    with exit_on_user_error():
        usable = check(args)
    sys.exit(0 if usable else 1)


def check(args: argparse.Namespace) -> bool:
    """Prints the report; returns whether everything can be used."""
    if args.output:
        refuse_overwrite([args.output], [args.file])
        check_folder(args.output.parent)
    if args.images and not args.images.is_dir():
        raise DataError(f"--images {args.images} is not a folder")
    start = time.perf_counter()
    content = read_json(args.file, "annotations")
    read = time.perf_counter()
    entries = content.get("annotations") if isinstance(content, dict) else None
    masks = args.task == "segm" or (
        args.task is None
        and isinstance(entries, list)
        and any(isinstance(entry, dict) and entry.get("segmentation") for entry in entries)
    )
    result = validate(content, str(args.file), train=True, masks=masks)
    checked = time.perf_counter()
    findings = list(result.findings)
    if args.images:
        images = progress(result.content["images"], "reading headers", "image")
        findings += image_findings(images, args.images)
    broken = set(result.broken)
    kept = [a for n, a in enumerate(result.content["annotations"]) if n not in broken]
    print(
        f"{args.file} (ws_detectron {package_version()}; read in {read - start:.1f} s, checked in "
        f"{checked - read:.1f} s)"
    )
    print(describe({**result.content, "annotations": kept}))
    for level, title in ((ERROR, "errors"), (FIXED, "fixed when read"), (WARNING, "warnings")):
        of_level = [finding for finding in findings if finding.level == level]
        print(f"{title}: {sum(f.count for f in of_level) or 'none'}")
        for finding in of_level:
            print(f"  {finding.count:6} {finding}")
    if args.output:
        fixed = {**result.content, "annotations": kept}
        validate(fixed, str(args.output), train=True, masks=masks).usable(log=False)
        write_json(args.output, fixed, indent=None)
        print(f"{args.output}: {len(kept)} annotations, {len(broken)} removed")
    usable = not any(finding.level == ERROR for finding in findings)
    if usable or args.output:
        file = args.file if usable else args.output
        print(closing(f"{file} can be used; docs/data.md has the config that names it"))
    return usable


def describe(content: dict[str, Any]) -> str:
    """The numbers of images, objects, masks and classes, as several lines of text.

    Args:
        content: of a validated COCO file, without broken annotations.
    """
    objects = [a for a in content["annotations"] if not a.get("iscrowd")]
    crowds = len(content["annotations"]) - len(objects)
    masks = Counter(_mask_type(a.get("segmentation")) for a in objects)
    per_class = Counter(a["category_id"] for a in objects)
    used = {a["image_id"] for a in objects}
    # COCO's limits, https://cocodataset.org/#detection-eval
    sizes = Counter(
        "small" if a["area"] < 32**2 else "medium" if a["area"] < 96**2 else "large"
        for a in objects
    )
    classes = [
        (c.get("name", c["id"]), per_class[c["id"]])
        for c in sorted(content["categories"], key=lambda c: -per_class[c["id"]])
    ]
    named = ", ".join(f"{shown(name, 60)} {count}" for name, count in classes[:20])
    return "\n".join(
        (
            f"  images    {len(content['images'])}, {len(content['images']) - len(used)} of them "
            "without an object",
            f"  objects   {len(objects)}, and {crowds} crowds",
            "  areas     " + ", ".join(f"{n} {sizes[n]}" for n in ("small", "medium", "large")),
            "  masks     " + (", ".join(f"{n} {c}" for n, c in masks.most_common()) or "none"),
            f"  classes   {len(classes)}: {named}{', ...' if len(classes) > 20 else ''}",
        )
    )


def _mask_type(mask: Any) -> str:
    return "none" if not mask else "polygons" if isinstance(mask, list) else "RLE"


if __name__ == "__main__":
    main()
