"""Custom data sets in COCO format: registration, validation, reading."""

from .coco_sets import (
    check_coco_set,
    classes_of,
    keypoint_names,
    mirrored,
    register_coco_sets,
    use_annotations,
)

__all__ = [
    "check_coco_set",
    "classes_of",
    "keypoint_names",
    "mirrored",
    "register_coco_sets",
    "use_annotations",
]
