"""Data loaders: errors name the file, and each training batch is a function of SEED and its number.

What is drawn for a batch depends on nothing before it, so that a resumed run gets the batches that
the run without interruption gets (`ws_detectron.data.training_order`).
"""

import io
import itertools
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils.data import DataLoader

from ws_detectron.checkpoint.safe_pickle import RefusedPickle, load_plain_pickle
from ws_detectron.data.images import check_image_file, read_annotated, read_rgb
from ws_detectron.data.training_order import (
    MappedImages,
    TrainingBatches,
    repeat_factors,
    seed_step,
)
from ws_detectron.errors import ConfigError, DataError, shown

from .checks import number_of_classes, training_records

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
        instances: Any = mapped.get("instances", ()) if self._masks and mapped else ()
        if len(instances) and not instances.has("gt_masks"):
            raise DataError(
                f"the objects of {name} have boxes and no masks (`segmentation`), but "
                "MODEL.MASK_ON is True; set it to False to train on boxes"
            )
        return mapped


class TrainLoader:
    """Batches of training images, without end: batch n is a function of `seed` and n.

    Handing out a batch seeds the global generators as well, for what the model draws in its step.
    `seed` and `start` count when the first batch is asked for, which also starts the workers, so
    they may be set after `iter`, as a trainer does that resumes.

    Args:
        dataset: maps an index to a record in detectron2's format.
        mapper: maps a record to a model input, or to None to skip it.
        batches: of this process.
        seed: SEED of the run.
        workers: number of processes that load images; 0: this one does.

    Attributes:
        images: number of images of the data set.
        seed: of the sequence.
        start: number of the first batch to hand out; with SOLVER.ACCUMULATE_STEPS each part counts.
    """

    def __init__(
        self,
        dataset: DatasetFromList,
        mapper: Callable[[dict], Any],
        batches: TrainingBatches,
        *,
        seed: int,
        workers: int,
    ) -> None:
        self.images, self.seed, self.start = len(dataset), seed, 0
        self._dataset, self._mapper, self._batches = dataset, mapper, batches
        self._workers = workers

    def __iter__(self) -> Iterator[list[Any]]:
        batches, seed = self._batches, self.seed
        batches.seed, batches.start = seed, self.start
        images = iter(  # one by one, which is faster than whole batches in each worker
            DataLoader(
                MappedImages(self._dataset, self._mapper, seed),
                sampler=itertools.chain.from_iterable(batches),
                batch_size=None,
                num_workers=self._workers,
                collate_fn=trivial_batch_collator,
                worker_init_fn=end_with_parent_alone,
            )
        )
        for number in itertools.count(self.start):
            batch = list(itertools.islice(images, batches.size))
            seed_step(seed, *batches.place(number))
            yield batch


def end_with_parent_alone(worker: int = 0) -> None:
    """Has a worker process ignore SIGINT, and SIGTERM unless its parent sends it.

    Terminals and schedulers signal all processes of a job, and the training finishes its step then,
    for which it needs its workers.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    parent = os.getppid()

    def wait() -> None:
        while True:
            found = signal.sigwaitinfo(signals)
            if found.si_signo == signal.SIGTERM and found.si_pid == parent:
                os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=wait, daemon=True).start()


def build_train_loader(
    cfg: CfgNode, mapper: Optional[Callable[[dict], Any]] = None
) -> Iterable[list[Any]]:
    """The training loader for DATASETS.TRAIN.

    It differs from detectron2's in the order of the images (`TrainingBatches`) and in what is
    random about each, which depend on SEED alone. With SOLVER.ACCUMULATE_STEPS its batches are the
    parts.

    Args:
        cfg: as returned by `prepare`, which registers data sets and their keypoints. With SEED -1,
            a seed is drawn.
        mapper: maps a record to a model input, or to None to skip it; None: detectron2's
            `DatasetMapper`.

    Returns:
        A `TrainLoader`; detectron2's own loader, with a warning, for a sampler that this package
        does not know and for data sets that are not lists.

    Raises:
        DataError: proposal files would run code; while iterating, an image cannot be read.
        ConfigError: DATASETS.TRAIN is empty, the data has more classes than the model, or images
            cannot be grouped, as they have no width and height.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name at least one data set to train on")
    check_proposals(cfg)
    naming = NamingMapper(mapper or DatasetMapper(cfg, is_train=True), masks=cfg.MODEL.MASK_ON)
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    records = training_records(cfg, proposals)
    check_classes(cfg.DATASETS.TRAIN, *number_of_classes(cfg))
    factors = repeat_factors(cfg, records) if isinstance(records, list) else None
    if factors is None:
        logger.warning(
            "The order of the training images does not follow SEED: DATALOADER.SAMPLER_TRAIN %s "
            "and the data sets are loaded by detectron2's own loader",
            cfg.DATALOADER.SAMPLER_TRAIN,
        )
        part = cfg.clone()
        part.defrost()
        part.SOLVER.IMS_PER_BATCH //= cfg.SOLVER.ACCUMULATE_STEPS
        return build_detection_train_loader(part, mapper=naming)
    batches = TrainingBatches(
        factors,
        cfg.SOLVER.IMS_PER_BATCH,
        parts=cfg.SOLVER.ACCUMULATE_STEPS,
        processes=comm.get_world_size(),
        rank=comm.get_rank(),
        groups=_orientations(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
    )
    dataset = DatasetFromList(records, copy=False)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return TrainLoader(dataset, naming, batches, seed=seed, workers=cfg.DATALOADER.NUM_WORKERS)


def _orientations(records: Sequence[dict]) -> list[int]:
    """1 for landscape images and 0 for others, as detectron2 groups them."""
    try:
        return [int(record["width"] > record["height"]) for record in records]
    except KeyError as error:
        raise ConfigError(
            f"DATALOADER.ASPECT_RATIO_GROUPING is True, but records of DATASETS.TRAIN have no "
            f"{error}; add it where they are registered, or set the key to False"
        ) from error


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable:
    """detectron2's test loader for one data set; see `build_train_loader`."""
    check_proposals(cfg)
    # the mapper would look up the keypoints of DATASETS.TRAIN, which an evaluation may not have
    boxes = cfg.clone()
    boxes.defrost()
    boxes.MODEL.KEYPOINT_ON = False
    mapper = NamingMapper(DatasetMapper(boxes, is_train=False))
    loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
    loader.worker_init_fn = end_with_parent_alone
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


def check_classes(names: Iterable[str], key: str, number: Optional[int]) -> None:
    """Checks that the model has a class for each of the training data, which must be loaded.

    Args:
        names: data sets.
        key: config key of the number of classes, for messages.
        number: its value; None if it is not known.
    """
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if number is not None and len(classes) > number:
            raise ConfigError(
                f"{key} is {number}, but {name} has {len(classes)} classes: "
                f"{', '.join(classes[:10])}{', ...' * (len(classes) > 10)}"
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
