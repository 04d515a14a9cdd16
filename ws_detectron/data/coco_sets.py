"""Registers custom data sets in COCO format and checks the files of registered ones."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from os.path import abspath, expanduser
from pathlib import Path
from typing import Any, Optional, Union

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ws_detectron.errors import ConfigError, DataError, list_some
from ws_detectron.utils.io import refuse_overwrite, write_json

from .images import missing_images
from .validate import FIXED, NAMED_AT_MOST, Validated, read_json, validate

logger = logging.getLogger(__name__)

ENTRY = "[name, path of the annotations (COCO JSON), folder of the images]"


def register_coco_sets(entries: Optional[Sequence[Any]]) -> list[list[str]]:
    """Registers data sets; registering the same one again is a no-op.

    Args:
        entries: of DATASETS.REGISTER: name, path of the COCO JSON, folder of the images. Paths may
            be relative to the current folder. None: no data sets.

    Returns:
        The entries with absolute paths.

    Raises:
        ConfigError: an entry is malformed, or its name belongs to another data set.
    """
    registered = []
    for entry in entries or ():
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != 3
            or not all(isinstance(part, str) and part for part in entry)
        ):
            raise ConfigError(f"DATASETS.REGISTER is a list of {ENTRY}; got {entry!r}")
        name, annotations, images = entry
        paths = _absolute(annotations), _absolute(images)
        registered.append([name, *paths])
        if name not in DatasetCatalog:
            register_coco_instances(name, {"named_by": "DATASETS.REGISTER"}, *paths)
            continue
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("given_json_file", metadata.get("json_file"))
        image_root = metadata.get("image_root")
        if (json_file, image_root) != paths:
            raise ConfigError(
                f"DATASETS.REGISTER: {name!r} is taken by another data set (annotations "
                f"{json_file}, images {image_root}); choose another name"
            )
    return registered


def classes_of(name: str) -> Metadata:
    """The metadata of a data set; classes of custom data sets are read from their annotations.

    Raises:
        DataError: the file cannot be read or has errors.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("named_by") and not metadata.get("thing_classes"):
        _read(metadata.json_file, load=True).usable(log=False)
        DatasetCatalog.get(name)
    return metadata


