"""Validates COCO annotation files, by the same rules in every tool and before training.

Format: https://cocodataset.org/#format-data. The libraries that read such a file do not validate
it: a NaN in a polygon exhausts the memory, similar ids share their objects, and a box stored as
corners trains a model on wrong boxes.
"""

import gc
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from pycocotools import mask as mask_util

from ws_detectron.errors import DataError

from .rle import first_malformed

logger = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")
NAMED_AT_MOST = 3  # entries per finding
# Coordinates may exceed the image by this many times its longer side, as in crops of larger images.
# The time and memory that pycocotools needs grow with the length of a polygon in pixels.
REACH = 2
LONGEST_SIDE = 200_000  # pixels

ERROR, FIXED, WARNING = "error", "fixed", "warning"


@dataclass
class Finding:
    """A problem and the entries of a file that have it.

    Attributes:
        level: ERROR (the file cannot be used), FIXED (as described by `what`) or WARNING.
        what: the problem, what is allowed, and the remedy.
        count: number of entries with it.
        examples: the first of these entries.
    """

    level: str
    what: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.examples:
            return self.what
        more = self.count - len(self.examples)
        return f"{self.what}: {'; '.join(self.examples)}" + (f"; and {more} more" if more else "")


class Findings(dict[tuple[str, str], Finding]):
    """(level, what) -> finding, in order of discovery."""

    def add(self, level: str, what: str, where: str = "", value: Any = ...) -> None:
        """Adds an entry to a finding; `value`, read from the file, is escaped and shortened."""
        finding = self.setdefault((level, what), Finding(level, what))
        finding.count += 1
        if where and len(finding.examples) < NAMED_AT_MOST:
            finding.examples.append(where if value is ... else f"{where} has {value!r:.60}")


