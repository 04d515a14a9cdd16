import numpy as np
from perturbed import Perturbation, perturbed_predictions
from pycocotools import mask as mask_util
from small_coco import annotations

from ws_detectron.evaluation.coco_eval import check_predictions
from ws_detectron.evaluation.image_errors import ERRORS, count_errors

TRUTH = annotations(
    [(n, 1 + n % 3, (10 + n % 50, 10, 20 + n % 30, 30)) for n in range(1, 101)],
    crowds=[(1, 1, (60, 60, 30, 30))],
    images=100,
)


def test_a_seed_fixes_everything() -> None:
    assert perturbed_predictions(TRUTH, 3) == perturbed_predictions(TRUTH, 3)
    assert perturbed_predictions(TRUTH, 3) != perturbed_predictions(TRUTH, 4)


def test_predictions_are_valid_and_of_every_type() -> None:
    found = perturbed_predictions(TRUTH, 0, Perturbation(jitter=0.15))
    assert check_predictions(TRUTH, found) == ("bbox", "segm")
    counts = count_errors(TRUTH, found, "segm", 0.0)
    assert all(counts[kind] > 0 for kind in ERRORS), counts
    scores = [entry["score"] for entry in found]
    assert len(set(scores)) < len(scores) and min(scores) > 0 and max(scores) <= 1


def test_without_errors_predictions_are_the_truth() -> None:
    none = Perturbation(miss=0, duplicate=0, wrong_class=0, jitter=0, background=0)
    found = perturbed_predictions(TRUTH, 0, none)
    objects = TRUTH["annotations"]
    assert len(found) == len(objects) + 1  # two for the crowd
    for entry, annotation in zip(found, objects[:-1]):
        assert entry["category_id"] == annotation["category_id"]
        np.testing.assert_allclose(entry["bbox"], annotation["bbox"])
        assert mask_util.area(entry["segmentation"]) == annotation["area"]
