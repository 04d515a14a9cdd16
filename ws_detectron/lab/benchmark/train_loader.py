"""Measures the training loader beside detectron2's."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from timeit import timeit
from typing import Any, Optional

from detectron2.data import DatasetMapper, build_detection_train_loader

from ws_detectron.data.training_order import seed_step
from ws_detectron.engine import build_train_loader
from ws_detectron.engine.checks import check_datasets
from ws_detectron.engine.loaders import NamingMapper

from .detector_step import SHORT_SIDES, detector_config
from .timing import interleave

IMAGES = 128
"""Per round, so that rounds differ little in their images."""
SEEDINGS = 1000


def measure_loader(
    device: str, rounds: int = 10, warmup: int = 1, batches: Sequence[int] = (2,),
    short_side: Optional[int] = None, opts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Loading of training images, whose order follows SEED, beside detectron2's loader.

    Args:
        device: only decides the size of the images.
        rounds, warmup: as for `interleave`.
        batches, short_side, opts: as for `measure_steps`; DATALOADER.NUM_WORKERS is 0 by default.

    Yields:
        For each batch `facts`, with the microseconds in which a step's generators are seeded, and
        `seconds` per image, name -> seconds of each round.

    Raises:
        UserError: the data set is missing; names the path and the remedy.
    """
    short_side = short_side or SHORT_SIDES[device]
    for images in batches:
        cfg = detector_config("gn_ws", device, short_side, opts)
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = images, 0
        mapper = NamingMapper(DatasetMapper(cfg, is_train=True), masks=cfg.MODEL.MASK_ON)
        steps = max(1, IMAGES // images)
        loaders = {
            "detectron2's": build_detection_train_loader(cfg, mapper=mapper),
            "ours": build_train_loader(cfg),
        }
        actions = {name: _Loading(loader, steps) for name, loader in loaders.items()}
        seconds = interleave(actions, rounds, warmup, "cpu")
        each = {name: [s / (steps * images) for s in of] for name, of in seconds.items()}
        seeding = timeit(lambda: seed_step(0, 1000, 0), number=SEEDINGS) / SEEDINGS
        facts = {
            "images": images,
            "workers": cfg.DATALOADER.NUM_WORKERS,
            "short_side": short_side,
            "seeding_of_a_step_in_us": round(1e6 * seeding, 1),
        }
        yield {"facts": facts, "seconds": each}


class _Loading:
    """Takes the next batches of a loader."""

    def __init__(self, loader: Iterable, steps: int) -> None:
        self._batches, self._steps = iter(loader), steps

    def __call__(self) -> None:
        for _ in itertools.islice(self._batches, self._steps):
            pass
