"""What a user can get wrong, found before the first iteration."""

import difflib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ws_detectron.errors import ConfigError, DataError, UserError

COCO_KEYS = ("images", "annotations", "categories")


def check_run(cfg: CfgNode, *, num_gpus: int, world_size: int, eval_only: bool) -> None:
    """Checks a config against this machine before any process is started.

    Args:
        cfg: the merged config.
        num_gpus: `--num-gpus`, the number of processes on this machine.
        world_size: processes in the whole job.
        eval_only: whether no training is asked for.

    Raises:
        UserError: with one message that names key or path, what was found and what is allowed.
    """
    check_device(cfg, num_gpus)
    check_weights(cfg)
    check_registered(cfg)
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    if not eval_only:
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        if not cfg.DATASETS.TRAIN:
            raise ConfigError("DATASETS.TRAIN is empty; name at least one data set to train on")
        check_batch(cfg, world_size)


def check_device(cfg: CfgNode, num_gpus: int) -> None:
    """MODEL.DEVICE, the number of GPUs, and what runs only on GPUs."""
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise ConfigError(
                f"MODEL.DEVICE is {device!r}, but no CUDA device was found; "
                "to run on the CPU add: MODEL.DEVICE cpu"
            )
        if num_gpus > found:
            raise UserError(f"--num-gpus is {num_gpus}, but this machine has {found}")
    elif device == "cpu":
        if cfg.SOLVER.AMP.ENABLED:
            raise ConfigError("SOLVER.AMP.ENABLED is True, which needs MODEL.DEVICE cuda")
        for key, norm in norm_keys(cfg).items():
            if norm in ("SyncBN", "nnSyncBN"):
                raise ConfigError(
                    f'{key} is "{norm}", which torch runs on GPUs only; on the CPU use "GN", which '
                    'needs no other images, "BN", or MODEL.DEVICE cuda'
                )
    if num_gpus < 1:
        raise UserError(
            f"--num-gpus is {num_gpus}; allowed: 1 or more (with MODEL.DEVICE cpu it is the number "
            "of CPU processes)"
        )


def norm_keys(cfg: CfgNode) -> dict[str, str]:
    """The norm keys that the model of a config reads, with their values."""
    nodes = ["RESNETS", "FPN"]
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "RetinaNet":
        nodes.append("RETINANET")
    else:
        nodes.append("ROI_BOX_HEAD")
        if cfg.MODEL.MASK_ON:
            nodes.append("ROI_MASK_HEAD")
    if architecture in ("PanopticFPN", "SemanticSegmentor"):
        nodes.append("SEM_SEG_HEAD")
    return {f"MODEL.{node}.NORM": cfg.MODEL[node].NORM for node in nodes}


def check_weights(cfg: CfgNode) -> None:
    """MODEL.WEIGHTS, where it is a path on this machine, names a file."""
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not Path(weights).is_file():
        raise ConfigError(
            f"MODEL.WEIGHTS is {weights!r}, which is no file; "
            'allowed: a checkpoint, a name like detectron2://..., or "" for random weights'
        )


def check_batch(cfg: CfgNode, world_size: int) -> None:
    """SOLVER.IMS_PER_BATCH can be shared out evenly to processes, and there to parts."""
    images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if images < 1:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is {images}; allowed: 1 or more")
    if cfg.SOLVER.REFERENCE_IMS_PER_BATCH < 0:
        raise ConfigError(
            f"SOLVER.REFERENCE_IMS_PER_BATCH is {cfg.SOLVER.REFERENCE_IMS_PER_BATCH}; allowed: the "
            "batch that LR and schedule are meant for, or 0 for no scaling"
        )
    if reference and images % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}, not a multiple of SOLVER.REFERENCE_WORLD_SIZE, "
            f"{reference}; set the batch to a multiple, or REFERENCE_WORLD_SIZE to 0 to turn the "
            "scaling to the number of processes off"
        )
    if not reference and images % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}, not a multiple of the {world_size} processes"
        )
    parts, per_process = cfg.SOLVER.ACCUMULATE_STEPS, images // (reference or world_size)
    if parts < 1 or per_process % parts:
        raise ConfigError(
            f"SOLVER.ACCUMULATE_STEPS is {parts}; allowed: a divisor of the {per_process} image(s) "
            "per process and optimizer step, as each part gets equally many (1: no accumulation). "
            "SOLVER.IMS_PER_BATCH counts the images of all parts"
        )


