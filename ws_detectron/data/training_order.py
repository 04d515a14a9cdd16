"""The order of the training images, and what is random about each of them, as functions of a seed.

A training draws the images epoch by epoch. The n-th image drawn has the *position* n, whatever the
batch, the processes and the workers that load it. Epoch e is a permutation by (seed, e); what the
mapper draws for an image, by (seed, position).
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset, Sampler

from ws_detectron.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# What numbers are drawn for, so that no two uses share them
_EPOCH, _SUBSET, _IMAGE, _STEP = "epoch", "subset", "image", "step"
_REPLACEMENTS = 100

Drawn = tuple[int, int]
"""Position of an image in the sequence, and its index in the data set."""


def _bits(seed: int, use: str, *numbers: int) -> int:
    """128 bits that a seed, a use and numbers determine; nearby numbers give unrelated ones."""
    text = f"{seed} {use} {numbers}".encode()
    return int.from_bytes(blake2b(text, digest_size=16).digest(), "big")


def _generator(seed: int, use: str, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_bits(seed, use, *numbers) >> 64)


def _seed_generators(seed: int, use: str, *numbers: int) -> None:
    """Seeds the global generators of Python, NumPy and torch, on all devices of this process."""
    bits = _bits(seed, use, *numbers)
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    # `torch.manual_seed` takes 0.1 ms where CUDA is not initialized, to record who called it
    torch.default_generator.manual_seed(bits >> 64)
    if torch.cuda.is_initialized():  # never in a worker
        torch.cuda.manual_seed_all(bits >> 64)


def seed_step(seed: int, step: int, share: int) -> None:
    """Seeds what a model draws in a step, such as its sampled proposals; takes 20 microseconds.

    Args:
        seed: SEED of the run.
        step: number of the optimizer step, from 0.
        share: number of the share of the step's images, see `TrainingBatches`.
    """
    _seed_generators(seed, _STEP, step, share)


RepeatFactors = Callable[[int], torch.Tensor]
"""Seed -> (images,): how often each image is drawn in an epoch, on average."""


def repeat_factors(cfg: CfgNode, records: Sequence[dict]) -> Optional[RepeatFactors]:
    """The repeat factors of DATALOADER.SAMPLER_TRAIN; the seed draws the images of a subset.

    Args:
        cfg: DATALOADER is used.
        records: the training set in detectron2's format.

    Returns:
        None for a sampler that detectron2 0.6 does not have.

    Raises:
        ConfigError: a subset has no image.
    """
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(records)
    if name == "TrainingSampler":
        return lambda seed: torch.ones(size)
    if name == "RepeatFactorTrainingSampler":
        # an option of the main branch alone
        options = {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, **options
        )
        return lambda seed: factors
    if name == "RandomSubsetTrainingSampler" and "RANDOM_SUBSET_RATIO" in cfg.DATALOADER:
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        number = int(size * ratio)
        if not 0 < number <= size:
            raise ConfigError(
                f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}, which makes {number} of {size} "
                "images; allowed: a part of them, up to 1.0"
            )

        def subset(seed: int) -> torch.Tensor:
            drawn = torch.randperm(size, generator=_generator(seed, _SUBSET))[:number]
            return torch.zeros(size).index_fill(0, drawn, 1)

        return subset
    return None


def epochs(factors: torch.Tensor, seed: int) -> Iterator[np.ndarray]:
    """The indices of each epoch in the order in which they are drawn, without end.

    An image with the factor 1.3 is drawn once in each epoch, and in 30 % of them twice.

    Args:
        factors: (images,), at least 0.
        seed: SEED of the run.

    Yields:
        (images drawn in this epoch,)
    """
    for epoch in itertools.count():
        generator = _generator(seed, _EPOCH, epoch)
        more = torch.rand(len(factors), generator=generator) < factors.frac()
        indices = torch.arange(len(factors)).repeat_interleave(factors.trunc().long() + more)
        yield indices[torch.randperm(len(indices), generator=generator)].numpy()


class TrainingBatches(Sampler):
    """The batches of one process: lists of `Drawn`.

    The images of an optimizer step are divided into equal shares, one for each process and part
    (`SOLVER.ACCUMULATE_STEPS`): share p * processes + r is part p of process r. So neither
    processes nor parts change the images of a step, and 4 parts on one process have the shares that
    one part on each of 4 processes has.

    With `groups`, all images of a step belong to one group, and those that wait for others of their
    group are carried over to the next epoch.

    Args:
        factors: as from `repeat_factors`.
        images: of an optimizer step; a multiple of `parts` times `processes`.
        parts, processes, rank: numbers of parts and processes, and of this process.
        groups: (images of the data set,) the group of each; None: all are one.

    Attributes:
        size: images of a batch.
        seed, start: SEED of the run, and the number of the first batch to give.
    """

    def __init__(
        self,
        factors: RepeatFactors,
        images: int,
        *,
        parts: int = 1,
        processes: int = 1,
        rank: int = 0,
        groups: Optional[Sequence[int]] = None,
    ) -> None:
        self._factors, self._images = factors, images
        self._parts, self._processes, self._rank = parts, processes, rank
        self._groups = groups
        self.size = images // (parts * processes)
        self.seed = self.start = 0

    def __iter__(self) -> Iterator[list[Drawn]]:
        first, part = divmod(self.start, self._parts)
        for step in itertools.islice(self._steps(), first, None):
            for number in range(part, self._parts):
                begin = (number * self._processes + self._rank) * self.size
                yield [(p, i) for p, i in step[begin : begin + self.size].tolist()]
            part = 0

    def place(self, number: int) -> tuple[int, int]:
        """Step and share of a batch, by its number in the sequence."""
        step, part = divmod(number, self._parts)
        return step, part * self._processes + self._rank

    def _steps(self) -> Iterator[np.ndarray]:
        """(images of a step, 2): what was drawn, in the order in which steps have all images."""
        position, factors = 0, self._factors(self.seed)
        groups = np.zeros(len(factors), int) if self._groups is None else np.asarray(self._groups)
        waiting = {group: np.empty((0, 2), int) for group in np.unique(groups)}
        for indices in epochs(factors, self.seed):
            drawn = np.stack([np.arange(position, position + len(indices)), indices], axis=1)
            position += len(indices)
            whole = []
            for group, others in waiting.items():
                members = np.concatenate([others, drawn[groups[indices] == group]])
                end = len(members) // self._images * self._images
                whole.append(members[:end].reshape(-1, self._images, 2))
                waiting[group] = members[end:]
            steps = np.concatenate(whole)
            yield from steps[np.argsort(steps[:, -1, 0])]


class MappedImages(Dataset):
    """Maps images, each with generators that are seeded by its position in the sequence.

    Custom mappers need not know: Python's, NumPy's and torch's global generators are seeded. If a
    mapper returns None for an image, another one takes its place, drawn by the position as well.

    Args:
        dataset: maps an index to a record in detectron2's format.
        mapper: maps a record to a model input, or to None to skip it.
        seed: SEED of the run.
    """

    def __init__(self, dataset: Dataset, mapper: Callable[[dict], Any], seed: int) -> None:
        self._dataset: Any = dataset
        self._mapper = PicklableWrapper(mapper)
        self._seed = seed

    def __getitem__(self, drawn: Drawn) -> Any:
        """The model input.

        Raises:
            DataError: the mapper skips every image that is tried.
        """
        position, index = drawn
        for attempt in range(_REPLACEMENTS):
            _seed_generators(self._seed, _IMAGE, position, attempt)
            if attempt:
                index = random.randrange(len(self._dataset))
            mapped = self._mapper(self._dataset[index])
            if mapped is not None:
                return mapped
        raise DataError(
            f"the dataset mapper returned None, which skips an image, {_REPLACEMENTS} times in a "
            "row; let it skip fewer, or filter the data set when it is registered"
        )
