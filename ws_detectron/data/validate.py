"""Validates COCO annotation files, by the same rules in every tool and before training.

Format: https://cocodataset.org/#format-data. The libraries that read such a file do not validate
it: a NaN in a polygon exhausts the memory, similar ids share their objects, and a box stored as
corners trains a model on wrong boxes.
"""

import gc
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from pycocotools import mask as mask_util

from ws_detectron.errors import DataError

from .rle import problem_of_counts

logger = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")
NAMED_AT_MOST = 3  # entries per finding
# Coordinates may exceed the image by this many times its longer side, as in crops of larger images.
# The time and memory that pycocotools needs grow with the length of a polygon in pixels.
REACH = 2
LONGEST_SIDE = 200_000  # pixels
LARGE = 10**8  # bytes; takes seconds to read

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
    if len(raw) > LARGE:
        logger.info("reading %s %s, %.0f MB", what, path, len(raw) / 1e6)
    try:
        with no_garbage_collection():
            return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} are not JSON in UTF-8: {error}") from error


def validate(
    content: Any,
    name: str,
    *,
    load: bool = False,
    train: bool = False,
    masks: bool = False,
    mask_format: str = "",
    keypoints: bool = False,
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
        keypoints: every object needs keypoints, and the categories their names.
        require_annotations: the list of annotations, which AP needs, must be there.

    Raises:
        DataError: a list of the COCO format is missing.
    """
    lists = _lists(content, name, require_annotations)
    with no_garbage_collection():
        polygons_only = mask_format == "polygon"
        return _Validator(lists, load or train, train, masks, polygons_only, keypoints).run(name)


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


@dataclass
class _Validator:
    """Applies the rules to each entry in turn, then those that only all together show.

    `key`, `number`, `entry` and `sound` are the list, the index, the content with its fixes and the
    state of the current entry.
    """

    lists: dict[str, Any]
    load: bool
    train: bool
    masks: bool
    polygons_only: bool
    keypoints: bool
    found: Findings = field(default_factory=Findings)
    sizes: dict[Any, Optional[tuple[int, int]]] = field(default_factory=dict)  # by image id
    names: list[str] = field(default_factory=list)  # of the keypoints that every object needs

    def run(self, name: str) -> Validated:
        images = [self.image(image) for image in self.with_ids("images")]
        categories = self.categories()
        references = (
            ("image_id", *_by_text(self.sizes)),
            ("category_id", *_by_text(category["id"] for category in categories)),
        )
        annotations, broken = [], []
        for _ in self.each("annotations"):
            self.annotation(references)
            annotations.append(self.entry)
            if not self.sound:
                broken.append(self.number)
        annotations = self.with_own_ids(annotations)
        self.check_together(annotations, set(broken))
        content = {"images": images, "categories": categories, "annotations": annotations}
        order = (ERROR, FIXED, WARNING)
        findings = sorted(self.found.values(), key=lambda finding: order.index(finding.level))
        return Validated(name, {**self.lists, **content}, findings, broken)

    def each(self, key: str) -> Iterator[Any]:
        """The entries of a list, each as the current one."""
        self.key = key
        for number, entry in enumerate(self.lists[key]):
            self.number, self.entry, self.sound = number, entry, True
            yield entry

    def where(self) -> str:
        own = ""
        if self.key == "annotations" and isinstance(self.entry, dict):
            own = f" (id {self.entry.get('id')!r:.60})"
        return f"{self.key}[{self.number}]{own}"

    def error(self, what: str, value: Any = ...) -> None:
        self.sound = False
        self.found.add(ERROR, what, self.where(), value)

    def fix(self, what: str, value: Any = ..., **fixed: Any) -> None:
        self.found.add(FIXED, what, self.where(), value)
        self.entry = {**self.entry, **fixed}

    # images and categories

    def with_ids(self, key: str) -> Iterator[dict[str, Any]]:
        """The entries of a list that have a valid id, each as the current one."""
        seen: set[Any] = set()
        for entry in self.each(key):
            if not isinstance(entry, dict):
                self.error(f"{key} must be objects", entry)
                continue
            given = entry.get("id")
            own = _as_integer(given) if type(given) is float else given
            if type(own) is not str and not (type(own) is int and abs(own) < 2**63):
                self.error(f"{key} need an id: text or a 64-bit integer", given)
            elif own in seen:
                self.error(f"ids in {key} are not unique", given)
            else:
                seen.add(own)
                if own is not given:
                    self.fix(f"ids of {key} are floats; converted to integers", given, id=own)
                yield self.entry

    def image(self, image: dict[str, Any]) -> dict[str, Any]:
        given = [image.get(side) for side in ("height", "width")]
        height, width = map(_as_integer, given)
        if height and width and _is_size((height, width)):
            self.sizes[image["id"]] = (height, width)
            if any(type(side) is not int for side in given):
                what = "height and width are not integers; converted"
                self.fix(what, given, height=height, width=width)
        else:
            self.sizes[image["id"]] = None
            if self.load or self.masks or given != [None, None]:
                self.error(f"height and width must be integers from 1 to {LONGEST_SIDE}", given)
        file_name = image.get("file_name")
        if self.load and not (isinstance(file_name, str) and file_name):
            self.error("file_name must be text", file_name)
        return self.entry

    def categories(self) -> list[dict[str, Any]]:
        categories, names = [], set()
        for category in self.with_ids("categories"):
            name = category.get("name")
            if self.load and not isinstance(name, str):
                self.error("name must be text", name)
            elif isinstance(name, str) and name in names:
                self.found.add(WARNING, "categories share a name", self.where(), name)
            elif isinstance(name, str):
                names.add(name)
            categories.append(category)
        if not categories and self.load:
            self.found.add(ERROR, "there is no category")
        if self.keypoints:
            self.check_names([c["keypoints"] for c in categories if c.get("keypoints")])
        return categories

    def check_names(self, given: list[Any]) -> None:
        if not given or any(names != given[0] for names in given):
            self.found.add(
                ERROR,
                f"{'not every category has the same' if given else 'no category has'} `keypoints`, "
                'a list of names such as ["left_eye", "right_eye"], which a model with '
                "MODEL.KEYPOINT_ON needs",
            )
        elif not isinstance(given[0], list) or len(set(map(str, given[0]))) < len(given[0]):
            what = "`keypoints` must be a list of different names"
            self.found.add(ERROR, what, "categories", given[0])
        else:
            self.names = given[0]

    # annotations

    def annotation(self, references: Iterable[tuple[str, set[Any], dict[str, Any]]]) -> None:
        if not isinstance(self.entry, dict):
            self.error("annotations must be objects", self.entry)
            return
        for reference in references:
            self.reference(*reference)
        self.crowd()
        if self.sound:
            size = self.sizes[self.entry["image_id"]]
            self.mask(size)
            self.box(size)
            if self.sound:
                self.area(size)
            self.points()

    def reference(self, key: str, ids: set[Any], by_text: dict[str, Any]) -> None:
        value = self.entry.get(key)
        number = _as_integer(value) if type(value) is float else value
        found = None
        if type(number) in (int, str):
            found = number if number in ids else by_text.get(str(number))
        if found is None:
            self.error(f"{key} is not an id in the file", value)
        elif type(found) is not type(value):
            self.fix(f"{key} differs in type from the id; converted", value, **{key: found})

    def crowd(self) -> None:
        crowd = self.entry.get("iscrowd")
        if type(crowd) is not int or crowd not in (0, 1):
            number = _as_integer(crowd)
            if crowd is None:
                self.fix("iscrowd is missing; read as 0", iscrowd=0)
            elif number in (0, 1):
                self.fix("iscrowd is not an integer; converted to 0 or 1", crowd, iscrowd=number)
            else:
                self.error("iscrowd must be 0 or 1", crowd)
        if self.entry.get("ignore"):
            self.error(
                "`ignore` is not a key of the COCO format and has no effect; remove it, or mark "
                "regions to ignore with iscrowd: 1",
                self.entry["ignore"],
            )

    def points(self) -> None:
        points, names = self.entry.get("keypoints"), self.names
        if points and (
            not isinstance(points, list) or len(points) % 3 or None in map(finite, points)
        ):
            self.error("keypoints must be x, y, v, x, y, v, ... in finite numbers", points)
        elif names and len(points or ()) != 3 * len(names):
            self.error(
                f"keypoints must be {3 * len(names)} numbers, x, y, v for the {len(names)} "
                f"keypoints {names} (zeros for an object without keypoints)",
                points,
            )
        elif names and "num_keypoints" not in self.entry:
            self.error(
                "there is no `num_keypoints`, the number of keypoints with v > 0, which COCO's "
                "evaluation needs"
            )

    def mask(self, size: Optional[tuple[int, int]]) -> None:
        mask = self.entry.get("segmentation")
        if mask is None or mask == []:
            if self.masks:
                self.error(
                    "there is no mask (segmentation), but masks are required; to use boxes only, "
                    "train with MODEL.MASK_ON False and evaluate with --task bbox"
                )
        elif size is None:
            pass  # the error is reported for the image
        elif isinstance(mask, list):
            self.polygons(mask, size)
        elif not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
            self.error("segmentation must be a list of polygons or an RLE", mask)
        else:
            self.rle(mask, size)

    def polygons(self, mask: list[Any], size: tuple[int, int]) -> None:
        if finite(mask[0]) is not None:
            mask = [mask]
            what = "segmentation is a single polygon; converted to a list of polygons"
            self.fix(what, segmentation=mask)
        low, high = -REACH * max(size), (1 + REACH) * max(size)
        for polygon in mask:
            try:
                # these run in C: a file of COCO's size has 30 million coordinates
                least, greatest = min(polygon), max(polygon)
                valid = math.isfinite(sum(polygon))
            except (TypeError, ValueError, OverflowError):
                valid = polygon == []
                least = greatest = 0
            if not valid or not isinstance(polygon, (list, tuple)):
                return self.error("a polygon must be x, y, x, y, ... in finite numbers", polygon)
            if len(polygon) % 2:
                return self.error("a polygon has an odd number of coordinates", polygon)
            if least < low or greatest > high:
                return self.error("a polygon is far outside its image", polygon)
        if min(map(len, mask)) < 6:
            kept = [polygon for polygon in mask if len(polygon) >= 6]
            if self.masks and not kept:
                self.error("no polygon has three corners, but masks are required", mask)
            else:
                what = "polygons with fewer than three corners are removed"
                self.fix(what, mask, segmentation=kept)

    def rle(self, mask: dict[str, Any], size: tuple[int, int]) -> None:
        sides, counts = mask["size"], mask["counts"]
        if not _is_size(sides) or tuple(sides) != size:
            self.error("size of the RLE must be height and width of the image", sides)
        elif isinstance(counts, list):
            valid = all(type(count) is int and count >= 0 for count in counts)
            if not valid or sum(counts) != size[0] * size[1]:
                self.error("counts of the RLE must be run lengths that cover all pixels", counts)
        elif not isinstance(counts, str):
            self.error("counts of the RLE must be a list or text", counts)
        elif problem := problem_of_counts(counts, size[0] * size[1]):
            self.error("the RLE of the mask is malformed", problem)
        if self.sound and self.polygons_only and not self.entry["iscrowd"]:
            self.error("the mask is an RLE, but INPUT.MASK_FORMAT is polygon; set it to bitmask")

    def box(self, size: Optional[tuple[int, int]]) -> None:
        box, mask = self.entry.get("bbox"), self.entry.get("segmentation")
        if not box and mask and size and self.sound:
            box = mask_util.toBbox(as_rle(mask, size)).tolist()
            self.fix("bbox is missing; computed from the mask", bbox=box)
        elif (
            not isinstance(box, (list, tuple))
            or len(box) != 4
            or None in map(finite, box)
            or not -1e9 < min(box) <= max(box) < 1e9
        ):
            self.error("bbox must be [x, y, width, height], four finite numbers", box)
        elif box[2] < 0 or box[3] < 0:
            self.error("bbox has a negative width or height; COCO boxes are not corners", box)

    def area(self, size: Optional[tuple[int, int]]) -> None:
        area, mask = finite(self.entry.get("area")), self.entry.get("segmentation")
        if area is None or area < 0:
            _, _, width, height = self.entry["bbox"]
            area = mask_util.area(as_rle(mask, size)) if mask and size else width * height
            what = "area is missing or invalid; computed from mask or box"
            self.fix(what, self.entry.get("area"), area=float(area))

    def with_own_ids(self, annotations: list[Any]) -> list[Any]:
        """Replaces invalid ids of annotations, to which nothing refers."""
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in annotations]
        invalid = len(ids) - len({own for own in ids if type(own) is int})
        if not invalid:
            return annotations
        what = "ids of annotations are missing, not unique or not integers; all are renumbered"
        self.found[FIXED, what] = Finding(FIXED, what, invalid)
        return [
            {**entry, "id": number} if isinstance(entry, dict) else entry
            for number, entry in enumerate(annotations, start=1)
        ]

    def check_together(self, annotations: list[Any], broken: set[int]) -> None:
        """Finds boxes in other formats, and whether there is something to train on."""
        sound = [entry for number, entry in enumerate(annotations) if number not in broken]
        if self.names and sound and not any(v > 0 for a in sound for v in a["keypoints"][2::3]):
            self.found.add(ERROR, "no annotation has a labelled keypoint (v > 0)")
        fractions = corners = bool(sound)
        beyond = 0
        left_out: Counter[str] = Counter()  # what detectron2 removes from a training set
        for _ in self.each("annotations"):
            if self.number in broken:
                continue
            entry = annotations[self.number]
            size, box = self.sizes[entry["image_id"]], entry["bbox"]
            if size is None:  # an error of the image, or no sizes are needed
                return
            (height, width), (x, y, w, h) = size, box
            beyond += x + w > width + 1 or y + h > height + 1
            fractions = fractions and max(box) <= 1 and min(size) > 8
            corners = corners and x < w <= width + 1 and y < h <= height + 1
            if not self.train:
                continue
            if entry["iscrowd"]:
                left_out["crowds"] += 1
                continue
            if min(w, h) <= 0:
                reason = "boxes without area"
            elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
                reason = "boxes outside their images"
            else:
                continue
            left_out[reason] += 1
            self.found.add(WARNING, f"{reason}, not trained on", self.where(), box)
        if fractions:
            self.found.add(
                ERROR,
                "all boxes are within 0 to 1 and seem to be fractions of the image; COCO boxes are "
                "in pixels: multiply by width and height",
            )
        elif beyond:
            exceed = f"{beyond} of {len(sound)} boxes exceed their images"
            if corners and beyond > len(sound) / 2:
                self.found.add(
                    ERROR,
                    f"{exceed}, but all would fit as corners [x1, y1, x2, y2]; COCO boxes are "
                    "[x, y, width, height]",
                )
            else:
                self.found.add(WARNING, f"{exceed} by more than a pixel")
        errors = any(level == ERROR for level, _ in self.found)
        if self.train and not errors and sum(left_out.values()) == len(sound):
            parts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            what = f"no object to train on: {len(annotations)} annotations"
            self.found.add(ERROR, f"{what}, of which {parts}" if parts else what)


def _by_text(ids: Iterable[Any]) -> tuple[set[Any], dict[str, Any]]:
    """The ids, and text -> id; the latter empty if two ids, 1 and "1", have the same text."""
    known = set(ids)
    by_text = {str(own): own for own in known}
    return known, by_text if len(by_text) == len(known) else {}


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and [*map(type, value)] == [int, int]
        and 0 < min(value) <= max(value) <= LONGEST_SIDE
    )
