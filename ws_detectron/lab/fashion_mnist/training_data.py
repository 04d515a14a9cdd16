"""Fashion-MNIST in memory: split, normalized and cut into batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from .files import find_fashion_mnist, load_fashion_mnist


@dataclass(frozen=True)
class Images:
    """Images (N, 1, 28, 28) float32 and their labels (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TrainingData:
    """The two parts of the training images; mean and std of the pixels of `train`, in [0, 1]."""

    train: Images
    validation: Images
    mean: float
    std: float


def load_training_data(
    folder: Optional[Path], seed: int, train: int, validation: int, device: str = "cpu"
) -> TrainingData:
    """Splits the official training images and normalizes pixels by mean and std of `train`.

    Args:
        folder: see `root` of `find_fashion_mnist`.
        seed: of the split.
        train, validation: numbers of images, multiples of 10.
        device: that stores the images.

    Raises:
        UserError: files are missing, truncated or not the published ones.
    """
    images, labels = load_fashion_mnist("train", find_fashion_mnist("train", root=folder))
    chosen, held_out = stratified_split(labels, train, validation, seed)
    pixels = images[chosen].astype(np.float64) / 255
    mean, std = float(pixels.mean()), float(pixels.std())
    return TrainingData(
        _prepare(images[chosen], labels[chosen], mean, std, device),
        _prepare(images[held_out], labels[held_out], mean, std, device),
        mean,
        std,
    )


def load_test_data(
    folder: Optional[Path], count: int, mean: float, std: float, device: str = "cpu"
) -> Images:
    """The first `count` of the official test images, normalized by `mean` and `std`."""
    images, labels = load_fashion_mnist("test", find_fashion_mnist("test", root=folder))
    return _prepare(images[:count], labels[:count], mean, std, device)


def check_test_data(folder: Optional[Path]) -> None:
    """Checks that the test images can be loaded at the end of a training.

    Raises:
        UserError: files are missing, truncated or not the published ones.
    """
    load_fashion_mnist("test", find_fashion_mnist("test", root=folder))


def stratified_split(
    labels: np.ndarray, train: int, validation: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws two disjoint sets of indices with the same number of each class.

    Args:
        labels: (N,) in [0, 10).
        train, validation: sizes of the sets, multiples of 10.
        seed: the same seed gives the same sets.

    Returns:
        The sorted indices of both sets.

    Raises:
        ValueError: a size is no multiple of 10, or a class has too few images.
    """
    classes = 10
    if train % classes or validation % classes:
        raise ValueError(f"sizes must be multiples of {classes}, got {train} and {validation}")
    random = np.random.default_rng(seed)
    first, second = train // classes, validation // classes
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label in range(classes):
        found = random.permutation(np.flatnonzero(labels == label))
        if len(found) < first + second:
            raise ValueError(f"class {label} has {len(found)} images, {first + second} are needed")
        parts[0].append(found[:first])
        parts[1].append(found[first : first + second])
    return np.sort(np.concatenate(parts[0])), np.sort(np.concatenate(parts[1]))


def batches(data: Images, order: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cuts the images into batches, in the given order; the last may be smaller.

    Thousands of images are gathered at once and batches are views of them: at batch size 2,
    gathering at each step would take longer than some layers.
    """
    chunk = max(size, 8192 // size * size)
    for start in range(0, len(order), chunk):
        chosen = order[start : start + chunk]
        yield from zip(data.images[chosen].split(size), data.labels[chosen].split(size))


def _prepare(
    images: np.ndarray, labels: np.ndarray, mean: float, std: float, device: str
) -> Images:
    pixels = torch.from_numpy(images.astype(np.float32)).div_(255).sub_(mean).div_(std)
    # (N, 28, 28, 1) -> (N, 1, 28, 28): these strides make a CPU convolve channels last, which for
    # one input channel takes an eighth of the time
    pixels = pixels.unsqueeze(-1).permute(0, 3, 1, 2)
    return Images(pixels.to(device), torch.from_numpy(labels.astype(np.int64)).to(device))
