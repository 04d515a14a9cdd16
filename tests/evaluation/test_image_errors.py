import numpy as np
import pytest
from perturbed import perturbed_predictions
from plain_coco import plain_ap
from small_coco import annotations, prediction

from ws_detectron.evaluation.coco_eval import check_predictions
from ws_detectron.evaluation.image_errors import (
    BOTH,
    CORRECT,
    DUPLICATE,
    ERRORS,
    FOUND,
    IGNORED,
    LOCALIZATION,
    MISSED,
    NOT_FOUND,
    ON_BACKGROUND,
    WRONG_CLASS,
    classify_predictions,
    count_errors,
    draw_errors,
    image_ap,
    match_images,
)

BOX, SECOND = (10, 10, 20, 20), (60, 50, 40, 40)
TRUTH = annotations([(1, 1, BOX), (1, 2, SECOND), (2, 1, BOX)], images=3)
# the right part of BOX, as wide as the name says of 20 pixels: IoU width / 20
NEARLY, POOR, BARELY = (12, 10, 18, 20), (24, 10, 6, 20), (29, 10, 1, 20)
FAR = (80, 60, 20, 20)


def counted(truth: dict, found: list, task: str, threshold: float) -> dict[str, int]:
    return count_errors(match_images(truth, found, task, threshold).values())


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], {MISSED: 1}),
        ([(1, BOX, 0.9)], {CORRECT: 1}),
        ([(1, BOX, 0.9), (1, NEARLY, 0.8)], {CORRECT: 1, DUPLICATE: 1}),
        ([(2, BOX, 0.9)], {WRONG_CLASS: 1}),
        ([(1, POOR, 0.9)], {LOCALIZATION: 1}),
        ([(2, POOR, 0.9)], {BOTH: 1, MISSED: 1}),
        ([(1, FAR, 0.9)], {ON_BACKGROUND: 1, MISSED: 1}),
        ([(1, BARELY, 0.9)], {ON_BACKGROUND: 1, MISSED: 1}),
        ([(1, BOX, 0.4)], {MISSED: 1}),  # below the score threshold
        # the higher score has the object, though the other is nearer to it
        ([(1, NEARLY, 0.9), (1, BOX, 0.8)], {CORRECT: 1, DUPLICATE: 1}),
        # poor localization comes before all else, even where the object is found
        ([(1, BOX, 0.9), (1, POOR, 0.8)], {CORRECT: 1, LOCALIZATION: 1}),
        ([(1, BOX, 0.9), (2, NEARLY, 0.8)], {CORRECT: 1, WRONG_CLASS: 1}),
    ],
)
def test_every_error_type_is_recognized(task: str, found: list, expected: dict) -> None:
    truth = annotations([(1, 1, BOX)], images=1)
    counts = counted(truth, [prediction(1, *entry) for entry in found], task, 0.5)
    assert list(counts) == [CORRECT, *ERRORS]
    assert {name: count for name, count in counts.items() if count} == expected


def test_images_are_kept_apart_and_added_up() -> None:
    truth = annotations([(1, 1, BOX), (2, 1, BOX), (2, 2, FAR)], images=3)
    found = [prediction(n, 1, BOX, 0.9) for n in (1, 2, 3)]
    counts = counted(truth, found, "segm", 0.5)
    assert (counts[CORRECT], counts[MISSED], counts[ON_BACKGROUND]) == (2, 1, 1)


def test_crowds_are_neither_missed_nor_errors() -> None:
    truth = annotations([], crowds=[(1, 1, (0, 0, 60, 60))], images=1)
    assert sum(counted(truth, [prediction(1, 1, BOX, 0.9)], "segm", 0.5).values()) == 0
    other = counted(truth, [prediction(1, 2, BOX, 0.9)], "segm", 0.5)
    assert other[ON_BACKGROUND] == 1


def test_a_prediction_takes_the_free_object_with_the_highest_iou() -> None:
    ious = np.array([[0.6, 0.9], [0.7, 0.8], [0.6, 0.6]])
    types, states = classify_predictions(ious, np.ones((3, 2), bool), np.zeros(3, bool))
    assert types == [CORRECT, CORRECT, DUPLICATE] and states == [FOUND, FOUND]


def test_matches_are_in_the_order_of_the_files() -> None:
    """The second prediction has the higher score and takes the object; the crowd comes second."""
    truth = annotations(
        [(1, 1, BOX), (1, 2, SECOND), (1, 3, FAR)], crowds=[(1, 1, (0, 60, 40, 40))]
    )
    truth["annotations"].insert(1, truth["annotations"].pop())
    found = [
        prediction(1, 1, NEARLY, 0.6),
        prediction(1, 1, BOX, 0.9),
        prediction(1, 2, BOX, 0.4),  # below the threshold
        prediction(1, 2, (60, 50, 40, 12), 0.7),
        prediction(1, 1, (5, 65, 10, 10), 0.8),  # on the crowd
    ]
    matches = match_images(truth, found, "bbox", 0.5)
    assert matches[1].predictions == [DUPLICATE, CORRECT, LOCALIZATION, IGNORED]
    assert matches[1].objects == [FOUND, IGNORED, NOT_FOUND, MISSED]
    assert matches[2] == ([], [])