@dataclass
class Validated:
    """The fixed content of a file and all findings.

    Attributes:
        name: name of the file in messages.
        content: with fixes applied; entries without a finding are the objects of the input.
        findings: errors first.
        broken: indices of annotations with an error.
    """

    name: str
    content: dict[str, Any]
    findings: list[Finding]
    broken: list[int]

    def of(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def usable(self, log: bool = True) -> dict[str, Any]:
        """The content; logs fixes and warnings.

        Raises:
            DataError: the file has errors; lists them.
        """
        errors = self.of(ERROR)
        if len(errors) == 1:
            raise DataError(f"annotations {self.name}: {errors[0]}")
        if errors:
            listed = "".join(f"\n  - {error}" for error in errors)
            raise DataError(f"annotations {self.name}:{listed}")
        for finding in self.findings if log else ():
            logger.warning("annotations %s: %s", self.name, finding)
        return self.content


def read_json(path: Union[str, Path], what: str) -> Any:
    """Reads a JSON file in UTF-8, UTF-16 or UTF-32.

    Args:
        path: the file.
        what: what the file holds, for error messages, such as "annotations".

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no {what} file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}") from error
    try:
        with no_garbage_collection():
            return json.loads(raw)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} {path} are not JSON in UTF-8: byte {error.start} is "
            f"{raw[error.start : error.start + 1]!r}; save the file as UTF-8"
        ) from error
    except RecursionError as error:
        raise DataError(f"{what} {path} are not JSON: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{what} {path} are not JSON: {error}") from error


def validate(
    content: Any,
    name: str,
    *,
    load: bool = False,
    train: bool = False,
    masks: bool = False,
    mask_format: str = "",
    require_annotations: bool = True,
) -> Validated:
    """Checks a file's content by the rules of docs/data.md.

    Args:
        content: as returned by `read_json`; not changed.
        name: name of the file in messages.
        load: detectron2 loads the file: images need file names and sizes, categories need names.
        train: a model is trained on it: at least one object must remain.
        masks: every object needs a mask.
        mask_format: "polygon" if RLE masks are not allowed (INPUT.MASK_FORMAT).
        require_annotations: the list of annotations, which AP needs, must be there.

    Raises:
        DataError: a list of the COCO format is missing.
    """
    lists = _lists(content, name, require_annotations)
    with no_garbage_collection():
        return _Validator(lists, name, load or train, train, masks, mask_format).run()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disables garbage collection, which is slow with millions of objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def missing_images(images: Sequence[dict[str, Any]], folder: Union[str, Path]) -> list[str]:
    """File names of images that are not in a folder; lists each folder only once."""
    present: dict[str, set[str]] = {}
    missing = []
    for image in images:
        path, base = os.path.split(os.path.join(folder, image["file_name"]))
        if path not in present:
            try:
                present[path] = set(os.listdir(path))
            except OSError:
                present[path] = set()
        if base not in present[path]:
            missing.append(image["file_name"])
    return missing


def as_rle(mask: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Converts a validated mask, polygons or RLE, to compressed RLE."""
    if isinstance(mask, list):
        return mask_util.merge(mask_util.frPyObjects(mask, *size))
    return mask_util.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask


def _lists(content: Any, name: str, require_annotations: bool) -> dict[str, Any]:
    needed = [key for key in LISTS if require_annotations or key != "annotations"]
    lists = content if isinstance(content, dict) else {}
    missing = [key for key in needed if not isinstance(lists.get(key), list)]
    if missing == ["annotations"] and "annotations" not in lists:
        raise DataError(
            f"annotations {name} have no list `annotations`, like the files of test-dev; AP needs "
            "ground truth"
        )
    if missing:
        hint = "; it is a list, like results files: are --annotations and --predictions swapped?"
        raise DataError(
            f"annotations {name} are not in COCO format: the lists {', '.join(missing)} are "
            f"missing{hint if isinstance(content, list) else ''}"
        )
    return lists if "annotations" in lists else {**lists, "annotations": []}


def finite(value: Any) -> Optional[float]:
    """The value if it is a finite int or float (not bool), else None."""
    if type(value) is int or type(value) is float:
        try:
            return value if math.isfinite(value) else None
        except OverflowError:  # an int beyond the range of float
            return None
    return None


def _is_area(value: Any) -> bool:
    return (number := finite(value)) is not None and number >= 0


def _as_integer(value: Any) -> Optional[int]:
    """The integer for 96, 96.0, "96", "96.0" or True; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, (int, float)) and -1e15 < value < 1e15 and value == int(value):
        return int(value)
    return None


class _Ids:
    """The ids of images or categories, and lookup of references to them."""

    def __init__(self, known: Iterable[Any]) -> None:
        self._known = set(known)
        by_text = {str(key): key for key in self._known}
        self._by_text = by_text if len(by_text) == len(self._known) else {}

    def find(self, value: Any) -> Any:
        """The id that a reference means, text for a number allowed; None if there is none."""
        if type(value) is float:
            value = _as_integer(value)
        if type(value) not in (int, str):
            return None
        return value if value in self._known else self._by_text.get(str(value))


class _Validator:
    """Validates a file in one pass; see `validate`."""

    def __init__(
        self,
        lists: dict[str, Any],
        name: str,
        load: bool,
        train: bool,
        masks: bool,
        mask_format: str,
    ) -> None:
        self._lists, self._name = lists, name
        self._load, self._train, self._masks = load, train, masks
        self._polygons_only = mask_format == "polygon"
        self._found = Findings()
        self._sizes: dict[Any, Optional[tuple[int, int]]] = {}
        self._strings: list[tuple[int, str, int]] = []  # compressed RLEs: index, counts, pixels
        self._bad: set[int] = set()

    def run(self) -> Validated:
        images = self._images()
        categories = self._categories()
        annotations = self._annotations(_Ids(self._sizes), _Ids(c["id"] for c in categories))
        self._compressed(annotations)
        self._boxes(annotations)
        order = (ERROR, FIXED, WARNING)
        return Validated(
            self._name,
            {**self._lists, "images": images, "categories": categories, "annotations": annotations},
            sorted(self._found.values(), key=lambda finding: order.index(finding.level)),
            sorted(self._bad),
        )

    # images and categories

    def _images(self) -> list[Any]:
        images = []
        for image, where in self._with_ids("images"):
            given = [image.get(side) for side in ("height", "width")]
            height, width = map(_as_integer, given)
            if height and width and 0 < min(height, width) <= max(height, width) <= LONGEST_SIDE:
                self._sizes[image["id"]] = (height, width)
                if any(type(side) is not int for side in given):
                    what = "height and width are not integers; converted"
                    self._found.add(FIXED, what, where, given)
                    image = {**image, "height": height, "width": width}
            else:
                self._sizes[image["id"]] = None
                if self._load or self._masks or given != [None, None]:
                    what = f"height and width must be integers from 1 to {LONGEST_SIDE}"
                    self._found.add(ERROR, what, where, given)
            file_name = image.get("file_name")
            if self._load and not (isinstance(file_name, str) and file_name):
                self._found.add(ERROR, "file_name must be text", where, file_name)
            images.append(image)
        return images

    def _categories(self) -> list[Any]:
        categories = []
        for category, where in self._with_ids("categories"):
            if not isinstance(category.get("name"), str):
                if self._load:
                    self._found.add(ERROR, "name must be text", where, category.get("name"))
            categories.append(category)
        for name, count in Counter(f"{c.get('name')!r:.60}" for c in categories).items():
            if count > 1 and name != "None":
                self._found.add(WARNING, "categories share a name", name)
        if not categories and self._load:
            self._found.add(ERROR, "there is no category")
        return categories

    def _with_ids(self, key: str) -> Iterable[tuple[dict[str, Any], str]]:
        """Entries of a list with a valid id, and their position in the file."""
        seen: set[Any] = set()
        for number, entry in enumerate(self._lists[key]):
            where = f"{key}[{number}]"
            if not isinstance(entry, dict):
                self._found.add(ERROR, f"{key} must be objects", where, entry)
                continue
            own = entry.get("id")
            if type(own) is float and _as_integer(own) is not None:
                self._found.add(
                    FIXED, f"ids of {key} are floats; converted to integers", where, own
                )
                entry = {**entry, "id": _as_integer(own)}
            elif type(own) is not str and not (type(own) is int and abs(own) < 2**63):
                what = f"{key} need an id: text or a 64-bit integer"
                self._found.add(ERROR, what, where, own)
                continue
            if entry["id"] in seen:
                self._found.add(ERROR, f"ids in {key} are not unique", where, own)
                continue
            seen.add(entry["id"])
            yield entry, where

    # annotations

    def _annotations(self, image_ids: _Ids, category_ids: _Ids) -> list[Any]:
        entries = self._lists["annotations"]
        references = (("image_id", image_ids), ("category_id", category_ids))
        checked = []
        for number, entry in enumerate(entries):
            self._number = number
            if not isinstance(entry, dict):
                self._error("annotations must be objects", entry)
                checked.append(entry)
                continue
            self._entry = entry
            fixes: dict[str, Any] = {}
            for key, ids in references:
                value = entry.get(key)
                found = ids.find(value)
                if found is None:
                    self._error(f"{key} is not an id in the file", value)
                elif type(found) is not type(value) or found != value:
                    fixes[key] = found
                    self._fixed(f"{key} differs in type from the id; converted", value)
            self._crowd(entry, fixes)
            if number not in self._bad:
                size = self._sizes[fixes.get("image_id", entry.get("image_id"))]
                self._mask(entry, fixes, size)
                self._box(entry, fixes, size)
                self._area(entry, fixes, size)
                self._keypoints(entry)
            checked.append({**entry, **fixes} if fixes else entry)
        return self._with_own_ids(checked)

    def _where(self) -> str:
        number = self._number
        entry = self._lists["annotations"][number]
        if not isinstance(entry, dict):
            return f"annotations[{number}]"
        return f"annotations[{number}] (id {entry.get('id')!r:.60})"

    def _error(self, what: str, value: Any = ...) -> None:
        self._bad.add(self._number)
        self._found.add(ERROR, what, self._where(), value)

    def _fixed(self, what: str, value: Any = ...) -> None:
        self._found.add(FIXED, what, self._where(), value)

    def _crowd(self, entry: dict[str, Any], fixes: dict[str, Any]) -> None:
        crowd = entry.get("iscrowd")
        if type(crowd) is not int or crowd not in (0, 1):
            number = 0 if crowd is None else _as_integer(crowd)
            if number not in (0, 1):
                self._error("iscrowd must be 0 or 1", crowd)
                return
            fixes["iscrowd"] = number
            if crowd is None:
                self._fixed("iscrowd is missing; read as 0")
            else:
                self._fixed("iscrowd is not an integer; converted to 0 or 1", crowd)
        if entry.get("ignore"):
            self._error(
                "`ignore` is not a key of the COCO format and has no effect; remove it, or mark "
                "regions to ignore with iscrowd: 1",
                entry["ignore"],
            )

    def _box(self, entry: dict[str, Any], fixes: dict[str, Any], size: Any) -> None:
        box = entry.get("bbox")
        mask = fixes.get("segmentation", entry.get("segmentation"))
        if not box and mask and size and self._number not in self._bad:
            fixes["bbox"] = mask_util.toBbox(as_rle(mask, size)).tolist()
            self._fixed("bbox is missing; computed from the mask")
            return
        if (
            not isinstance(box, (list, tuple))
            or len(box) != 4
            or None in map(finite, box)
            or not -1e9 < min(box) <= max(box) < 1e9
        ):
            self._error("bbox must be [x, y, width, height], four finite numbers", box)
        elif box[2] < 0 or box[3] < 0:
            self._error("bbox has a negative width or height; COCO boxes are not corners", box)

    def _mask(self, entry: dict[str, Any], fixes: dict[str, Any], size: Any) -> None:
        mask = entry.get("segmentation")
        crowd = fixes.get("iscrowd", entry.get("iscrowd"))
        if not mask and isinstance(mask, (type(None), list)):
            if self._masks:
                self._error(
                    "there is no mask (segmentation), but masks are required; to use boxes only, "
                    "train with MODEL.MASK_ON False and evaluate with --task bbox"
                )
            return
        if size is None:
            return  # the error is reported for the image
        if isinstance(mask, list):
            self._polygons(mask, fixes, size)
            return
        if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
            self._error("segmentation must be a list of polygons or an RLE", mask)
            return
        sides = mask["size"]
        if not isinstance(sides, (list, tuple)) or list(sides) != [*size]:
            self._error("size of the RLE must be height and width of the image", sides)
            return
        counts = mask["counts"]
        if isinstance(counts, list):
            valid = all(type(count) is int and count >= 0 for count in counts)
            if not valid or sum(counts) != size[0] * size[1]:
                self._error("counts of the RLE must be run lengths that cover all pixels", counts)
        elif isinstance(counts, str):
            pixels = size[0] * size[1]
            if entry.get("bbox") and _is_area(entry.get("area")):
                self._strings.append((self._number, counts, pixels))  # faster in batches
            elif problem := first_malformed([counts], [pixels]):
                self._error("the RLE of the mask is malformed", problem[1])
        else:
            self._error("counts of the RLE must be a list or text", counts)
        if self._polygons_only and not crowd:
            self._error("the mask is an RLE, but INPUT.MASK_FORMAT is polygon; set it to bitmask")

    def _polygons(self, mask: list[Any], fixes: dict[str, Any], size: tuple[int, int]) -> None:
        if finite(mask[0]) is not None:
            mask = [mask]
            fixes["segmentation"] = mask
            self._fixed("segmentation is a single polygon; converted to a list of polygons")
        reach = REACH * max(size)
        for polygon in mask:
            try:
                # these run in C: a file of COCO's size has 30 million coordinates
                least, greatest = min(polygon), max(polygon)
                valid = math.isfinite(sum(polygon))
            except (TypeError, ValueError, OverflowError):
                valid = polygon == []
                least = greatest = 0
            if not valid or not isinstance(polygon, (list, tuple)):
                self._error("a polygon must be x, y, x, y, ... in finite numbers", polygon)
                return
            if len(polygon) % 2:
                self._error("a polygon has an odd number of coordinates", polygon)
                return
            if least < -reach or greatest > max(size) + reach:
                self._error("a polygon is far outside its image", polygon)
                return
        if min(map(len, mask)) < 6:
            kept = [polygon for polygon in mask if len(polygon) >= 6]
            if not kept and self._masks:
                self._error("no polygon has three corners, but masks are required", mask)
            elif kept or not self._masks:
                fixes["segmentation"] = kept
                self._fixed("polygons with fewer than three corners are removed", mask)

    def _area(self, entry: dict[str, Any], fixes: dict[str, Any], size: Any) -> None:
        area = entry.get("area")
        if self._number in self._bad:
            return
        if _is_area(area):
            return
        mask = fixes.get("segmentation", entry.get("segmentation"))
        if mask and size:
            fixes["area"] = float(mask_util.area(as_rle(mask, size)))
        else:
            box = fixes.get("bbox", entry["bbox"])
            fixes["area"] = float(box[2] * box[3])
        self._fixed("area is missing or invalid; computed from mask or box", area)

    def _keypoints(self, entry: dict[str, Any]) -> None:
        keypoints = entry.get("keypoints")
        if keypoints and (
            not isinstance(keypoints, list) or len(keypoints) % 3 or None in map(finite, keypoints)
        ):
            self._error("keypoints must be x, y, v, x, y, v, ... in finite numbers", keypoints)

    def _with_own_ids(self, annotations: list[Any]) -> list[Any]:
        """Replaces invalid ids of annotations, to which nothing refers."""
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in annotations]
        if set(map(type, ids)) <= {int} and len(set(ids)) == len(ids):
            return annotations
        seen: set[Any] = set()
        for number, own in enumerate(ids):
            self._number = number
            if type(own) is not int or own in seen:
                what = "ids of annotations are missing, not unique or not integers; renumbered"
                self._fixed(what)
            else:
                seen.add(own)
        return [
            {**entry, "id": number} if isinstance(entry, dict) else entry
            for number, entry in enumerate(annotations, start=1)
        ]

    # checks of the whole file

    def _compressed(self, annotations: list[Any]) -> None:
        for start in range(0, len(self._strings), 512):
            batch = self._strings[start : start + 512]
            while batch:
                problem = first_malformed([s for _, s, _ in batch], [a for *_, a in batch])
                if problem is None:
                    break
                self._number = batch[problem[0]][0]
                self._error("the RLE of the mask is malformed", problem[1])
                batch = batch[problem[0] + 1 :]

    def _boxes(self, annotations: list[Any]) -> None:
        """Finds boxes in other formats, which only all boxes together reveal, and boxes that
        detectron2 removes from a training set."""
        good = [n for n in range(len(annotations)) if n not in self._bad]
        sizes = [self._sizes[annotations[n]["image_id"]] for n in good]
        if None in sizes:  # an error is reported for the images, or no sizes are needed
            return
        boxes = np.array([annotations[n]["bbox"] for n in good], float).reshape(-1, 4)
        height, width = np.array(sizes, float).reshape(-1, 2).T
        x, y, w, h = boxes.T
        beyond = (x + w > width + 1) | (y + h > height + 1)
        as_corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
        if good and boxes.max() <= 1 and min(height.min(), width.min()) > 8:
            self._found.add(
                ERROR,
                "all boxes are within 0 to 1 and seem to be fractions of the image; COCO boxes are "
                "in pixels: multiply by width and height",
            )
        elif good and as_corners.all() and beyond.mean() > 0.5:
            self._found.add(
                ERROR,
                f"{beyond.sum()} of {len(good)} boxes exceed their images, but all would fit as "
                "corners [x1, y1, x2, y2]; COCO boxes are [x, y, width, height]",
            )
        elif beyond.any():
            self._found.add(
                WARNING,
                f"{beyond.sum()} of {len(good)} boxes exceed their images by more than a pixel",
            )
        if self._train:
            crowds = np.array([bool(annotations[n]["iscrowd"]) for n in good], bool)
            empty = np.minimum(w, h) <= 0
            outside = ~((x < width) & (y < height) & (x + w > 0) & (y + h > 0))
            self._check_objects_to_train_on(
                annotations,
                {
                    "crowds": np.array(good)[crowds],
                    "boxes without area": np.array(good)[~crowds & empty],
                    "boxes outside their images": np.array(good)[~crowds & ~empty & outside],
                },
            )

    def _check_objects_to_train_on(
        self, annotations: list[Any], left_out: Mapping[str, np.ndarray]
    ) -> None:
        for reason, numbers in left_out.items():
            for self._number in numbers if reason != "crowds" else ():
                box = annotations[self._number]["bbox"]
                self._found.add(WARNING, f"{reason}, not trained on", self._where(), box)
        counts = {reason: len(numbers) for reason, numbers in left_out.items() if len(numbers)}
        remaining = len(annotations) - len(self._bad) - sum(counts.values())
        if not remaining and not any(level == ERROR for level, _ in self._found):
            parts = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            self._found.add(
                ERROR,
                f"no object to train on: {len(annotations)} annotations"
                + (f", of which {parts}" if parts else ""),
            )
