"""Reads a config with its overrides, checks it, resolves its epochs and scales it, once.

`load_config` reads it. `prepare` checks and scales it: the tools call it before they start
processes, `Trainer` calls it for everybody else; a prepared config is not prepared again.
"""

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ws_detectron import model_zoo
from ws_detectron.config import add_ws_config
from ws_detectron.data import keypoint_names, register_coco_sets, use_annotations
from ws_detectron.errors import ConfigError, UserError
from ws_detectron.utils.yaml_files import check_integers, merge_config_file

from .checks import (
    Purpose,
    check_annotations,
    check_backbone,
    check_batch,
    check_datasets,
    check_device,
    check_keypoints,
    check_registered,
    check_weights,
    number_of_classes,
    training_records,
)
from .output_dir import make_output_dir
from .scaling import resolve_epochs, scale_config

logger = logging.getLogger(__name__)

# yacs evaluates text as Python literals, which raises these as well
_MERGE_ERRORS = (TypeError, AttributeError, RecursionError, MemoryError, OverflowError)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """detectron2's config with MODEL.WS, a config file and overrides merged in, not frozen.

    Registers the data sets of DATASETS.REGISTER and makes their paths absolute. Warns if an
    override changes the batch without LR and schedule.

    Args:
        config_file: a path, or the name of a config that comes with this package
            ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml"). Empty: defaults.
        opts: alternating keys and values, as on the command line.

    Raises:
        UserError: the file is missing or not YAML.
        ConfigError: the file would run code (see `yaml_files`), a key is unknown, a value has the
            wrong type, an entry of DATASETS.REGISTER is not valid, or SOLVER.MAX_ITER is
            overridden where SOLVER.EPOCHS counts.
    """
    cfg = get_cfg()
    add_ws_config(cfg)
    if config_file:
        path = find_config(config_file)
        try:
            merge_config_file(cfg, path)
        except UserError:
            raise
        except (KeyError, ValueError, AssertionError) as error:
            raise ConfigError(_explain(cfg, error, f"config file {config_file}")) from error
        except _MERGE_ERRORS as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, MemoryError):  # of Python's parser; 3.13 explains it
                reason = f"a value cannot be evaluated ({reason})"
            raise UserError(f"config file {config_file} is not a YAML config: {reason}") from error
    batch = cfg.SOLVER.IMS_PER_BATCH
    if len(opts) % 2:
        raise ConfigError(
            f"overrides are pairs of KEY VALUE; got an odd number of arguments: {' '.join(opts)}"
        )
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, *_MERGE_ERRORS) as error:
            raise ConfigError(_explain(cfg, error, f"override {key} {value}")) from error
    check_integers(cfg, "the config")  # again, as yacs evaluates text
    if cfg.SOLVER.EPOCHS and "SOLVER.MAX_ITER" in opts[::2] and "SOLVER.EPOCHS" not in opts[::2]:
        raise ConfigError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} would have no effect, as SOLVER.EPOCHS is "
            f"{cfg.SOLVER.EPOCHS}; add SOLVER.EPOCHS 0 to train for so many iterations, or set "
            "SOLVER.EPOCHS alone"
        )
    if cfg.SOLVER.IMS_PER_BATCH != batch and os.environ.get("RANK", "0") == "0":
        _warn_of_other_batch(cfg, batch, opts[::2])
    cfg.DATASETS.REGISTER = register_coco_sets(cfg.DATASETS.REGISTER)
    return cfg


def _warn_of_other_batch(cfg: CfgNode, batch: int, overridden: Sequence[str]) -> None:
    """Warns if LR and schedule are not scaled, or if overrides of them are."""
    asked, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    given = [key for key in overridden if key in ("SOLVER.BASE_LR", "SOLVER.MAX_ITER")]
    if "SOLVER.REFERENCE_IMS_PER_BATCH" in overridden:
        return
    if reference == 0 and "SOLVER.BASE_LR" not in given:
        logger.warning(
            f"SOLVER.IMS_PER_BATCH is {asked}, but LR and schedule of the config are for {batch}; "
            f"to scale them, add SOLVER.REFERENCE_IMS_PER_BATCH {batch}"
        )
    elif reference not in (0, asked) and given:
        logger.warning(
            f"{' and '.join(given)}: scaled from {reference} images, the config's "
            f"SOLVER.REFERENCE_IMS_PER_BATCH, to {asked}; to use them unscaled, add "
            f"SOLVER.REFERENCE_IMS_PER_BATCH {asked}"
        )


def find_config(config_file: str) -> str:
    """The path of a config file, given as a path or as the name of a packaged config.

    Raises:
        UserError: there is no such file or config.
    """
    if Path(config_file).is_file():
        return config_file
    return model_zoo.get_config_file(config_file)


