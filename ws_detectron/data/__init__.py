"""Data made on the spot, and readers for data sets that are on disk."""

from .cache import cache_root
from .catalog import builtin_scenes, register_builtin_scenes, register_scenes
from .coco_sets import (
    check_coco_set,
    check_files,
    classes_of,
    keypoint_names,
    mirrored,
    register_coco_sets,
    use_annotations,
)
from .fashion_mnist import FASHION_CLASSES, find_fashion_mnist, load_fashion_mnist
from .scene_dataset import ensure_scenes, scene_folder
from .scenes import Scene, SceneObject, SceneSpec, make_scene, sprite_source

__all__ = [
    "FASHION_CLASSES",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "builtin_scenes",
    "cache_root",
    "check_coco_set",
    "check_files",
    "classes_of",
    "ensure_scenes",
    "find_fashion_mnist",
    "keypoint_names",
    "load_fashion_mnist",
    "make_scene",
    "mirrored",
    "register_builtin_scenes",
    "register_coco_sets",
    "register_scenes",
    "scene_folder",
    "sprite_source",
    "use_annotations",
]
