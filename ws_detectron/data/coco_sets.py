"""Data sets of one's own, in COCO format, that a config names: DATASETS.REGISTER."""

from collections.abc import Sequence
from os.path import abspath, expanduser
from typing import Any, Optional

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ws_detectron.errors import ConfigError, UserError

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


def _absolute(path: str) -> str:
    return path if "://" in path else abspath(expanduser(path))
