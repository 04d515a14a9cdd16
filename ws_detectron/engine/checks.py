"""Checks of a config: what cannot run is refused, what runs but trains badly is warned of."""

import difflib
import logging
import math
import os
from collections.abc import Sequence
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Optional, Union

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.utils.file_io import PathManager

from ws_detectron.data import check_coco_set, keypoint_names, mirrored
from ws_detectron.errors import ConfigError, UserError, shown
from ws_detectron.modeling import REGISTRATIONS, WSSettings, check_depth, stock_name

logger = logging.getLogger(__name__)

COCO_KEYPOINTS = 17

# detectron2's and mmdetection's Faster and Mask R-CNN baselines; RetinaNet's LR is half of it
REFERENCE_LR, REFERENCE_BATCH = 0.02, 16
# Half or twice the LR of the linear rule is common tuning. An LR that was not scaled is off by the
# ratio of the batches, usually 4 or more.
MAX_LR_RATIO = 3.0
SMALL_BATCH = 2
# What suits most data sets, and the factor by which a schedule must be longer to be an oversight.
USUAL_EPOCHS, MANY_TIMES = 100, 10
SYNC_BN = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

# Node of NUM_CLASSES by architecture
_CLASSES_IN = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}


class Purpose(Enum):
    """What a config is prepared for, which decides what its data must have."""

    TRAIN = "training, with detectron2's evaluations"
    EVALUATE = "detectron2's evaluation"
    REPORT = "our evaluation of boxes and masks, which needs annotations"


def check_device(cfg: CfgNode, num_gpus: int = 1) -> None:
    """Checks MODEL.DEVICE, the number of GPUs, and settings that need a GPU."""
    check_machine(cfg.MODEL.DEVICE, num_gpus)
    if cfg.MODEL.DEVICE == "cpu":
        if cfg.SOLVER.AMP.ENABLED:
            raise ConfigError("SOLVER.AMP.ENABLED is True, which needs MODEL.DEVICE cuda")
        for key, norm in norm_keys(cfg).items():
            if norm in ("SyncBN", "nnSyncBN"):
                raise ConfigError(
                    f'{key} is "{norm}", which torch runs on GPUs only; on the CPU use "GN", which '
                    'needs no other images, "BN", or MODEL.DEVICE cuda'
                )


def check_machine(
    device: str, num_gpus: int, key: str = "MODEL.DEVICE", remedy: str = "MODEL.DEVICE cpu"
) -> None:
    """Checks that this machine has the device and the number of GPUs that are asked for.

    Args:
        device: such as "cuda" or "cpu".
        num_gpus: --num-gpus.
        key: the config key of `device`, for messages.
        remedy: the override that sets the CPU, for messages.
    """
    if device.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise ConfigError(
                f"{key} is {device!r}, but no CUDA device was found; "
                f"to run on the CPU add: {remedy}"
            )
        if num_gpus > found:
            raise UserError(f"--num-gpus is {num_gpus}, but this machine has {found}")
    if num_gpus < 1:
        raise UserError(
            f"--num-gpus is {num_gpus}; allowed: 1 or more (with {remedy} it is the number "
            "of CPU processes)"
        )


def norm_keys(cfg: CfgNode) -> dict[str, str]:
    """The norm keys that the model of a config reads, with their values."""
    nodes = ["RESNETS", "FPN"]
    architecture = stock_architecture(cfg)
    if architecture == "RetinaNet":
        nodes.append("RETINANET")
    else:
        nodes.append("ROI_BOX_HEAD")
        if cfg.MODEL.MASK_ON:
            nodes.append("ROI_MASK_HEAD")
    if architecture in ("PanopticFPN", "SemanticSegmentor"):
        nodes.append("SEM_SEG_HEAD")
    return {f"MODEL.{node}.NORM": cfg.MODEL[node].NORM for node in nodes}


def stock_architecture(cfg: CfgNode) -> str:
    return stock_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)


def number_of_classes(cfg: CfgNode) -> tuple[str, Optional[int]]:
    """The key of the number of classes, and its value; "" and None for custom architectures."""
    part = _CLASSES_IN.get(stock_architecture(cfg))
    return (f"MODEL.{part}.NUM_CLASSES", cfg.MODEL[part].NUM_CLASSES) if part else ("", None)


