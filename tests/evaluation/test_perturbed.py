import numpy as np
from perturbed import Perturbation, perturbed_predictions
from pycocotools import mask as mask_util
from small_coco import HEIGHT, WIDTH, annotations

from ws_detectron.data.rle import check_masks
from ws_detectron.evaluation.coco_files import check_ids
from ws_detectron.evaluation.error_types import ERRORS, count_errors

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
    check_ids(found, TRUTH, "p", "a")
    check_masks(found, dict.fromkeys(range(1, 101), (HEIGHT, WIDTH)), "p")
    counts = count_errors(TRUTH, found, "segm", 0.0)
    assert all(counts[kind] > 0 for kind in ERRORS), counts
    scores = [entry["score"] for entry in found]
    assert len(set(scores)) < len(scores) and min(scores) > 0 and max(scores) <= 1


def test_fractions_are_about_the_given_ones() -> None:
    asked = Perturbation(miss=0.5, duplicate=0, wrong_class=0.9, jitter=0, background=0)
    truth = {**TRUTH, "annotations": TRUTH["annotations"][:100]}
    found = perturbed_predictions(truth, 0, asked)
    assert 35 < len(found) < 65
    classes = {a["image_id"]: a["category_id"] for a in truth["annotations"]}
    other = sum(entry["category_id"] != classes[entry["image_id"]] for entry in found)
    # of 0.9 that draw one of three categories anew, a third draws the same
    assert 0.4 < other / len(found) < 0.8


def test_without_errors_predictions_are_the_truth() -> None:
    none = Perturbation(miss=0, duplicate=0, wrong_class=0, jitter=0, background=0)
    found = perturbed_predictions(TRUTH, 0, none)
    objects = TRUTH["annotations"]
    assert len(found) == len(objects) + 1  # two for the crowd
    for entry, annotation in zip(found, objects[:-1]):
        assert entry["category_id"] == annotation["category_id"]
        np.testing.assert_allclose(entry["bbox"], annotation["bbox"])
        assert mask_util.area(entry["segmentation"]) == annotation["area"]