def keypoint_names(name: str) -> Optional[list[str]]:
    """The keypoint names of a registered data set, which are added to its metadata.

    Unless the metadata already has them, as COCO's has, `keypoint_names` is set from
    `categories[].keypoints` of the annotation file and `keypoint_flip_map` from names with "left"
    and "right", or a separate "l" and "r". Call this before detectron2 needs the metadata.

    Args:
        name: name of the data set.

    Returns:
        The names; None if there are neither names in the metadata nor an annotation file.

    Raises:
        DataError: the file cannot be read or has errors, such as annotations without keypoints.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("keypoint_names") is None:
        if not metadata.get("json_file"):
            return None
        content = _read(metadata.json_file, keypoints=True).usable(log=False)
        metadata.keypoint_names = _keypoints_in(content)
    names = list(metadata.keypoint_names)
    if metadata.get("keypoint_flip_map") is None:
        metadata.keypoint_flip_map = [
            (one, mirrored(one)) for one in names if one < mirrored(one) and mirrored(one) in names
        ]
    return names


def _read(path: str, **options: Any) -> Validated:
    options = {"require_annotations": False, **options}
    return validate(read_json(PathManager.get_local_path(path), "annotations"), path, **options)


def _keypoints_in(content: dict[str, Any]) -> list[str]:
    """The names in a file that was validated with `keypoints`."""
    return next([*map(str, c["keypoints"])] for c in content["categories"] if c.get("keypoints"))


def mirrored(keypoint: str) -> str:
    """The name with left and right swapped; unchanged if it has neither."""
    opposite = {"left": "right", "right": "left", "l": "r", "r": "l"}

    def swap(match: re.Match) -> str:
        found = match.group()
        other = opposite[found.lower()]
        if found.isupper():
            return other.upper()
        return other.capitalize() if found[0].isupper() else other

    return re.sub(r"left|right|(?<![a-z])[lr](?![a-z])", swap, keypoint, flags=re.IGNORECASE)


def check_coco_set(
    name: str,
    folder: Union[str, Path],
    *,
    train: bool = False,
    classes: int = 0,
    keypoints: bool = False,
    **options: Any,
) -> Optional[str]:
    """Checks the files of a registered data set; if they need fixes, writes a fixed copy.

    Skips data sets without a COCO file, in other formats, not yet generated, and training sets with
    a custom loader, which may read the file differently.

    Args:
        name: name of the data set.
        folder: for the copy, `<folder>/annotations/<name>.json`.
        train: whether a model is trained on it.
        classes: number of classes that the model predicts; the file must have as many categories.
        keypoints: whether the model predicts keypoints, whose names are then added to the metadata.
        options: further options of `validate`.

    Returns:
        The file to read, for `use_annotations`; None if it is the one that is read already.

    Raises:
        DataError: the file cannot be read or has errors, or images are missing; lists them.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("given_json_file", metadata.get("json_file"))  # not an earlier copy
    custom_loader = not _loaded_by_detectron2(name)
    generated_later = metadata.get("scene_spec") is not None and not Path(path).is_file()
    if (
        not path
        or generated_later
        or (custom_loader and train)
        or metadata.get("evaluator_type", "coco") not in ("coco", "coco_panoptic_seg")
    ):
        return None
    keypoints = keypoints and metadata.get("keypoint_names") is None
    options.update(load=not custom_loader, train=train, keypoints=keypoints)
    validated = _read(path, **options)
    content = validated.usable()
    if not content["images"]:
        raise DataError(f"annotations {path} have no image")
    if len(content["categories"]) < classes:
        raise DataError(
            f"annotations {path} have {len(content['categories'])} categories, but the model "
            f"predicts {classes}, and evaluation fails on classes that the file does not have; set "
            f"MODEL.ROI_HEADS.NUM_CLASSES (RetinaNet: MODEL.RETINANET.NUM_CLASSES) "
            f"{len(content['categories'])}, or list in the file all categories of the training"
        )
    if keypoints:
        metadata.keypoint_names = _keypoints_in(content)
    root = metadata.get("image_root")
    if root and "://" not in root and not custom_loader:
        missing = missing_images(content["images"], root)
        if missing:
            raise DataError(
                f"annotations {path} name {len(missing)} of {len(content['images'])} images that "
                f"are not in {root}: {list_some([*map(repr, missing)], NAMED_AT_MOST)}"
            )
    local = PathManager.get_local_path(path)
    if not validated.of(FIXED) and _is_utf8(local):
        return path if metadata.json_file != path else None
    copy = Path(folder, "annotations", f"{name}.json").absolute()
    refuse_overwrite(copy, [local])
    write_json(copy, content, indent=None)
    logger.warning("annotations %s: fixed copy %s is used instead", path, copy)
    return str(copy)


def _is_utf8(path: str) -> bool:
    """Whether pycocotools, which does not support byte order marks, can read the file."""
    with open(path, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"


def _loaded_by_detectron2(name: str) -> bool:
    return DatasetCatalog[name].__module__ == register_coco_instances.__module__


def use_annotations(copies: Mapping[str, str]) -> None:
    """Makes data sets read other annotation files: name -> path from `check_coco_set`."""
    for name, path in copies.items():
        metadata = MetadataCatalog.get(name).as_dict()
        if metadata["json_file"] == path:
            continue
        MetadataCatalog.remove(name)
        metadata = {"given_json_file": metadata["json_file"], **metadata, "json_file": path}
        if _loaded_by_detectron2(name):
            DatasetCatalog.remove(name)
            register_coco_instances(name, {}, path, metadata["image_root"])
        MetadataCatalog.get(name).set(**metadata)


def _absolute(path: str) -> str:
    return path if "://" in path else abspath(expanduser(path))