def check_weights(cfg: CfgNode) -> None:
    """Checks that MODEL.WEIGHTS, where it is a local path, names a file."""
    check_weights_path("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)


def check_weights_path(key: str, weights: str) -> None:
    """Checks that the value of a config key, where it is a local path, names a file."""
    if weights and "://" not in weights and not Path(weights).is_file():
        raise ConfigError(
            f"{key} is {weights!r}, which is not a file; "
            'allowed: a checkpoint, a name like detectron2://..., or "" for random weights'
        )


def check_backbone(cfg: CfgNode) -> None:
    """Depth and FPN inputs are ones that detectron2's ResNet builders take, where one is used."""
    backbone = cfg.MODEL.BACKBONE.NAME
    if backbone not in {name for row in REGISTRATIONS for name in (row.name, row.stock)}:
        return
    check_depth(cfg)
    if "fpn" in backbone and not cfg.MODEL.FPN.IN_FEATURES:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is empty, but {backbone} needs some. "
            "Files in configs/norms, weights and schedules are parts of configs: name a whole one"
        )


def check_batch(cfg: CfgNode, world_size: int) -> None:
    """Checks that processes, and the parts of each, divide SOLVER.IMS_PER_BATCH."""
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
            f"{reference}; set the batch to a multiple, or REFERENCE_WORLD_SIZE to 0 to turn off "
            "scaling to the number of processes"
        )
    if not reference and images % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}, not a multiple of the {world_size} processes"
        )
    parts, per_process = cfg.SOLVER.ACCUMULATE_STEPS, images // (reference or world_size)
    if parts < 1 or per_process % parts:
        raise ConfigError(
            f"SOLVER.ACCUMULATE_STEPS is {parts}; allowed: a divisor of the {per_process} image(s) "
            "per process and optimizer step (1: no accumulation). SOLVER.IMS_PER_BATCH counts the "
            "images of all parts"
        )


def check_datasets(key: str, names: Union[str, Sequence[str]], files: bool = True) -> None:
    """Checks that data sets are registered, and that annotation files and image folders exist.

    Args:
        key: config key or option that names them, for messages.
        names: data sets.
        files: whether their files are needed; False where only their classes are used.

    Raises:
        ConfigError: a name is not registered; suggests similar names.
        UserError: a file or folder is missing; says the path and how to set DETECTRON2_DATASETS.
    """
    if isinstance(names, str):
        raise ConfigError(f"{key} is the text {names!r}; allowed: a list of names, ({names!r},)")
    for name in names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            if name.startswith("scenes_"):
                hint += "; `import ws_detectron.lab.scenes` registers the scenes that come with it"
            raise ConfigError(
                f"{key} names {name!r}, which is not a registered data set{hint}"
                "; DATASETS.REGISTER registers your own"
            )
        metadata = MetadataCatalog.get(name)
        if not files or metadata.get("scene_spec") is not None:  # made when it is first loaded
            continue
        annotations = metadata.get("given_json_file", metadata.get("json_file"))
        for path in (annotations, metadata.get("image_root")):
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
    """Checks that no data set was registered by another config in the same process.

    Raises:
        ConfigError: a data set is only in another config's DATASETS.REGISTER.
    """
    registered = [name for name, *_ in cfg.DATASETS.get("REGISTER") or ()]
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if MetadataCatalog.get(name).get("named_by") and name not in registered:
                raise ConfigError(
                    f"DATASETS.{key} names {name!r}, which DATASETS.REGISTER does not; there: "
                    f"{', '.join(registered) or 'nothing'}"
                )


def check_annotations(
    output_dir: str,
    train: Sequence[str],
    test: Sequence[str],
    *,
    classes: int,
    masks: bool,
    keypoints: bool,
    mask_format: str,
    report: bool = False,
) -> dict[str, str]:
    """Reads and checks the annotation files of data sets.

    Args:
        output_dir: fixed copies are written to its folder `annotations`.
        train, test: names of data sets.
        classes: number of classes that the model predicts; 0 if unknown.
        masks, keypoints: whether the model has them.
        mask_format: INPUT.MASK_FORMAT.
        report: whether they are for our own evaluation, which needs annotations.

    Returns:
        Data set -> the file to read instead, for `use_annotations`.

    Raises:
        DataError: a file cannot be used; see `ws_detectron.data.validate`.
    """
    copies = {}
    for name in dict.fromkeys((*train, *test)):
        of_training = name in train
        copy = check_coco_set(
            name,
            output_dir,
            train=of_training,
            classes=classes if name in test else 0,
            masks=masks,
            keypoints=keypoints,
            require_annotations=report or of_training,
            mask_format=mask_format if masks and of_training else "",
        )
        if copy:
            copies[name] = copy
    return copies


