"""Validates COCO's compressed run-length encoding (RLE) of masks.

pycocotools accepts any string as an RLE and may read beyond its end, so strings are validated
first.

The format (`rleToString` in pycocotools' maskApi.c): a mask is a list of alternating run lengths of
0s and 1s in column-major order; from the fourth on, each is stored as the difference to the one two
before it. A number is written in groups of five bits, least significant first, in two's complement;
a group is the character 48 + bits, plus 32 if more groups follow.
"""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from ws_detectron.errors import DataError

BATCH = 512  # masks checked at once; larger numpy arrays do not fit into the CPU caches


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
    numbers = [n for n, entry in enumerate(predictions) if entry.get("segmentation") is not None]
    for start in range(0, len(numbers), BATCH):
        batch = numbers[start : start + BATCH]
        strings, areas = [], []
        for number in batch:
            entry = predictions[number]
            rle, size = entry["segmentation"], sizes.get(entry["image_id"])
            problem = _shape_problem(rle, size)
            if problem:
                raise DataError(_message(name, number, entry, problem))
            strings.append(rle["counts"])
            areas.append(rle["size"][0] * rle["size"][1])
        found = first_malformed(strings, areas)
        if found is not None:
            number = batch[found[0]]
            raise DataError(_message(name, number, predictions[number], found[1]))


def first_malformed(strings: Sequence[str], areas: Sequence[int]) -> Optional[tuple[int, str]]:
    """Finds the first string that is not a valid RLE of a mask of the given size.

    Args:
        strings: N compressed RLEs.
        areas: N numbers of pixels, height x width.

    Returns:
        Its index and the problem; None if all are valid.
    """
    problems: list[tuple[int, str]] = []
    good = []
    for i, text in enumerate(strings):
        if not text or not text.isascii():
            problems.append((i, "counts are empty" if not text else "counts are not ASCII"))
            break
        good.append(text)
    if not good:
        return problems[0] if problems else None
    lengths = np.array([len(text) for text in good])
    groups = np.frombuffer("".join(good).encode(), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(good)), lengths)
    more = (groups & 32) != 0
    last = np.cumsum(lengths) - 1

    wrong = np.flatnonzero((groups < 0) | (groups >= 64))
    if wrong.size:
        i = int(owner[wrong[0]])
        problems.append((i, f"character {chr(groups[wrong[0]] + 48)!r} in counts"))
    cut = np.flatnonzero(more[last])
    if cut.size:
        problems.append((int(cut[0]), "counts end within a number"))
    if not problems or min(problems)[0] > 0:
        valid = min(problems)[0] if problems else len(good)
        chars = int(lengths[:valid].sum())
        problem = _wrong_runs(groups[:chars], more[:chars], owner[:chars], areas[:valid])
        if problem is not None:
            problems.append(problem)
    return min(problems, default=None)


def _wrong_runs(
    groups: np.ndarray, more: np.ndarray, owner: np.ndarray, areas: Sequence[int]
) -> Optional[tuple[int, str]]:
    """Finds the first mask with a negative run or whose runs do not sum to its area.

    Args:
        groups: (C,) characters minus 48, of all masks concatenated.
        more: (C,) whether another group of the same number follows.
        owner: (C,) index of the mask of each group.
        areas: number of pixels of each mask.
    """
    ends = np.flatnonzero(~more)
    starts = np.concatenate([[0], ends[:-1] + 1])
    position = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    # a valid run has at most seven groups; the cap keeps longer ones from overflowing
    shift = 5 * np.minimum(position, 9)
    runs = np.add.reduceat((groups & 31) << shift, starts)
    runs -= np.where(groups[ends] & 16, np.int64(1) << (shift[ends] + 5), 0)

    mask = owner[ends]
    first = np.searchsorted(mask, np.arange(len(areas)))
    index = np.arange(len(runs)) - first[mask]
    for parity in (0, 1):  # runs[i] += runs[i - 2], i > 2: a cumulative sum over every other run
        chosen = np.flatnonzero((index > 0) & (index % 2 == parity))
        if chosen.size:
            total = np.cumsum(runs[chosen])
            _, begin = np.unique(mask[chosen], return_index=True)
            before = np.where(begin > 0, total[begin - 1], 0)
            runs[chosen] = total - np.repeat(before, np.diff(np.append(begin, len(chosen))))
    found: list[tuple[int, str]] = []
    negative = np.flatnonzero(runs < 0)
    if negative.size:
        found.append((int(mask[negative[0]]), f"a run of {runs[negative[0]]} pixels"))
    pixels = np.add.reduceat(runs, first)
    differ = np.flatnonzero(pixels != np.asarray(areas))
    if differ.size:
        i = int(differ[0])
        found.append((i, f"counts cover {pixels[i]} pixels, not height x width = {areas[i]}"))
    return min(found, key=lambda problem: problem[0], default=None)


def _shape_problem(rle: Any, size: Optional[tuple[int, int]]) -> str:
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
        return (
            "it must be {'size': [height, width], 'counts': <string>}; "
            "pycocotools.mask.frPyObjects converts polygons and lists of counts to it"
        )
    sides = rle.get("size")
    if not isinstance(sides, list) or len(sides) != 2 or set(map(type, sides)) != {int}:
        return f"size must be [height, width] in integers, found {sides!r:.60}"
    if size is not None and sides != [*size]:
        return f"size is {rle.get('size')}, but height and width of the image are {[*size]}"
    return ""


def _message(name: str, number: int, entry: dict[str, Any], problem: str) -> str:
    where = f"entry {number} (image id {entry['image_id']!r:.60})"
    return f"predictions {name}, {where}: malformed RLE: {problem}"
