"""Checks compressed run-length encodings (RLE) of masks before pycocotools reads them.

pycocotools accepts any string as an RLE, and reads and writes beyond its arrays if runs are cut
off, negative or do not cover the mask.

The format (`rleToString` in pycocotools' maskApi.c): a mask is a list of alternating run lengths of
0s and 1s in column-major order; from the fourth on, each is stored as the difference to the one two
before it. A number is written in groups of five bits, least significant first, in two's complement;
a group is the character 48 + bits, plus 32 if more groups follow.
"""

import re
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from ws_detectron.errors import DataError
from ws_detectron.utils.command_line import progress

_NUMBERS = re.compile("(?:[P-o]{0,6}[0-O])+")  # 32-bit integers have at most seven groups


def check_masks(
    predictions: Sequence[dict[str, Any]], sizes: dict[Any, tuple[int, int]], name: str
) -> None:
    """Checks that every predicted mask is a valid RLE of its image's size.

    Args:
        predictions: as returned by `load_predictions`; entries without "segmentation" are skipped.
        sizes: image id -> height and width, pixels.
        name: name of the predictions in error messages.

    Raises:
        DataError: a mask is malformed; names the entry and the problem.
    """
    for number, entry in enumerate(progress(predictions, "checking masks", "prediction")):
        rle = entry.get("segmentation")
        problem = None if rle is None else _problem(rle, sizes.get(entry["image_id"]))
        if problem:
            where = f"entry {number} (image id {entry['image_id']!r:.60})"
            raise DataError(f"predictions {name}, {where}: malformed RLE: {problem}")


def _problem(rle: Any, size: Optional[tuple[int, int]]) -> Optional[str]:
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
        return (
            "it must be {'size': [height, width], 'counts': <string>}; "
            "pycocotools.mask.frPyObjects converts polygons and lists of counts to it"
        )
    sides = rle.get("size")
    if not isinstance(sides, list) or len(sides) != 2 or set(map(type, sides)) != {int}:
        return f"size must be [height, width] in integers, found {sides!r:.60}"
    if size is not None and sides != [*size]:
        return f"size is {sides}, but height and width of the image are {[*size]}"
    return problem_of_counts(rle["counts"], sides[0] * sides[1])


def problem_of_counts(text: str, area: int) -> Optional[str]:
    """Why a text is no compressed RLE of a mask of `area` pixels; None if it is one."""
    if not _NUMBERS.fullmatch(text):
        return f"counts are not a compressed RLE: {text!r:.60}"
    runs = _runs(text)
    impossible = runs[(runs < 0) | (runs > area)]
    if impossible.size:
        return f"a run of {impossible[0]} pixels"
    if runs.sum() != area:
        return f"counts cover {runs.sum()} pixels, not height x width = {area}"
    return None


def _runs(text: str) -> np.ndarray:
    """The run lengths of a string that matches `_NUMBERS`."""
    groups = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(groups < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shift = 5 * (np.arange(len(groups)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((groups & 31) << shift, starts)
    runs -= (groups[ends] & 16) << (shift[ends] + 1)  # the sign is the highest bit
    for first in (1, 2):  # runs[i] += runs[i - 2] for i > 2
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
