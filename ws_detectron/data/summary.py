"""What a finished set of scenes holds, in a few lines."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from .scene_dataset import ANNOTATIONS, FINGERPRINT


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
