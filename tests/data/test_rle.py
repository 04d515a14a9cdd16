import numpy as np
import pytest
from pycocotools import mask as mask_util

from ws_detectron.data.rle import check_masks, problem_of_counts
from ws_detectron.errors import DataError


def encoded(mask: np.ndarray) -> str:
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def random_masks(count: int) -> list[np.ndarray]:
    """From single pixels to checkerboards, so that runs need one to several characters."""
    draw = np.random.default_rng(3)
    masks = []
    for _ in range(count):
        height, width = draw.integers(1, 400, 2)
        mask = draw.random((height, width)) < draw.choice([0.0, 0.001, 0.3, 0.5, 1.0])
        masks.append(np.repeat(mask, 3, axis=0) if draw.random() < 0.5 else mask)
    return masks


def decoded(text: str) -> list[int]:
    """The format read character by character."""
    counts: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            group = ord(text[position]) - 48
            value |= (group & 31) << shift
            more = bool(group & 32)
            position += 1
            shift += 5
            if not more and group & 16:
                value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def test_what_pycocotools_encodes_is_valid() -> None:
    masks = random_masks(60)
    for mask in masks:
        text = encoded(mask)
        assert problem_of_counts(text, mask.size) is None
        assert sum(decoded(text)) == mask.size  # the reading above is right
        problem = str(problem_of_counts(text, mask.size + 1))
        assert f"{mask.size} pixels, not height x width = {mask.size + 1}" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "not a compressed RLE") for text in ("", "1é", "1 2", "12p", "11Q")),
        ("PPPPPPP1", "not a compressed RLE"),  # a number of eight groups
        ("O11", "a run of -1 pixels"),  # O is 31: minus one
        ("b0", "a run of 18 pixels"),
        ("5", "cover 5 pixels"),
    ],
)
def test_each_error_is_named(text: str, message: str) -> None:
    assert message in str(problem_of_counts(text, 12))


def test_random_damage_is_detected_as_by_the_slow_decoder() -> None:
    draw = np.random.default_rng(5)
    for mask in random_masks(60):
        text = list(encoded(mask))
        text[draw.integers(len(text))] = chr(48 + draw.integers(64))
        damaged = "".join(text)
        try:
            runs = decoded(damaged)
            valid = min(runs) >= 0 and sum(runs) == mask.size
        except IndexError:
            valid = False
        assert (problem_of_counts(damaged, mask.size) is None) == valid, damaged


def test_errors_name_file_entry_image_and_problem() -> None:
    good = {"size": [3, 4], "counts": encoded(np.ones((3, 4)))}
    entries = [{"image_id": 7, "segmentation": good} for _ in range(600)]
    check_masks(entries, {7: (3, 4)}, "a.json")
    cases = {
        "counts cover": {"size": [3, 4], "counts": "5"},
        r"size is \[4, 3\]": {"size": [4, 3], "counts": good["counts"]},
        "frPyObjects": {"size": [3, 4], "counts": [0, 12]},
        "must be": "text",
    }
    for message, mask in cases.items():
        broken = [*entries, {"image_id": 7, "segmentation": mask}]
        with pytest.raises(DataError, match=rf"a\.json, entry 600 \(image id 7\).*{message}"):
            check_masks(broken, {7: (3, 4)}, "a.json")
