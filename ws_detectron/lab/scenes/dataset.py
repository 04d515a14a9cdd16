"""Scenes on disk: COCO JSON and PNG files, written once and reused.

Each set has a folder, named after its parameters:

    <root>/scenes/shapes_128_train_1a2b3c4d5e6f/
        annotations.json     COCO instance annotations; masks as compressed RLE
        images/000001.png    ...
        fingerprint.json     the parameters, the generator's version, the size of every file, and
                             a digest

The digest is the SHA-256 of all pixels and annotations. The same parameters give the same digest on
every machine, although the bytes of the PNG files depend on the version of zlib.

The folder gets its name when all its files are written. A set is made again if files are missing or
do not have the size in the fingerprint.

Masks are RLE, as polygons are not exact to the pixel and cannot have the hole of a ring. Training
therefore needs `INPUT.MASK_FORMAT: "bitmask"`.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util
from tqdm import tqdm

from ws_detectron.data.images import read_rgb
from ws_detectron.errors import UserError
from ws_detectron.lab.cache import CACHE_VARIABLE, cache_root
from ws_detectron.utils.io import locked

from .scene import GENERATOR_VERSION, KINDS, SPLITS, Scene, SceneSpec, make_scene, sprite_source
from .sprites import SpriteSource

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations.json"
IMAGES = "images"
FINGERPRINT = "fingerprint.json"
# Higher levels save 10 % of the space and take 3 times as long.
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)
_PROGRESS_SECONDS = 10.0
# Images per task of a worker.
_CHUNK = 50
_LICENSES = {
    "shapes": {"name": "Apache License 2.0", "url": "http://www.apache.org/licenses/LICENSE-2.0"},
    "fashion": {
        "name": "MIT License, Zalando SE (Fashion-MNIST)",
        "url": "https://github.com/zalandoresearch/fashion-mnist/blob/master/LICENSE",
    },
}


def scene_folder(spec: SceneSpec, root: Optional[Union[str, Path]] = None) -> Path:
    """The folder of a set of scenes, whether it exists or not; its name depends on all parameters.

    Args:
        spec: the scenes.
        root: `cache_root()` by default.
    """
    text = json.dumps([GENERATOR_VERSION, spec.as_dict()], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    root = cache_root() if root is None else Path(os.path.expanduser(root)).absolute()
    return root / "scenes" / f"{spec.kind}_{spec.image_size}_{spec.split}_{key}"


def ensure_scenes(
    spec: SceneSpec, root: Optional[Union[str, Path]] = None, workers: int = 1
) -> Path:
    """Makes a set of scenes unless it exists, and returns its folder.

    If several processes request the same set at once, one makes it and the others wait.

    Args:
        spec: the scenes.
        root: `cache_root()` by default.
        workers: number of processes; the result does not depend on it.

    Raises:
        UserError: the folder cannot be written, Fashion-MNIST is needed but not available, or
            `workers` is below 1.
    """
    if workers < 1:
        raise UserError(f"scenes: workers must be at least 1, got {workers}")
    folder = scene_folder(spec, root)
    if find_damage(folder) is None:
        return folder
    try:
        with locked(folder.with_name(f"{folder.name}.lock"), busy=None):
            damage = find_damage(folder)
            if damage is not None:
                if folder.exists():
                    logger.warning("making %s again: %s", folder, damage)
                _build(spec, folder, workers)
    except OSError as error:
        raise UserError(
            f"cannot write scenes to {folder}: {error.strerror or error}. Set {CACHE_VARIABLE} to "
            "a writable folder with free space."
        ) from error
    return folder


def find_damage(folder: Path) -> Optional[str]:
    """Why a folder is not a finished set, or None if it is.

    Checks the size of each file, which takes milliseconds; reads no image.
    """
    path = folder / FINGERPRINT
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({error})"
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{folder / name} is missing"
        if found != size:
            return f"{folder / name} has {found} bytes, expected {size}"
    return None


def scene_annotations(scene: Scene, image_id: int) -> list[dict[str, Any]]:
    """The COCO annotations of a scene, without ids, with `category_id` from 1.

    Two keys are not COCO's: `full_area`, the number of pixels of the whole object, of which `area`
    are visible, and for articles `source_index`, the index in the split of Fashion-MNIST.
    """
    annotations = []
    for item in scene.objects:
        rle = mask_util.encode(np.asfortranarray(item.mask.astype(np.uint8)))
        annotation = {
            "image_id": image_id,
            "category_id": item.category + 1,
            "segmentation": {"size": list(item.mask.shape), "counts": rle["counts"].decode()},
            "bbox": list(item.box),
            "area": item.area,
            "iscrowd": 0,
            "full_area": item.full_area,
        }
        if item.source_index is not None:
            annotation["source_index"] = item.source_index
        annotations.append(annotation)
    return annotations


class _Written(NamedTuple):
    """The result of writing an image."""

    name: str
    file_size: int
    pixels: str  # SHA-256 of the image
    annotations: list[dict[str, Any]]


@lru_cache(maxsize=1)
def _source(spec: SceneSpec) -> SpriteSource:
    return sprite_source(spec)


def _write_image(spec: SceneSpec, folder: Path, index: int) -> _Written:
    scene = make_scene(spec, index, _source(spec))
    done, packed = cv2.imencode(".png", scene.image[:, :, ::-1], _PNG)
    if not done:
        raise RuntimeError("OpenCV could not encode a PNG image")
    name = f"{index + 1:06d}.png"
    (folder / IMAGES / name).write_bytes(packed.tobytes())
    pixels = hashlib.sha256(scene.image.tobytes()).hexdigest()
    return _Written(name, len(packed), pixels, scene_annotations(scene, index + 1))


def _write_images(spec: SceneSpec, folder: Path, workers: int) -> list[_Written]:
    write, indices = partial(_write_image, spec, folder), range(spec.num_images)
    progress = partial(tqdm, total=len(indices), unit="scene", mininterval=_PROGRESS_SECONDS)
    # Made here even for other workers, so that data are downloaded, or reported missing, once.
    _source(spec)
    try:
        if workers == 1:
            return list(progress(map(write, indices)))
        with ProcessPoolExecutor(workers) as pool:
            return list(progress(pool.map(write, indices, chunksize=_CHUNK)))
    finally:
        _source.cache_clear()  # Fashion-MNIST takes 47 MB


def _build(spec: SceneSpec, folder: Path, workers: int) -> None:
    """Writes a set to a hidden folder and renames that; the caller holds the lock."""
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        (scratch / IMAGES).mkdir(parents=True)
        _write_set(spec, scratch, workers)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_set(spec: SceneSpec, folder: Path, workers: int) -> None:
    logger.info("making %d scenes (%s, %d pixels)", spec.num_images, spec.kind, spec.image_size)
    begun = time.monotonic()
    written = _write_images(spec, folder, workers)
    data = _coco(spec, written)
    text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    (folder / ANNOTATIONS).write_bytes(text)
    content = [data["categories"], [image.pixels for image in written], data["annotations"]]
    files = {f"{IMAGES}/{image.name}": image.file_size for image in written}
    fingerprint = {
        "generator_version": GENERATOR_VERSION,
        "spec": spec.as_dict(),
        "digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "files": {ANNOTATIONS: len(text), **files},
    }
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
    logger.info("made %d scenes in %.1f s", spec.num_images, time.monotonic() - begun)


def _coco(spec: SceneSpec, written: list[_Written]) -> dict[str, Any]:
    annotations = [annotation for image in written for annotation in image.annotations]
    return {
        "info": {
            "description": f"ws_detectron scenes: {spec.kind}, {spec.split} split",
            "version": str(GENERATOR_VERSION),
            "contributor": "ws_detectron",
            "spec": spec.as_dict(),
        },
        "licenses": [{"id": 1, **_LICENSES[spec.kind]}],
        "categories": [
            {"id": number, "name": name, "supercategory": spec.kind}
            for number, name in enumerate(spec.classes, start=1)
        ],
        "images": [
            {
                "id": number,
                "file_name": image.name,
                "height": spec.image_size,
                "width": spec.image_size,
                "license": 1,
            }
            for number, image in enumerate(written, start=1)
        ],
        "annotations": [
            {**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)
        ],
    }


BUILTIN_SIZES = (128, 256, 512, 800)


def builtin_scenes() -> dict[str, SceneSpec]:
    """Name -> scenes, as registered when `ws_detectron.lab.scenes` is imported."""
    return {
        f"scenes_{kind}_{size}_{split}": SceneSpec.for_size(kind, size, split)
        for kind in KINDS
        for size in BUILTIN_SIZES
        for split in SPLITS
    }


def register_scenes(name: str, spec: SceneSpec, root: Optional[Union[str, Path]] = None) -> None:
    """Registers a set of scenes with detectron2 under `name`.

    `DatasetCatalog.get(name)`, called when a data loader is built, makes the set unless it exists.
    `json_file` in the metadata is set at once, so build the test loader before `COCOEvaluator`, as
    `DefaultTrainer.test` does, or call `ensure_scenes` first.

    A second call with the same arguments is a no-op; one with others replaces the first.

    Args:
        name: for `DATASETS.TRAIN` and `DATASETS.TEST`.
        spec: the scenes.
        root: `cache_root()` by default, as of this call.

    Raises:
        ValueError: the name belongs to a data set that is not scenes.
    """
    folder = scene_folder(spec, root)
    json_file, image_root = str(folder / ANNOTATIONS), str(folder / IMAGES)
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if metadata.get("scene_spec") is None:
            raise ValueError(f"data set name {name!r} is taken by a data set that is not scenes")
        if metadata.json_file == json_file:
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    # the root as of now, so that data and metadata agree
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


def summarize(folder: Path) -> str:
    """Counts, sizes and digest of a set, as several lines of text.

    Args:
        folder: as returned by `ensure_scenes`.
    """
    data = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
    fingerprint = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
    annotations = data["annotations"]
    per_image = Counter(a["image_id"] for a in annotations)
    per_class = Counter(a["category_id"] for a in annotations)
    sides = np.array([max(a["bbox"][2:]) for a in annotations])
    visible = np.array([a["area"] / a["full_area"] for a in annotations])
    small, middle, large = np.percentile(sides, (5, 50, 95))
    classes = ", ".join(f"{c['name']} {per_class[c['id']]}" for c in data["categories"])
    counts = per_image.values()
    return "\n".join(
        (
            str(folder),
            f"  images    {len(data['images'])}, {sum(fingerprint['files'].values()) / 1e6:.1f} MB",
            f"  objects   {len(annotations)}: {min(counts)} to {max(counts)} per image, "
            f"{len(annotations) / len(data['images']):.2f} on average",
            f"  sides     {small:.0f} / {middle:.0f} / {large:.0f} pixels "
            "(5th / 50th / 95th percentile of the longer sides)",
            f"  visible   at least {visible.min():.0%} of each object; "
            f"{np.mean(visible < 0.95):.0%} of the objects are hidden by more than 5 %",
            f"  classes   {classes}",
            f"  digest    {fingerprint['digest']}",
        )
    )


def contact_sheet(
    name: str, records: list[dict[str, Any]], columns: int = 4, longer_side: int = 384
) -> np.ndarray:
    """Draws scenes with their annotated masks, boxes and classes, side by side.

    Args:
        name: of the registered data set of the records.
        records: in detectron2's standard format.
        columns: pictures per row.
        longer_side: of a picture, pixels; scenes are enlarged without smoothing.

    Returns:
        (H, W, 3) uint8, RGB; the rest of the last row is white.
    """
    from torchvision.utils import make_grid

    from ws_detectron.evaluation.drawing import draw_entries  # loads Matplotlib

    classes = dict(enumerate(MetadataCatalog.get(name).thing_classes))
    pictures = [
        draw_entries(read_rgb(r["file_name"]), longer_side, r["annotations"], classes)
        for r in records
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return make_grid(images, columns, padding=0, pad_value=255).permute(1, 2, 0).numpy()
