"""Scenes in detectron2's catalogs.

Names: `scenes_<kind>_<image size>_<split>`, for example `scenes_shapes_128_train`. Registration
costs nothing; the images are made when the data set is first asked for. Configs must state
`INPUT.MASK_FORMAT: "bitmask"`, see `scene_dataset`.
"""

from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .scene_dataset import ANNOTATIONS, IMAGES, ensure_scenes, scene_folder
from .scenes import KINDS, SPLITS, SceneSpec

BUILTIN_SIZES = (128, 256, 512, 800)


def builtin_scenes() -> dict[str, SceneSpec]:
    """The scenes that importing `ws_detectron` registers, by name."""
    return {
        f"scenes_{kind}_{size}_{split}": SceneSpec.for_size(kind, size, split)
        for kind in KINDS
        for size in BUILTIN_SIZES
        for split in SPLITS
    }


def register_builtin_scenes(root: Optional[Union[str, Path]] = None) -> None:
    """Registers every set of `builtin_scenes()`; see `register_scenes`."""
    for name, spec in builtin_scenes().items():
        register_scenes(name, spec, root)


def register_scenes(name: str, spec: SceneSpec, root: Optional[Union[str, Path]] = None) -> None:
    """Registers a set of scenes with detectron2 under `name`.

    The set is made, if need be, by `DatasetCatalog.get(name)`, which building a data loader calls.
    `json_file` in the metadata names the file from the start, so build the test loader before
    `COCOEvaluator`, as `DefaultTrainer.test` does, or call `ensure_scenes` first.

    The same call twice changes nothing. A name registered here before, for another spec or root, is
    registered anew.

    Args:
        name: for `DATASETS.TRAIN` and `DATASETS.TEST`.
        spec: the scenes.
        root: where they are kept; `cache_root()`, read now, by default.

    Raises:
        ValueError: the name belongs to another data set.
    """
    folder = scene_folder(spec, root)
    json_file, image_root = str(folder / ANNOTATIONS), str(folder / IMAGES)
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        earlier = metadata.get("scene_spec")
        if earlier is None:
            raise ValueError(f"data set name {name!r} is taken by a data set that is not scenes")
        if (earlier, metadata.get("json_file")) == (spec, json_file):
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    # the root is settled now, so that the metadata and the data stay in the same place
    DatasetCatalog.register(name, partial(_load, name, spec, folder.parents[1]))
    MetadataCatalog.get(name).set(
        thing_classes=list(spec.classes),
        thing_dataset_id_to_contiguous_id={n + 1: n for n in range(len(spec.classes))},
        evaluator_type="coco",
        json_file=json_file,
        image_root=image_root,
        scene_spec=spec,
    )


def _load(name: str, spec: SceneSpec, root: Path) -> list[dict[str, Any]]:
    folder = ensure_scenes(spec, root)
    return load_coco_json(str(folder / ANNOTATIONS), str(folder / IMAGES), name)
