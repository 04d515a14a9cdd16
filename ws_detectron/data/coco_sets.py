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

from .validate import FIXED, NAMED_AT_MOST, finite, missing_images, read_json, validate

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
        path = metadata.json_file
        content = read_json(PathManager.get_local_path(path), "annotations")
        validate(content, path, load=True, require_annotations=False).usable(log=False)
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
        DataError: the file cannot be read, its categories have no keypoints or different ones, or
            an annotation has another number of them.
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
    """The name with left and right swapped; unchanged if it has neither."""
    opposite = {"left": "right", "right": "left", "l": "r", "r": "l"}

    def swap(match: re.Match) -> str:
        found = match.group()
        other = opposite[found.lower()]
        if found.isupper():
            return other.upper()
        return other.capitalize() if found[0].isupper() else other

    return re.sub(r"left|right|(?<![a-z])[lr](?![a-z])", swap, keypoint, flags=re.IGNORECASE)


def _keypoints_in(path: str) -> list[str]:
    content = read_json(PathManager.get_local_path(path), "annotations")
    try:
        found = [c["keypoints"] for c in content["categories"] if c.get("keypoints")]
        annotations = content.get("annotations")
    except (KeyError, TypeError, AttributeError) as error:
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
        raise DataError(f"{path}: `keypoints` is {names!r:.60}; allowed: a list of different names")
    for annotation in annotations or ():
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        if (
            not isinstance(points, list)
            or len(points) != 3 * len(names)
            or None in map(finite, points)
        ):
            raise DataError(
                f"{path}: `keypoints` of annotation {_id(annotation)} is {points!r:.60}; allowed: "
                f"{3 * len(names)} numbers x, y, v for the {len(names)} keypoints {names} "
                "(zeros for an object without keypoints)"
            )
        if "num_keypoints" not in annotation:
            raise DataError(
                f"{path}: annotation {_id(annotation)} has no `num_keypoints`, the number of "
                "its keypoints with v > 0, which COCO's evaluation needs"
            )
    if annotations is not None and not any(
        v > 0 for a in annotations for v in a["keypoints"][2::3]
    ):
        raise DataError(f"{path}: no annotation has a labelled keypoint (v > 0)")
    return [str(name) for name in names]


def _id(annotation: Any) -> Any:
    return annotation.get("id") if isinstance(annotation, dict) else annotation


def check_coco_set(
    name: str,
    folder: Union[str, Path],
    *,
    train: bool = False,
    classes: int = 0,
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
    local = PathManager.get_local_path(path)
    options = {"require_annotations": False, **options}
    validated = validate(
        read_json(local, "annotations"), path, load=not custom_loader, train=train, **options
    )
    content = validated.usable()
    if not content["images"]:
        raise DataError(f"annotations {path} have no image")
    if len(content["categories"]) < classes:
        raise DataError(
            f"annotations {path} have {len(content['categories'])} categories, but the model "
            f"predicts {classes}, and evaluation fails on unknown classes; set NUM_CLASSES (of "
            "MODEL.ROI_HEADS or MODEL.RETINANET) to the number of categories"
        )
    root = metadata.get("image_root")
    if root and "://" not in root and not custom_loader:
        _check_images(content["images"], root, path)
    if not validated.of(FIXED) and _is_utf8(local):
        return path if metadata.json_file != path else None
    copy = Path(folder, "annotations", f"{name}.json").absolute()
    refuse_overwrite(copy, [local])
    write_json(copy, content, indent=None)
    logger.warning("annotations %s: fixed copy %s is used instead", path, copy)
    return str(copy)


def _check_images(images: Sequence[dict[str, Any]], root: str, path: str) -> None:
    missing = missing_images(images, root)
    if missing:
        raise DataError(
            f"annotations {path} name {len(missing)} of {len(images)} images that are not in "
            f"{root}: {list_some(list(map(repr, missing)), NAMED_AT_MOST)}"
        )


def _is_utf8(path: str) -> bool:
    """Whether pycocotools, which does not support byte order marks, can read the file."""
    with open(path, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"


def _loaded_by_detectron2(name: str) -> bool:
    return DatasetCatalog[name].__module__ == register_coco_instances.__module__


def check_files(name: str, folder: Union[str, Path]) -> None:
    """`check_coco_set` and `use_annotations` for a data set that is evaluated or drawn."""
    copy = check_coco_set(name, folder)
    if copy:
        use_annotations({name: copy})


def use_annotations(copies: Mapping[str, str]) -> None:
    """Makes data sets read other annotation files: name -> path from `check_coco_set`."""
    for name, path in copies.items():
        kept = MetadataCatalog.get(name).as_dict()
        kept.pop("name")
        given = kept.pop("json_file")
        if given == path:
            continue
        MetadataCatalog.remove(name)
        kept.setdefault("given_json_file", given)
        if _loaded_by_detectron2(name):
            DatasetCatalog.remove(name)
            kept.pop("evaluator_type", None)
            register_coco_instances(name, kept, path, kept.pop("image_root"))
        else:
            MetadataCatalog.get(name).set(json_file=path, **kept)


def _absolute(path: str) -> str:
    return path if "://" in path else abspath(expanduser(path))
