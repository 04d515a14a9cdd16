import numpy as np
import pytest
from perturbed import perturbed_predictions
from small_coco import annotations, prediction

from ws_detectron.evaluation.image_ap import image_ap

FIRST, SECOND = (10, 10, 20, 20), (60, 50, 40, 40)
TRUTH = annotations([(1, 1, FIRST), (1, 2, SECOND), (2, 1, FIRST)], images=3)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_ap_of_images_worked_out_by_hand(task: str) -> None:
    """Image 1: a false positive of a class it does not show, then both objects; image 2: nothing.

    Precision at recalls 1/2 and 1 is 1/2 and 2/3; from the right, the best is 2/3 everywhere.
    Image 3 has no object, so no AP.
    """
    found = [
        prediction(1, 3, (0, 0, 9, 9), 0.9),
        prediction(1, 1, FIRST, 0.8),
        prediction(1, 2, SECOND, 0.7),
        prediction(3, 1, FIRST, 0.9),
    ]
    assert image_ap(TRUTH, found, task) == {1: pytest.approx(200 / 3), 2: 0.0}


def test_a_perfect_image_has_100_and_poor_boxes_less() -> None:
    found = [prediction(1, 1, FIRST, 0.2), prediction(1, 2, SECOND, 0.3)]
    found.append(prediction(2, 1, (10, 10, 20, 16), 0.9))  # IoU 0.8: seven of ten thresholds
    assert image_ap(TRUTH, found, "bbox") == {1: pytest.approx(100), 2: pytest.approx(70)}


def test_predictions_on_crowds_do_not_count() -> None:
    truth = annotations([(1, 1, FIRST)], crowds=[(1, 1, SECOND)], images=1)
    found = [prediction(1, 1, (65, 55, 10, 10), 0.9), prediction(1, 1, FIRST, 0.5)]
    assert image_ap(truth, found, "bbox") == {1: pytest.approx(100)}


def test_no_predictions_are_ap_zero() -> None:
    assert image_ap(TRUTH, [], "segm") == {1: 0.0, 2: 0.0}


def naive_ap(objects: list[dict], found: list[dict]) -> float:
    """One class, boxes, no crowds: matched one by one, precision read recall by recall."""

    def iou(a: list[float], b: list[float]) -> float:
        wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        both = max(wide, 0) * max(high, 0)
        return both / (a[2] * a[3] + b[2] * b[3] - both)

    total = 0.0
    for threshold in np.arange(0.5, 0.96, 0.05):
        left = list(objects)
        hits, points = 0, []
        for rank, entry in enumerate(sorted(found, key=lambda e: -e["score"]), start=1):
            best = max(left, key=lambda o: iou(entry["bbox"], o["bbox"]), default=None)
            if best is not None and iou(entry["bbox"], best["bbox"]) >= threshold - 1e-12:
                left.remove(best)
                hits += 1
            points.append((hits / len(objects), hits / rank))
        for recall in np.linspace(0, 1, 101):
            total += max((p for r, p in points if r >= recall), default=0.0) / 101
    return 10 * total


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_a_slow_loop(seed: int) -> None:
    draw = np.random.default_rng(seed)
    boxes = [[*draw.uniform(0, 60, 2), *draw.uniform(15, 35, 2)] for _ in range(6)]
    truth = annotations([(1, 1, box) for box in boxes], images=1, categories=1)
    found = perturbed_predictions(truth, seed)
    expected = naive_ap(truth["annotations"], found)
    assert image_ap(truth, found, "bbox") == {1: pytest.approx(expected)}
