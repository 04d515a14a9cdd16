"""What a data set holds, in a few lines."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ws_detectron.errors import brief

from .scene_dataset import ANNOTATIONS, FINGERPRINT


def describe(content: dict[str, Any]) -> str:
    """Counts of images, objects, masks and classes, several lines of text.

    Args:
        content: of a COCO file, checked; entries with errors are not counted where they lack
            what is counted.
    """
    objects = [a for a in content["annotations"] if not a.get("iscrowd")]
    crowds = len(content["annotations"]) - len(objects)
    masks = Counter(_kind_of_mask(a.get("segmentation")) for a in objects)
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
    named = ", ".join(f"{brief(name)[1:-1]} {count}" for name, count in classes[:20])
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


def _kind_of_mask(mask: Any) -> str:
    return "none" if not mask else "polygons" if isinstance(mask, list) else "RLE"


def summarize(folder: Path) -> str:
    """Counts, sizes and the digest of a set, several lines of text.

    Args:
        folder: a finished set, as `ensure_scenes` returns it.
    """
    data = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
    fingerprint = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
    annotations = data["annotations"]
    per_image = Counter(a["image_id"] for a in annotations)
    per_class = Counter(a["category_id"] for a in annotations)
    sides = np.array([max(a["bbox"][2:]) for a in annotations])
    visible = np.array([a["area"] / a["full_area"] for a in annotations])
    small, middle, large = np.percentile(sides, (5, 50, 95))
    classes = ", ".join(f"{c['name']} {per_class[c['id']]}" for c in data["categories"])
    counts = per_image.values()
    return "\n".join(
        (
            str(folder),
            f"  images    {len(data['images'])}, {sum(fingerprint['files'].values()) / 1e6:.1f} MB",
            f"  objects   {len(annotations)}: {min(counts)} to {max(counts)} per image, "
            f"{len(annotations) / len(data['images']):.2f} on average",
            f"  sides     {small:.0f} / {middle:.0f} / {large:.0f} pixels "
            "(5 % / half / 95 % of the longer sides lie below)",
            f"  visible   {visible.min():.0%} of an object at least, "
            f"{np.mean(visible < 0.95):.0%} of the objects are hidden by more than 5 %",
            f"  classes   {classes}",
            f"  digest    {fingerprint['digest']}",
        )
    )
