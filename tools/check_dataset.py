"""Checks a COCO annotation file and its images, and summarizes their content."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Optional

from ws_detectron.data.images import image_findings
from ws_detectron.data.validate import ERROR, FIXED, WARNING, read_json, validate
from ws_detectron.errors import DataError, exit_on_user_error, shown
from ws_detectron.utils.command_line import ToolParser, closing, progress
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
    parser.add_either("input", "COCO annotations (JSON)")
    parser.add_argument("--images", metavar="FOLDER", type=Path, help="folder of the images")
    parser.add_argument(
        "--task", choices=("bbox", "segm"), help="default: segm if any object has a mask"
    )
    parser.add_argument("--output", metavar="JSON", type=Path, help="write a fixed file")
    args = parser.parse_args()
    with exit_on_user_error():
        sys.exit(0 if check(Path(args.input), args.images, args.task, args.output) else 1)


def check(file: Path, folder: Optional[Path], task: Optional[str], output: Optional[Path]) -> bool:
    """Prints the report; returns whether everything can be used."""
    if output:
        refuse_overwrite([output], [file])
        check_folder(output.parent)
    if folder and not folder.is_dir():
        raise DataError(f"--images {folder} is not a folder")
    start = time.perf_counter()
    content = read_json(file, "annotations")
    read = time.perf_counter()
    entries = content.get("annotations") if isinstance(content, dict) else None
    masks = task == "segm" or (
        task is None
        and isinstance(entries, list)
        and any(isinstance(entry, dict) and entry.get("segmentation") for entry in entries)
    )
    result = validate(content, str(file), train=True, masks=masks)
    checked = time.perf_counter()
    findings = list(result.findings)
    if folder:
        images = progress(result.content["images"], "reading headers", "image")
        findings += image_findings(images, folder)
    broken = set(result.broken)
    kept = [a for n, a in enumerate(result.content["annotations"]) if n not in broken]
    times = f"read in {read - start:.1f} s, checked in {checked - read:.1f} s"
    print(f"{file} (ws_detectron {package_version()}; {times})")
    print(describe({**result.content, "annotations": kept}))
    for level, title in ((ERROR, "errors"), (FIXED, "fixed when read"), (WARNING, "warnings")):
        of_level = [finding for finding in findings if finding.level == level]
        print(f"{title}: {sum(f.count for f in of_level) or 'none'}")
        for finding in of_level:
            print(f"  {finding.count:6} {finding}")
    errors = sum(finding.count for finding in findings if finding.level == ERROR)
    verdict = f"{file} cannot be used: {errors} errors" if errors else f"{file} can be used"
    files: dict[str, Path] = {}
    then: Any = "docs/data.md has the config that names it"
    if output:
        fixed = {**result.content, "annotations": kept}
        validate(fixed, str(output), train=True, masks=masks).usable(log=False)
        write_json(output, fixed, indent=None)
        files = {f"{len(kept)} annotations, {len(broken)} removed": output}
    elif broken:
        then = ["check_dataset.py", file, "--output", "fixed.json"]
    elif errors:
        then = "correct them and check again; docs/data.md has the rules"
    print(closing(verdict, files, then))
    return not errors


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
