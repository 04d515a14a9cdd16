"""detectron2's data loaders, with errors that name the file."""

import io
import logging
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager

from ws_detectron.checkpoint.safe_pickle import RefusedPickle, load_plain_pickle
from ws_detectron.data.images import check_image_file, read_annotated, read_rgb
from ws_detectron.errors import ConfigError, DataError, shown

from .accumulation import part_of_batch
from .checks import CLASSES_IN, stock_architecture

logger = logging.getLogger(__name__)


class NamingMapper:
    """A dataset mapper whose errors name the image file.

    Args:
        mapper: maps a detectron2 dataset dict to a model input.
        masks: whether the model is trained on masks.
    """

    def __init__(self, mapper: Callable[[dict], Any], masks: bool = False) -> None:
        self._mapper = mapper
        self._masks = masks

    def __call__(self, dataset_dict: dict) -> Any:
        """Maps one example.

        Raises:
            DataError: an image cannot be read, is refused by `check_image_file` or has another size
                than annotated, or objects lack the masks that the model is trained on; names the
                file and the reason. For other errors of the mapper, the file is logged.
        """
        images = [dataset_dict[k] for k in ("file_name", "sem_seg_file_name") if k in dataset_dict]
        for image in images:
            check_image_file(image)
        name = dataset_dict.get("file_name", "an example without file_name")
        try:
            mapped = self._mapper(dataset_dict)
        except SizeMismatchError:
            read_annotated(dataset_dict)  # has a clearer message
            raise
        except Exception:
            for image in images:
                read_rgb(image)  # raises if the file is broken
            logger.error("the dataset mapper failed on %s", shown(name))
            raise
        instances: Any = mapped.get("instances", ()) if self._masks else ()
        if len(instances) and not instances.has("gt_masks"):
            raise DataError(
                f"the objects of {name} have boxes and no masks (`segmentation`), but "
                "MODEL.MASK_ON is True; set it to False to train on boxes"
            )
        return mapped


def build_train_loader(cfg: CfgNode) -> Iterable:
    """detectron2's training loader for DATASETS.TRAIN.

    With SOLVER.ACCUMULATE_STEPS its batches are the parts.

    Args:
        cfg: as returned by `prepare`, which registers data sets and their keypoints.

    Raises:
        DataError: proposal files would run code; while iterating, an image cannot be read.
        ConfigError: DATASETS.TRAIN is empty, or the data has more classes than the model.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name at least one data set to train on")
    check_proposals(cfg)
    cfg = part_of_batch(cfg)
    mapper = NamingMapper(DatasetMapper(cfg, is_train=True), masks=cfg.MODEL.MASK_ON)
    loader = build_detection_train_loader(cfg, mapper=mapper)
    check_classes(cfg)
    return loader


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable:
    """detectron2's test loader for one data set; see `build_train_loader`."""
    check_proposals(cfg)
    # the mapper would look up the keypoints of DATASETS.TRAIN, which an evaluation may not have
    boxes = cfg.clone()
    boxes.defrost()
    boxes.MODEL.KEYPOINT_ON = False
    mapper = NamingMapper(DatasetMapper(boxes, is_train=False))
    loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
    for difference in differing_classes(cfg.DATASETS.TRAIN, dataset_name):
        logger.warning(difference)
    return loader


def check_proposals(cfg: CfgNode) -> None:
    """Checks that proposal files, which detectron2 unpickles, run no code.

    Raises:
        DataError: a file cannot be read, or holds more than lists and numeric arrays.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        for name in cfg.DATASETS[key]:
            try:
                with PathManager.open(name, "rb") as file:
                    load_plain_pickle(io.BytesIO(file.read()))
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"DATASETS.{key}: cannot read {name}: {reason}") from error
            except (RefusedPickle, pickle.UnpicklingError) as error:
                raise DataError(
                    f"DATASETS.{key}: {name} is refused: it asks for {shown(error, 200)}; a "
                    "proposal file is a pickle of lists and numeric arrays"
                ) from error


def check_classes(cfg: CfgNode) -> None:
    """Checks that the model has a class for each of the training data, which must be loaded."""
    part = CLASSES_IN.get(stock_architecture(cfg))
    if part is None:
        return
    for name in cfg.DATASETS.TRAIN:
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if len(classes) > cfg.MODEL[part].NUM_CLASSES:
            raise ConfigError(
                f"MODEL.{part}.NUM_CLASSES is {cfg.MODEL[part].NUM_CLASSES}, but {name} has "
                f"{len(classes)} classes: {', '.join(classes[:10])}{', ...' * (len(classes) > 10)}"
            )


def differing_classes(train: Sequence[str], test: str) -> list[str]:
    """A warning for each training set, which must be loaded, with other classes than a test set.

    A model numbers its classes, so its predictions would mean other classes there.
    """
    tested = MetadataCatalog.get(test).get("thing_classes")
    found = []
    for name in train:
        trained = MetadataCatalog.get(name).get("thing_classes")
        if tested and trained and list(tested) != list(trained):
            found.append(
                f"{test} has the classes {', '.join(tested[:10])} ({len(tested)}) and {name} has "
                f"{', '.join(trained[:10])} ({len(trained)}): AP is wrong, unless these are the "
                "same classes in the same order under other names; give both files the same "
                "`categories`"
            )
    return found