def training_records(cfg: CfgNode, proposal_files: Optional[Sequence[str]] = None) -> list[dict]:
    """Loads the images to train on, in detectron2's format, without those that it skips.

    Skipped are images without objects (DATALOADER.FILTER_EMPTY_ANNOTATIONS) or with too few
    keypoints.

    Args:
        cfg: DATASETS.TRAIN is not empty.
        proposal_files: for each data set, checked to run no code.
    """
    fewest = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=fewest if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=proposal_files,
    )


def check_keypoints(cfg: CfgNode, *, train: bool) -> dict[str, list[str]]:
    """With MODEL.KEYPOINT_ON, checks that model, data sets and OKS sigmas have the same keypoints.

    Warns of keypoints that a horizontal flip would leave on the wrong side.

    Args:
        cfg: a merged config.
        train: whether DATASETS.TRAIN is used as well as DATASETS.TEST.

    Returns:
        Data set -> names of its keypoints.

    Raises:
        ConfigError: numbers or names of keypoints differ; names the keys.
        DataError: see `keypoint_names`.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return {}
    number, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    found: dict[str, int] = {}
    listed: dict[str, list[str]] = {}
    for key in ("TRAIN", "TEST") if train else ("TEST",):
        for name in cfg.DATASETS[key]:
            names = keypoint_names(name)
            if names is not None:
                listed[name] = names
                found[f"{name} (DATASETS.{key})"] = len(names)
            elif key == "TRAIN":
                raise ConfigError(
                    f"DATASETS.TRAIN names {name}, which has no annotation file; its metadata "
                    "needs keypoint_names and keypoint_flip_map, as MODEL.KEYPOINT_ON is True"
                )
    if cfg.DATASETS.TEST:
        empty = "" if sigmas else " (empty: COCO's)"
        found[f"TEST.KEYPOINT_OKS_SIGMAS{empty}"] = len(sigmas) or COCO_KEYPOINTS
    differing = [f"{what} has {count}" for what, count in found.items() if count != number]
    if differing:
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, but {'; '.join(differing)}; all "
            "must be the same"
        )
    first = next(iter(listed), "")
    for name, names in listed.items():
        if names != listed[first]:
            raise ConfigError(
                f"keypoints of {first} are {listed[first]}, those of {name} are {names}; give "
                "both files the same `keypoints` in the same order"
            )
    if not all(isinstance(s, (int, float)) and 0 < s < math.inf for s in sigmas):
        raise ConfigError(f"TEST.KEYPOINT_OKS_SIGMAS is {sigmas}; allowed: numbers above 0")
    if train and cfg.INPUT.RANDOM_FLIP == "horizontal":
        for name in cfg.DATASETS.TRAIN:
            _warn_of_flips(name)
    return listed


def _warn_of_flips(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    paired = {keypoint for pair in metadata.keypoint_flip_map for keypoint in pair}
    alone = [k for k in metadata.keypoint_names if k not in paired]
    if not paired or any(mirrored(k) != k for k in alone):
        logger.warning(
            "INPUT.RANDOM_FLIP is horizontal, and these keypoints of %s have no partner on the "
            "other side, so they keep their names when an image is flipped: %s. Pairs are found by "
            "`left` and `right` in their names. If these keypoints do have sides, set "
            "INPUT.RANDOM_FLIP to none",
            name,
            ", ".join(map(shown, alone)),
        )


def find_warnings(cfg: CfgNode, world_size: int, images: int) -> list[str]:
    """One sentence for each setting of a training config that looks wrong, with its remedy.

    Args:
        cfg: scaled to the batch and to `world_size`, see `scaling`.
        world_size: processes in the job.
        images: number of images to train on; 0 if unknown.
    """
    return [
        *_unused_classes(cfg),
        *_length(cfg, images),
        *_small_batch_norm(cfg, world_size),
        *_frozen_random_layers(cfg),
        *_far_off_lr(cfg),
        *_settings_without_effect(cfg),
    ]


def _unused_classes(cfg: CfgNode) -> list[str]:
    """Classes of the model that the training data, which must be loaded, do not have."""
    key, number = number_of_classes(cfg)
    found = {
        name: len(MetadataCatalog.get(name).get("thing_classes", ())) for name in cfg.DATASETS.TRAIN
    }
    return [
        f"{key} is {number}, but {name} has {count} classes; set {key} {count}: evaluation on "
        "these classes fails if the model predicts another"
        for name, count in found.items()
        if number and 0 < count < number
    ]


def _length(cfg: CfgNode, images: int) -> list[str]:
    """A schedule for many more images, or one that ends before its first evaluation."""
    steps, period, found = cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, []
    epochs = steps * cfg.SOLVER.IMS_PER_BATCH / images if images else 0
    if epochs > MANY_TIMES * USUAL_EPOCHS:
        found.append(
            f"SOLVER.MAX_ITER {steps:,} is {epochs:,.0f} epochs of the {images:,} training images; "
            f"to train for {USUAL_EPOCHS} epochs, which is enough for most data, set SOLVER.EPOCHS "
            f"{USUAL_EPOCHS}: milestones, warm-up and periods follow"
        )
    if cfg.DATASETS.TEST and period > steps:
        found.append(
            f"TEST.EVAL_PERIOD is {period:,}, more than SOLVER.MAX_ITER, {steps:,}: the model is "
            "evaluated once, at the end; lower TEST.EVAL_PERIOD to follow the training, or set it "
            "to 0 to evaluate at the end alone"
        )
    return found


def _small_batch_norm(cfg: CfgNode, world_size: int) -> list[str]:
    """Trainable BN over one or two images; SyncBN is BN where there is nothing to synchronize."""
    norms = ("BN", *SYNC_BN) if world_size == 1 else ("BN",)
    keys = [key for key, norm in norm_keys(cfg).items() if norm in norms]
    images = cfg.SOLVER.IMS_PER_BATCH // (world_size * cfg.SOLVER.ACCUMULATE_STEPS)
    if not keys or images > SMALL_BATCH:
        return []
    parts = cfg.SOLVER.ACCUMULATE_STEPS
    return [
        f"{', '.join(keys)}: BN computes its statistics over {images} image(s) at a time "
        f"(SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} over {world_size} process(es)"
        + (f" and {parts} parts; accumulation does not make BN's batch larger" if parts > 1 else "")
        + '), too few to train well; use "GN" with WS (configs/norms/gn_ws.yaml), "SyncBN" on '
        'several GPUs, "FrozenBN" with pretrained weights, or more images per GPU'
    ]


def _frozen_random_layers(cfg: CfgNode) -> list[str]:
    """Layers that would keep their random initialization."""
    if cfg.MODEL.WEIGHTS:
        return []
    found = []
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        found.append(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT} and MODEL.WEIGHTS is "
            "empty: the frozen stages would stay random; set MODEL.BACKBONE.FREEZE_AT 0, or name "
            "weights"
        )
    keys = [key for key, norm in norm_keys(cfg).items() if norm == "FrozenBN"]
    if keys:
        found.append(
            f'{", ".join(keys)}: "FrozenBN" without MODEL.WEIGHTS keeps mean 0 and variance 1 and '
            'normalizes nothing; use "GN" (with WS: configs/norms/gn_ws.yaml), or name weights'
        )
    return found


def _far_off_lr(cfg: CfgNode) -> list[str]:
    """An LR that was not scaled with the batch, in a config that states no reference batch."""
    solver = cfg.SOLVER
    if solver.REFERENCE_IMS_PER_BATCH or not solver.BASE_LR:  # LR 0: a dry run
        return []
    expected = REFERENCE_LR * solver.IMS_PER_BATCH / REFERENCE_BATCH
    ratio = solver.BASE_LR / expected
    times = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
    if 1 / MAX_LR_RATIO <= ratio <= MAX_LR_RATIO:
        return []
    return [
        f"SOLVER.BASE_LR is {solver.BASE_LR:g}, {times} what the linear rule gives for "
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: {expected:g} ({REFERENCE_LR} for "
        f"{REFERENCE_BATCH} images). If the config is for another batch, set "
        "SOLVER.REFERENCE_IMS_PER_BATCH to it, and LR and schedule are scaled; if this LR is "
        f"intended, set SOLVER.REFERENCE_IMS_PER_BATCH {solver.IMS_PER_BATCH}"
    ]


def _settings_without_effect(cfg: CfgNode) -> list[str]:
    """MODEL.WS settings that no part of the model reads."""
    settings = WSSettings.from_config(cfg).as_config()
    changed = [key for key, value in WSSettings().as_config().items() if settings[key] != value]
    # custom parts may read it
    registries = {row.key: row.registry for row in REGISTRATIONS}
    registries["MODEL.ROI_HEADS.NAME"] = ROI_HEADS_REGISTRY
    names = {key: attrgetter(key)(cfg) for key in registries}
    stock = [
        name in registries[key] and registries[key].get(name).__module__.startswith("detectron2.")
        for key, name in names.items()
        if name
    ]
    if not changed or not all(stock):
        return []
    readers = ", ".join(f"{key} {name}" for key, name in names.items() if name)
    return [
        f"{', '.join(f'MODEL.WS.{key} {settings[key]}' for key in changed)}: without effect, as "
        f"detectron2's own parts do not read it ({readers}); for a backbone that does, set "
        "MODEL.BACKBONE.NAME build_ws_resnet_fpn_backbone"
    ]
