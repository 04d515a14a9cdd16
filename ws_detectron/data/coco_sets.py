"""Data sets of one's own, in COCO format, that a config names: DATASETS.REGISTER."""

import json
import math
import re
from collections.abc import Sequence
from os.path import abspath, expanduser
from typing import Any, Optional

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ws_detectron.errors import ConfigError, DataError, UserError

FORM = "[name, path of the annotations (COCO JSON), folder of the images]"


def register_coco_sets(entries: Optional[Sequence[Any]]) -> list[list[str]]:
    """Registers data sets; the same ones once more do no harm.

    Args:
        entries: of DATASETS.REGISTER: name, path of the COCO JSON, folder of the images, each.
            Relative paths are relative to the current folder. None: no data sets.

    Returns:
        The entries with absolute paths.

    Raises:
        ConfigError: an entry has another form, or its name belongs to another data set.
    """
    registered = []
    for entry in entries or ():
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != 3
            or not all(isinstance(word, str) and word for word in entry)
        ):
            raise ConfigError(f"DATASETS.REGISTER is a list of {FORM}; got {entry!r}")
        name, annotations, images = entry
        paths = _absolute(annotations), _absolute(images)
        registered.append([name, *paths])
        if name not in DatasetCatalog:
            register_coco_instances(name, {"named_by": "DATASETS.REGISTER"}, *paths)
            continue
        metadata = MetadataCatalog.get(name)
        there = metadata.get("json_file"), metadata.get("image_root")
        if there != paths:
            raise ConfigError(
                f"DATASETS.REGISTER: {name!r} is taken by another data set (annotations "
                f"{there[0]}, images {there[1]}); choose another name"
            )
    return registered


def classes_of(name: str) -> Metadata:
    """The metadata of a data set with its classes, which those of one's own have in their files.

    Raises:
        UserError: they cannot be read.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("named_by") and not metadata.get("thing_classes"):
        try:
            DatasetCatalog.get(name)
        except Exception as error:
            raise UserError(f"cannot load {name}, {metadata.json_file}: {error}") from error
    return metadata


def keypoint_names(name: str) -> Optional[list[str]]:
    """The keypoints of a registered data set; to be called before detectron2 needs its metadata.

    Sets `keypoint_names` from `categories[].keypoints` of the annotation file and
    `keypoint_flip_map` from names with "left" and "right", or a separate "l" and "r", unless the
    metadata have them, as those of COCO have.

    Args:
        name: of a data set.

    Returns:
        The names; None where neither metadata nor an annotation file has them.

    Raises:
        DataError: the file cannot be read, its categories name no or different keypoints, or an
            annotation has another number of them.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file")
    if metadata.get("keypoint_names") is None:
        if not path:
            return None
        metadata.keypoint_names = _keypoints_in(path)
    names = list(metadata.keypoint_names)
    if metadata.get("keypoint_flip_map") is None:
        metadata.keypoint_flip_map = [
            (one, mirrored(one)) for one in names if one < mirrored(one) and mirrored(one) in names
        ]
    return names


def mirrored(keypoint: str) -> str:
    """The name with left and right exchanged; the same where it has neither."""
    opposite = {"left": "right", "right": "left", "l": "r", "r": "l"}

    def exchange(match: re.Match) -> str:
        found = match.group()
        other = opposite[found.lower()]
        if found.isupper():
            return other.upper()
        return other.capitalize() if found[0].isupper() else other

    return re.sub(r"left|right|(?<![a-z])[lr](?![a-z])", exchange, keypoint, flags=re.IGNORECASE)


def _keypoints_in(path: str) -> list[str]:
    try:
        with PathManager.open(path) as file:
            content = json.load(file)
        found = [c["keypoints"] for c in content["categories"] if c.get("keypoints")]
        annotations = content.get("annotations")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"cannot read the keypoints of {path}: {type(error).__name__}: {error}"
        ) from error
    if not found or any(names != found[0] for names in found):
        raise DataError(
            f"{path}: {'no' if not found else 'not every'} category has "
            f"{'`keypoints`' if not found else 'the same `keypoints`'}, a list of names such as "
            '["left_eye", "right_eye"], which a model with MODEL.KEYPOINT_ON needs'
        )
    names = found[0]
    if not isinstance(names, list) or len(set(map(str, names))) < len(names):
        raise DataError(f"{path}: `keypoints` is {names!r}; allowed: a list of different names")
    for annotation in annotations or ():
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        if (
            not isinstance(points, list)
            or len(points) != 3 * len(names)
            or not all(isinstance(p, (int, float)) and math.isfinite(p) for p in points)
        ):
            raise DataError(
                f"{path}: `keypoints` of annotation {_id(annotation)} is {points!r}; allowed: "
                f"{3 * len(names)} numbers x, y, v for the {len(names)} keypoints {names} "
                "(zeros for an object without)"
            )
        if "num_keypoints" not in annotation:
            raise DataError(
                f"{path}: annotation {_id(annotation)} has no `num_keypoints`, the number of "
                "its keypoints with v > 0, which COCO's evaluation needs"
            )
    if annotations is not None and not any(
        v > 0 for a in annotations for v in a["keypoints"][2::3]
    ):
        raise DataError(
            f"{path}: no annotation has a keypoint with v > 0, so there is none to find"
        )
    return [str(name) for name in names]


def _id(annotation: Any) -> Any:
    return annotation.get("id") if isinstance(annotation, dict) else annotation


def _absolute(path: str) -> str:
    return path if "://" in path else abspath(expanduser(path))
