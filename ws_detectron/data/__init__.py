"""Data sets of one's own in COCO format: registered, validated and read."""

from .coco_sets import (
    check_coco_set,
    check_files,
    classes_of,
    keypoint_names,
    mirrored,
    register_coco_sets,
    use_annotations,
)

__all__ = [
    "check_coco_set",
    "check_files",
    "classes_of",
    "keypoint_names",
    "mirrored",
    "register_coco_sets",
    "use_annotations",
]
