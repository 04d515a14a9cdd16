"""The Fashion-MNIST images: the official files, a balanced split, normalized tensors.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv:1708.07747. 60,000 training and 10,000 test images of 28 x 28 grey pixels.
"""

import os
import tempfile
from pathlib import Path
from typing import Optional, Union

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import check_integrity

from ws_detectron.errors import DataError, UserError
from ws_detectron.lab.cache import cache_root
from ws_detectron.utils.io import atomic_write

FASHION_CLASSES = tuple(FashionMNIST.classes)
SPLITS = ("train", "test")


def load_fashion_mnist(
    split: str, folder: Optional[Union[str, Path]] = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split of Fashion-MNIST; downloads the official files that are absent.

    They are decompressed in a temporary folder, so their own may be read-only.

    Args:
        split: `"train"` or `"test"`.
        folder: holds the files, or `FashionMNIST/raw` with them. By default they are searched in
            `FashionMNIST/raw` of `$DETECTRON2_DATASETS` (`./datasets` if the variable is not set,
            as in detectron2) and of the package's cache; a download goes to the former if the
            variable is set.

    Returns:
        images (N, 28, 28) uint8 and labels (N,) int64 in [0, 10); N is 60,000 or 10,000.

    Raises:
        DataError: a file is not the published one.
        UserError: files are absent and cannot be downloaded or written.
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return _load(folder)[split]


def _load(folder: Optional[Union[str, Path]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both splits."""
    target, searched = _find(folder)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        absent = []
        for name, md5 in FashionMNIST.resources:
            path = target / name
            if not path.is_file():
                absent.append(name)
            elif check_integrity(str(path), md5):
                (raw / name).symlink_to(path)
            else:
                raise DataError(
                    f"{path} is not the published file: {path.stat().st_size} bytes, and its MD5 "
                    f"is not {md5}. It may be truncated: delete it to download it again."
                )
        try:
            sets = {s: FashionMNIST(scratch, train=s == "train", download=True) for s in SPLITS}
        except (OSError, RuntimeError) as error:
            if not absent:  # such as a full disk
                raise
            reason = " ".join(str(error).split())  # in one line
            raise UserError(
                f"Fashion-MNIST not found: {', '.join(absent)} are not in {searched}, and the "
                f"download into {target} failed: {reason}. Set DETECTRON2_DATASETS to the folder "
                "that holds FashionMNIST/raw with the four official gz files."
            ) from error
        for name in absent:
            with atomic_write(target / name, "wb") as file:
                file.write((raw / name).read_bytes())
    return {split: (data.data.numpy(), data.targets.numpy()) for split, data in sets.items()}


def _find(folder: Optional[Union[str, Path]]) -> tuple[Path, str]:
    """The folder of the files, or that to which they are downloaded; all folders searched."""
    stated = os.environ.get("DETECTRON2_DATASETS")
    roots = [Path(stated or "datasets"), cache_root()] if folder is None else [Path(folder)]
    roots = [root.expanduser().absolute() for root in roots]
    places = [root / "FashionMNIST" / "raw" for root in roots]
    default = places[0 if stated else -1]
    if folder is not None:
        places += roots
    found = (p for p in places if all((p / name).is_file() for name, _ in FashionMNIST.resources))
    return next(found, default), " or ".join(map(str, places))


def load_splits(
    seed: int,
    train: int,
    held_out: int,
    folder: Optional[Union[str, Path]] = None,
    device: str = "cpu",
) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Loads images for training, validation and test, normalized by the mean and std of the first.

    Args:
        seed: of the split of the official training images.
        train: number of training images, a multiple of 10.
        held_out: number of validation images, the same of each class, and of test images, the
            first of the official ones; a multiple of 10.
        folder: see `load_fashion_mnist`, with its errors.
        device: that stores the images.

    Returns:
        Images (N, 1, 28, 28) float32 with their labels (N,) int64, three times.
    """
    splits = _load(folder)
    (images, labels), (test_images, test_labels) = splits["train"], splits["test"]
    chosen, others = stratified_split(labels, train, held_out, seed)
    pixels = images[chosen].astype(np.float64) / 255
    mean, std = float(pixels.mean()), float(pixels.std())

    def dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        pixels = torch.from_numpy(images).unsqueeze(1).float().div_(255).sub_(mean).div_(std)
        return TensorDataset(pixels.to(device), torch.from_numpy(labels).to(device))

    return (
        dataset(images[chosen], labels[chosen]),
        dataset(images[others], labels[others]),
        dataset(test_images[:held_out], test_labels[:held_out]),
    )


def stratified_split(
    labels: np.ndarray, train: int, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws two disjoint sets of indices with the same number of each class.

    Args:
        labels: (N,) in [0, 10), with enough of each class.
        train, held_out: sizes of the sets, multiples of 10.
        seed: the same seed gives the same sets.

    Returns:
        The sorted indices of both sets.
    """
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    first, end = train // 10, (train + held_out) // 10
    chosen, others = zip(*((found[:first], found[first:end]) for found in drawn))
    return np.sort(np.concatenate(chosen)), np.sort(np.concatenate(others))