def test_thresholds_are_met_from_above() -> None:
    same, no_crowd = np.ones((1, 1), bool), np.zeros(1, bool)
    for iou, error_type in ((0.5, CORRECT), (0.4999, LOCALIZATION), (0.1, LOCALIZATION)):
        assert classify_predictions(np.array([[iou]]), same, no_crowd)[0] == [error_type]
    assert classify_predictions(np.array([[0.0999]]), same, no_crowd)[0] == [ON_BACKGROUND]
    assert classify_predictions(np.array([[0.1]]), ~same, no_crowd)[0] == [ON_BACKGROUND]
    assert classify_predictions(np.array([[0.3]]), same, ~no_crowd)[0] == [IGNORED]


def test_made_predictions_have_errors_of_every_type() -> None:
    """The predictions of other tests."""
    boxes = [(n, 1 + n % 3, (10 + n % 50, 10, 20 + n % 30, 30)) for n in range(1, 101)]
    truth = annotations(boxes, crowds=[(1, 1, (60, 60, 30, 30))], images=100)
    found = perturbed_predictions(truth, 0, jitter=0.15)
    assert check_predictions(truth, found) == ("bbox", "segm")
    assert min(counted(truth, found, "segm", 0.0).values()) > 0


def test_at_most_100_predictions_of_an_image_are_taken() -> None:
    truth = annotations([(1, 1, BOX)], images=1)
    found = [prediction(1, 1, FAR, 0.9)] * 100 + [prediction(1, 1, BOX, 0.8)]
    counts = counted(truth, found, "bbox", 0.5)
    assert (counts[ON_BACKGROUND], counts[CORRECT], counts[MISSED]) == (100, 0, 1)


def test_the_chart_shows_every_count() -> None:
    counts = {name: number for number, name in enumerate((CORRECT, *ERRORS), start=1)}
    figure = draw_errors(counts, "title")
    [axes] = figure.axes
    assert [bar.get_width() for bar in axes.patches] == list(counts.values())
    assert [label.get_text() for label in axes.get_yticklabels()] == list(counts)
    assert {text.get_text() for text in axes.texts} == {str(n) for n in counts.values()}
    assert axes.get_xlabel() and figure.get_suptitle() == "title"


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_ap_of_images_worked_out_by_hand(task: str) -> None:
    """Image 1: a false positive of a class it does not show, then both objects; image 2: nothing.

    Precision at recalls 1/2 and 1 is 1/2 and 2/3; from the right, the best is 2/3 everywhere.
    Image 3 has no object, so no AP.
    """
    found = [
        prediction(1, 3, (0, 0, 9, 9), 0.9),
        prediction(1, 1, BOX, 0.8),
        prediction(1, 2, SECOND, 0.7),
        prediction(3, 1, BOX, 0.9),
    ]
    assert image_ap(TRUTH, found, task) == {1: pytest.approx(200 / 3), 2: 0.0}


def test_a_perfect_image_has_100_and_poor_boxes_less() -> None:
    found = [prediction(1, 1, BOX, 0.2), prediction(1, 2, SECOND, 0.3)]
    found.append(prediction(2, 1, (10, 10, 20, 16), 0.9))  # IoU 0.8: seven of ten thresholds
    assert image_ap(TRUTH, found, "bbox") == {1: pytest.approx(100), 2: pytest.approx(70)}


def test_predictions_on_crowds_do_not_count() -> None:
    truth = annotations([(1, 1, BOX)], crowds=[(1, 1, SECOND)], images=1)
    found = [prediction(1, 1, (65, 55, 10, 10), 0.9), prediction(1, 1, BOX, 0.5)]
    assert image_ap(truth, found, "bbox") == {1: pytest.approx(100)}


def test_no_predictions_are_ap_zero() -> None:
    assert image_ap(TRUTH, [], "segm") == {1: 0.0, 2: 0.0}


@pytest.mark.parametrize("seed", range(4))
def test_with_one_class_it_is_the_ap_of_a_plain_reference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    boxes = [[*draw.uniform(0, 60, 2), *draw.uniform(15, 35, 2)] for _ in range(6)]
    truth = annotations([(1, 1, box) for box in boxes], images=1, categories=1)
    found = perturbed_predictions(truth, seed)
    assert image_ap(truth, found, "bbox") == {1: pytest.approx(plain_ap(truth, found)["AP"])}