def check_datasets(key: str, names: Sequence[str]) -> None:
    """Every data set is registered, and its annotation file and image folder are there.

    Raises:
        ConfigError: an unregistered name; says which registered names look like it.
        UserError: a missing file or folder; says the path and how to set DETECTRON2_DATASETS.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(
                f"{key} names {name!r}, which is not a registered data set{hint}"
                "; DATASETS.REGISTER registers those of one's own"
            )
        metadata = MetadataCatalog.get(name)
        if metadata.get("scene_spec") is not None:  # made when it is first loaded
            continue
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path and not PathManager.exists(path):
                root = os.environ.get("DETECTRON2_DATASETS", "not set, which means ./datasets")
                remedy = (
                    "set DETECTRON2_DATASETS to the folder that holds coco/annotations and "
                    f"coco/train2017, coco/val2017 (now: {root})"
                )
                if metadata.get("named_by"):
                    remedy = f"{metadata.named_by} names it"
                raise UserError(
                    f"data set {name} ({key}) needs {os.path.abspath(path)}, which does not exist; "
                    f"{remedy}"
                )


def check_registered(cfg: CfgNode) -> None:
    """Data sets of one's own are those of this config, not of another one in the same process.

    Raises:
        ConfigError: a set that only another config's DATASETS.REGISTER has registered.
    """
    registered = [name for name, *_ in cfg.DATASETS.REGISTER]
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if MetadataCatalog.get(name).get("named_by") and name not in registered:
                raise ConfigError(
                    f"DATASETS.{key} names {name!r}, which DATASETS.REGISTER does not; there: "
                    f"{', '.join(registered) or 'nothing'}"
                )


def make_output_dir(cfg: CfgNode) -> None:
    """Makes OUTPUT_DIR, in which detectron2 opens files at once.

    Raises:
        ConfigError: it cannot be made, or no file can be written there.
    """
    try:
        PathManager.mkdirs(cfg.OUTPUT_DIR)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be made: {error}") from error
    try:
        with tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be written to: {error.strerror or error}"
        ) from error


def check_classes(cfg: CfgNode) -> None:
    """The model has a class for each of the training data, once these are loaded."""
    parts = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}
    part = parts.get(cfg.MODEL.META_ARCHITECTURE)
    if part is None:  # the keys of somebody's own model are not known
        return
    for name in cfg.DATASETS.TRAIN:
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if len(classes) > cfg.MODEL[part].NUM_CLASSES:
            raise ConfigError(
                f"MODEL.{part}.NUM_CLASSES is {cfg.MODEL[part].NUM_CLASSES}, but {name} has "
                f"{len(classes)} classes: {', '.join(classes[:10])}{', ...' * (len(classes) > 10)}"
            )


def differing_classes(train: Sequence[str], test: str) -> list[str]:
    """Sentences on training sets, once loaded, whose classes are not those of a test set.

    A model knows classes by their number, so its predictions would be of other classes there.
    """
    tested = MetadataCatalog.get(test).get("thing_classes")
    found = []
    for name in train:
        trained = MetadataCatalog.get(name).get("thing_classes")
        if tested and trained and list(tested) != list(trained):
            found.append(
                f"{test} has the classes {', '.join(tested[:10])} ({len(tested)}) and {name} "
                f"{', '.join(trained[:10])} ({len(trained)}): AP is wrong, unless these are other "
                "names of the same in the same order; give both files the same `categories`"
            )
    return found


def explain_annotations(names: Sequence[str]) -> None:
    """Looks into the annotation files after loading them has failed.

    Raises:
        DataError: a file is not COCO JSON; names it and what is wrong. Where all are, returns.
    """
    for name in names:
        path = MetadataCatalog.get(name).get("json_file")
        if not path:
            continue
        try:
            with PathManager.open(path) as file:
                content = json.load(file)
        except (OSError, ValueError) as error:
            raise DataError(f"annotations of {name}, {path}, are not JSON: {error}") from error
        missing = (
            [key for key in COCO_KEYS if not isinstance(content.get(key), list)]
            if isinstance(content, dict)
            else list(COCO_KEYS)
        )
        if missing:
            raise DataError(
                f"annotations of {name}, {path}, are not COCO JSON: the lists "
                f"{', '.join(missing)} are missing (needed: {', '.join(COCO_KEYS)})"
            )
