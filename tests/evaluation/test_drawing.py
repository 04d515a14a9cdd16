from typing import Any

import cv2
import numpy as np
import pytest
from contrast import contrast
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox
from small_coco import HEIGHT, WIDTH, annotations, prediction

from ws_detectron.evaluation import drawing
from ws_detectron.evaluation.drawing import (
    CAPTION_HEIGHT,
    FALSE,
    HEAD_HEIGHT,
    MARGIN,
    MARKS,
    MISSED_OBJECT,
    NOT_EVALUATED,
    PAIR_MARGIN,
    SIDE,
    TRUE,
    Mark,
    class_colour,
    contact_sheet,
    draw_entries,
    place_labels,
)

BOX = (60, 20, 40, 40)
CLASSES = {1: "one", 2: "two", 3: "three"}
IMAGE = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What `draw_entries` draws: labels, masks and their colours, boxes and their marks."""
    calls: dict[str, list] = {"labels": [], "masks": [], "boxes": []}

    def draw_text(self: Visualizer, text: str, *_: Any, **__: Any) -> None:
        calls["labels"].append(text)

    def draw_mask(self: Visualizer, mask: np.ndarray, colour: Any, **_: Any) -> None:
        calls["masks"].append((mask, colour))

    def draw_box(_: Any, box: np.ndarray, mark: Mark, width: float) -> None:
        calls["boxes"].append((box, mark))

    monkeypatch.setattr(Visualizer, "draw_text", draw_text)
    monkeypatch.setattr(Visualizer, "draw_binary_mask", draw_mask)
    monkeypatch.setattr(drawing, "_draw_box", draw_box)
    return calls


def test_annotations_have_classes_masks_and_crowds_the_largest_first(drawn: dict) -> None:
    truth = annotations([(1, 1, (10, 10, 30, 20)), (1, 2, BOX)], crowds=[(1, 1, (80, 70, 30, 25))])
    draw_entries(IMAGE, WIDTH, truth["annotations"], CLASSES)
    assert drawn["labels"] == ["two", "one (crowd)", "one"]
    colours = [class_colour(1), NOT_EVALUATED.colour, class_colour(0)]
    assert [colour for _, colour in drawn["masks"]] == colours
    assert [mark for _, mark in drawn["boxes"]] == [Mark("", colour, "-") for colour in colours]
    np.testing.assert_array_equal(drawn["boxes"][0][0], [60, 20, 100, 60])
    for (mask, _), area in zip(drawn["masks"], (1600, 750, 600)):
        assert mask.shape == (HEIGHT, WIDTH) and mask.sum() == area


def test_predictions_have_classes_scores_and_the_colours_of_annotations(drawn: dict) -> None:
    entries = [
        prediction(1, number, BOX, score) for number, score in ((3, 0.456), (1, 0.9), (9, 1))
    ]
    del entries[0]["bbox"], entries[1]["segmentation"]
    draw_entries(IMAGE, WIDTH, entries, CLASSES)
    assert drawn["labels"] == ["three 46 %", "one 90 %", "class 9 100 %"]
    boxes, marks = zip(*drawn["boxes"])
    assert [mark.colour for mark in marks[:2]] == [class_colour(2), class_colour(0)]
    np.testing.assert_array_equal(boxes, [[60, 20, 100, 60]] * 3)
    assert [mask.sum() for mask, _ in drawn["masks"]] == [1600, 1600]


def test_only_the_object_and_its_label_are_drawn() -> None:
    picture = draw_entries(IMAGE, 2 * WIDTH, [prediction(1, 2, BOX, 0.9)], CLASSES).astype(int)
    changed = np.abs(picture - 90).max(axis=2) > 10
    assert picture.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert changed[60:115, 130:195].all()  # the mask below its label, twice the size
    assert not changed[:, :110].any() and not changed[130:].any()


def test_class_colours_are_bright_and_differ() -> None:
    colours = np.array([class_colour(n) for n in range(10)])
    assert (colours.max(axis=1) == 1).all()
    apart = np.abs(colours[:, None] - colours[None]).max(axis=2) + np.eye(10)
    assert apart.min() > 0.15


@pytest.mark.parametrize(
    ("boxes", "visible"),
    [
        ([(100, 60, 180, 140)] * 6, 6),  # at one place
        ([(-40, -30, 60, 70), (250, 130, 330, 230), (-9, 150, 9, 199), (280, 1, 299, 9)], 4),
        ([(x, y, x + 20, y + 20) for x in (90, 110) for y in (60, 75, 90)], 6),
        # 80 pixels wide and high, labels 73 and 17: above, below, four rows within
        ([(100, 60, 180, 140)] * 40, 6),
    ],
)
def test_labels_are_inside_do_not_overlap_and_stay_at_their_box(boxes: list, visible: int) -> None:
    artist = Visualizer(np.zeros((200, 300, 3), np.uint8))
    for _ in boxes:
        artist.draw_text("cross 68 %", (0, 0), font_size=9, horizontal_alignment="left")
    place_labels(artist.output, np.array(boxes, float))
    renderer = artist.output.canvas.get_renderer()
    placed = [(t, b) for t, b in zip(artist.output.ax.texts, boxes) if t.get_visible()]
    extents = [text.get_window_extent(renderer) for text, _ in placed]
    assert len(extents) == visible
    for number, one in enumerate(extents):
        assert one.x0 >= 0 and one.y0 >= 0 and one.x1 <= 300 and one.y1 <= 200
        assert not one.count_overlaps(extents[number + 1 :])
        x0, y0, x1, y1 = placed[number][1]
        near = Bbox([[x0, 200 - y1], [x1, 200 - y0]]).padded(20)  # y points up
        assert near.count_overlaps([one])


def test_labels_cover_as_little_of_objects_as_they_can() -> None:
    """Above and below the large box are small ones, but not at its lower right corner."""
    boxes = [(60, 60, 200, 160), (60, 40, 100, 58), (150, 30, 210, 58), (60, 162, 120, 180)]
    artist = Visualizer(np.zeros((200, 300, 3), np.uint8))
    for _ in boxes:
        artist.draw_text("cross 68 %", (0, 0), font_size=9, horizontal_alignment="left")
    place_labels(artist.output, np.array(boxes, float))
    renderer = artist.output.canvas.get_renderer()
    for text in artist.output.ax.texts:
        extent = text.get_window_extent(renderer)
        covered = [Bbox([[x0, 200 - y1], [x1, 200 - y0]]) for x0, y0, x1, y1 in boxes[1:]]
        assert text.get_visible() and not extent.count_overlaps(covered)
    assert artist.output.ax.texts[0].get_position()[1] >= 160


def test_labels_are_readable_and_have_the_colour_of_their_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    colours: list[np.ndarray] = []
    monkeypatch.setattr(
        Visualizer, "draw_text", lambda *_, color, **__: colours.append(np.array(to_rgb(color)))
    )
    marks = [Mark("", class_colour(number), "-") for number in range(40)] + [*MARKS]
    for mark in marks:
        drawn_box(IMAGE, WIDTH, mark)
    for mark, colour in zip(marks, colours):
        # WCAG's least contrast of text; detectron2 draws it on black of 80 %, here over white
        assert contrast(colour, "0.2") >= 4.5
        np.testing.assert_array_equal(np.argsort(colour), np.argsort(to_rgb(mark.colour)))


def drawn_box(image: np.ndarray, side: int, mark: Mark) -> np.ndarray:
    """A picture with one box without a label, at 20 to 100 and 20 to 80."""
    entry = {"category_id": 1, "bbox": (20, 20, 80, 60)}
    return draw_entries(image, side, [entry], {1: ""}, [mark])


@pytest.mark.parametrize("background", [0, 128, 255])
def test_marks_differ_by_colour_and_by_how_much_of_the_line_is_drawn(background: int) -> None:
    image = np.full((HEIGHT, WIDTH, 3), background, np.uint8)
    covered = {}
    for mark in MARKS:
        side = drawn_box(image, 480, mark)[80:84, 120:360].astype(int)  # the upper side
        colour = 255 * np.array(to_rgb(mark.colour))
        lit = (np.abs(side - colour).max(axis=2) < 60).any(axis=0)
        covered[mark] = lit.mean()
        assert (side.max(axis=2) < 60).any(), "no dark edge"
    assert covered[TRUE] == 1
    assert 0.85 > covered[FALSE] > 0.55 and 0.75 > covered[MISSED_OBJECT] > 0.35
    assert len({mark.colour for mark in MARKS}) == len(MARKS)


def test_labels_and_lines_grow_with_the_picture() -> None:
    heights, widths = [], []
    for side in (SIDE, 4 * SIDE):
        image = np.full((side, side, 3), 90, np.uint8)
        entry = {"category_id": 1, "bbox": [side // 4, side // 2, side // 2, side // 4]}
        picture = draw_entries(image, side, [entry], CLASSES)
        column = np.abs(picture[:, side // 4 + 4].astype(int) - 90).max(axis=1) > 40
        heights.append(column[: side // 2 - side // 200].sum())  # of the label above the box
        row = np.abs(picture[side * 5 // 8].astype(int) - 90).max(axis=1) > 40
        widths.append(row[: side // 2].sum())
    assert heights[0] >= 12 and heights[1] > 1.8 * heights[0] and widths[1] > 1.8 * widths[0]


def test_a_sheet_has_two_pairs_in_a_row_and_captions_cut_where_too_long() -> None:
    def pair(text: str, height: int) -> tuple:
        return (np.full((height, SIDE, 3), 7, np.uint8), text), (
            np.zeros((50, 60, 3), np.uint8),
            "",
        )

    width, head = 2 * (SIDE + MARGIN) + PAIR_MARGIN, CAPTION_HEIGHT
    whole = contact_sheet([pair("a", 90), pair("W" * 300, 80), pair("\udcff\n$", 70)], "title")
    sheet = whole[HEAD_HEIGHT:]
    assert sheet.shape == (90 + 70 + 2 * (head + MARGIN), 2 * width, 3)
    one = contact_sheet([pair("a", 90)], "title")
    assert one.shape == (HEAD_HEIGHT + 90 + head + MARGIN, width, 3)
    two = contact_sheet([pair("a", 90), pair("b", 90)], "title")
    assert two.shape == (HEAD_HEIGHT + 2 * (90 + head + MARGIN), width, 3)
    for top, left, height in ((0, 0, 90), (0, width, 80), (90 + head + MARGIN, 0, 70)):
        cell = sheet[top:, left:]
        assert (cell[head : head + height, MARGIN : MARGIN + SIDE] == 7).all()
        assert (cell[head : head + 50, SIDE + 2 * MARGIN :][:, :60] == 0).all()
        assert (cell[:head, MARGIN : MARGIN + SIDE] < 128).any()  # a caption
        assert (cell[: head + height, MARGIN + SIDE : SIDE + 2 * MARGIN] == 255).all()
    assert (sheet[90 + head + MARGIN :, width:] == 255).all()
    captions = sheet[:head] < 128
    assert captions[:, width:].sum() > 20 * captions[:, :width].sum()
    lower = sheet[90 + head + MARGIN :][head // 2 : head, : MARGIN + SIDE] < 128
    assert lower.any()  # the second line


def test_a_sheet_says_what_boxes_mean() -> None:
    sheet = contact_sheet([((np.zeros((9, SIDE, 3), np.uint8), "a"),) * 2], "title " * 99)
    head = sheet[:HEAD_HEIGHT].astype(int)
    assert (head[: HEAD_HEIGHT // 2] < 128).any() and (head[:, -2:] == 255).all()
    for mark in MARKS:
        colour = 255 * np.array(to_rgb(mark.colour))
        assert (np.abs(head[HEAD_HEIGHT // 2 :] - colour).max(axis=2) < 30).any()


def test_small_images_are_enlarged_without_smoothing_and_large_ones_scaled_down() -> None:
    image = np.random.default_rng(0).integers(0, 255, (4, 8, 3), np.uint8)
    large = draw_entries(image, 32, [], {})
    np.testing.assert_array_equal(large, image.repeat(4, axis=0).repeat(4, axis=1))
    small = draw_entries(image, 4, [], {})
    np.testing.assert_array_equal(small, cv2.resize(image, (4, 2), interpolation=cv2.INTER_AREA))
