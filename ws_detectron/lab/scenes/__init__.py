"""Scenes: generated COCO-format data sets. The import registers the built-in ones."""

from .dataset import builtin_scenes, ensure_scenes, register_scenes, scene_folder
from .scene import Scene, SceneObject, SceneSpec, make_scene, sprite_source

__all__ = [
    "Scene",
    "SceneObject",
    "SceneSpec",
    "builtin_scenes",
    "ensure_scenes",
    "make_scene",
    "register_scenes",
    "scene_folder",
    "sprite_source",
]

for _name, _spec in builtin_scenes().items():
    register_scenes(_name, _spec)