def _explain(cfg: CfgNode, error: Exception, where: str) -> str:
    """The error's own text, and for an unknown key similar names."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    if len(text) > 400:  # yacs prints whole nodes; the key is at the end
        text = f"{text[:200]} … {text[-150:]}"
    message = f"{where}: {text}"
    if "key" in text.lower():
        unknown = text.rpartition(" ")[2] if isinstance(error, KeyError) else where.split()[1]
        names = {name: name for name in as_flat_dict(cfg)}
        names.update({name.rpartition(".")[2]: name for name in names})
        near = difflib.get_close_matches(unknown, names, n=3)
        if near:
            message += f" (did you mean {', '.join(sorted({names[n] for n in near}))}?)"
    return message


def as_flat_dict(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All values of a config under their full names: `{"MODEL.WS.MODE": "official", ...}`."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat.update(as_flat_dict(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


class Prepared(NamedTuple):
    """Arguments and results of `prepare`, kept with the config that it returns.

    Attributes:
        config: a copy, to detect later changes of the config.
        purpose: argument of `prepare`.
        world_size: argument of `prepare`.
        annotations: data set -> path of the fixed copy of its file.
        keypoints: data set -> names of its keypoints.
    """

    config: CfgNode
    purpose: Purpose
    world_size: int
    annotations: dict[str, str]
    keypoints: dict[str, list[str]]


PREPARED = "prepared"
"""Attribute of a config that `prepare` returned."""


def prepare(
    cfg: CfgNode, purpose: Purpose = Purpose.TRAIN, world_size: Optional[int] = None
) -> CfgNode:
    """Registers the data sets of a config, checks it and scales it; every process must call it.

    For a training, SOLVER.EPOCHS is turned into iterations first, by the number of its images. The
    main process reads annotation files. A prepared config, also one that was pickled, is not
    checked again; only its data sets are registered in this process. If it was changed since, it
    is prepared again.

    Args:
        cfg: not modified.
        purpose: what the config is used for.
        world_size: processes of the job that will run; None for those of this job.

    Returns:
        The scaled config, frozen if `cfg` is.

    Raises:
        UserError: one message that names key or path, what was found and what is allowed.
    """
    world_size = world_size or comm.get_world_size()
    register_coco_sets(cfg.DATASETS.get("REGISTER"))
    if "WS" not in cfg.MODEL:
        raise ConfigError("the config has no MODEL.WS; call ws_detectron.add_ws_config(cfg) first")
    prepared: Optional[Prepared] = cfg.__dict__.get(PREPARED)
    ready = prepared is not None and prepared[:3] == (cfg, purpose, world_size)
    # One process that has changed its config prepares it together with all others.
    if prepared is None or not all(comm.all_gather(ready)):
        prepared = _prepare(cfg, purpose, world_size)
        cfg = prepared.config.clone()
        cfg.__dict__[PREPARED] = prepared  # not a key; yacs stores whether it is frozen likewise
    use_annotations(prepared.annotations)
    for name, keypoints in prepared.keypoints.items():
        if MetadataCatalog.get(name).get("keypoint_names") is None:
            MetadataCatalog.get(name).keypoint_names = keypoints
        keypoint_names(name)  # sets keypoint_flip_map
    return cfg


def _prepare(cfg: CfgNode, purpose: Purpose, world_size: int) -> Prepared:
    train = purpose is Purpose.TRAIN
    check_device(cfg)
    check_weights(cfg)
    check_backbone(cfg)
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    if train:
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        check_batch(cfg, world_size)
    check_registered(cfg)
    annotations, keypoints, images = {}, {}, 0
    if comm.is_main_process():
        if train:
            make_output_dir(cfg.OUTPUT_DIR)
        report = purpose is Purpose.REPORT  # has its own check of classes
        annotations = check_annotations(
            cfg.OUTPUT_DIR,
            cfg.DATASETS.TRAIN if train else (),
            cfg.DATASETS.TEST,
            classes=0 if report else number_of_classes(cfg)[1] or 0,
            masks=cfg.MODEL.MASK_ON and not report,
            keypoints=cfg.MODEL.KEYPOINT_ON and not report,
            mask_format=cfg.INPUT.MASK_FORMAT,
            report=report,
        )
        if not report:
            use_annotations(annotations)
            keypoints = check_keypoints(cfg, train=train)
        if train and cfg.SOLVER.EPOCHS and cfg.DATASETS.TRAIN:
            images = len(training_records(cfg))
    annotations, keypoints, images = comm.all_gather((annotations, keypoints, images))[0]
    # An evaluation does not read the batch, which need not suit its processes.
    cfg = scale_config(resolve_epochs(cfg, images), world_size) if train else cfg.clone()
    cfg.__dict__.pop(PREPARED, None)
    return Prepared(cfg, purpose, world_size, annotations, keypoints)
