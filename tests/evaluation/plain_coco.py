"""COCO's box AP in plain Python, after https://cocodataset.org/#detection-eval.

Slow and short. It compares ids with `==` alone, so that ids of any type will do.
"""

from typing import Any

THRESHOLDS = [0.5 + 0.05 * n for n in range(10)]
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def iou(found: list[float], true: list[float], crowd: bool) -> float:
    """Intersection over union; over the area of the prediction where `true` is a crowd."""
    sides = []
    for axis in (0, 1):
        low = max(found[axis], true[axis])
        sides.append(min(found[axis] + found[axis + 2], true[axis] + true[axis + 2]) - low)
    if min(sides) <= 0:
        return 0.0
    shared, own = sides[0] * sides[1], found[2] * found[3]
    return shared / (own if crowd else own + true[2] * true[3] - shared)


def outcomes(
    truth: list[dict], found: list[dict], threshold: float, low: float, high: float
) -> tuple[list[tuple[float, bool]], int]:
    """Of one image and category: (score, hit) of each prediction that counts; number of objects."""
    ignored = [bool(t["iscrowd"]) or not low <= t["area"] <= high for t in truth]
    # a prediction prefers objects that count
    order = sorted(range(len(truth)), key=lambda i: ignored[i])
    taken: set[int] = set()
    counted = []
    for entry in sorted(found, key=lambda e: -e["score"])[:100]:
        best, match = threshold, None
        for i in order:
            if i in taken and not truth[i]["iscrowd"]:
                continue
            if match is not None and not ignored[match] and ignored[i]:
                break
            overlap = iou(entry["bbox"], truth[i]["bbox"], bool(truth[i]["iscrowd"]))
            if overlap >= best:
                best, match = overlap, i
        if match is None:
            area = entry["bbox"][2] * entry["bbox"][3]
            if low <= area <= high:
                counted.append((entry["score"], False))
        else:
            taken.add(match)
            if not ignored[match]:
                counted.append((entry["score"], True))
    return counted, ignored.count(False)


def average_precision(counted: list[tuple[float, bool]], objects: int) -> float:
    """Precision at 101 recalls, each the best at this recall or a higher one."""
    hits, points = 0, []
    for n, (_, hit) in enumerate(sorted(counted, key=lambda c: -c[0]), start=1):
        hits += hit
        points.append((hits / objects, hits / n))
    best = [max((p for r, p in points if r >= n / 100), default=0.0) for n in range(101)]
    return sum(best) / 101


def plain_ap(annotations: dict[str, Any], predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """AP, APs, APm, APl in %; None where there is no object."""
    result = {}
    for name, (low, high) in AREAS.items():
        values = []
        for category in annotations["categories"]:
            for threshold in THRESHOLDS:
                counted, objects = [], 0
                for image in annotations["images"]:
                    groups = [
                        [
                            e
                            for e in entries
                            if e["image_id"] == image["id"] and e["category_id"] == category["id"]
                        ]
                        for entries in (annotations["annotations"], predictions)
                    ]
                    of_image = outcomes(*groups, threshold, low, high)
                    counted += of_image[0]
                    objects += of_image[1]
                if objects:
                    values.append(average_precision(counted, objects))
        result[f"AP{name}"] = 100 * sum(values) / len(values) if values else None
    return result
