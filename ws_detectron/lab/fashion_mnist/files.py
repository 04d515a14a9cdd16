"""The official Fashion-MNIST files.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv:1708.07747. 60,000 training and 10,000 test images of 28 x 28 grey pixels, in the
idx format of MNIST, gzip-compressed. They are decompressed in memory only.
"""

import gzip
import hashlib
import logging
import math
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Optional, Union

import numpy as np

from ws_detectron.errors import UserError
from ws_detectron.lab.cache import CACHE_VARIABLE, cache_root

logger = logging.getLogger(__name__)

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DATASETS_VARIABLE = "DETECTRON2_DATASETS"

# split -> (images, labels), each with its published MD5 sum
_FILES = {
    "train": (
        ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
}


def load_fashion_mnist(
    split: str, folder: Optional[Union[str, Path]] = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split of Fashion-MNIST.

    Args:
        split: `"train"` or `"test"`.
        folder: holds the four gz files; by default `find_fashion_mnist(split)`, which downloads
            them if they are missing.

    Returns:
        images (N, 28, 28) uint8 and labels (N,) uint8 in [0, 10); N is 60,000 or 10,000.

    Raises:
        UserError: a file is missing, or is not the published one.
        ValueError: no such split.
    """
    (images_name, images_md5), (labels_name, labels_md5) = _files(split)
    folder = find_fashion_mnist(split) if folder is None else Path(folder)
    images = read_idx_gz(folder / images_name, images_md5)
    labels = read_idx_gz(folder / labels_name, labels_md5)
    return images, labels


def read_idx_gz(path: Union[str, Path], md5: Optional[str] = None) -> np.ndarray:
    """Reads a gzip-compressed idx file of unsigned bytes.

    The format (LeCun, "The MNIST database"): two zero bytes, the type (8 = unsigned byte), the
    number of dimensions, each dimension as a big-endian 32-bit integer, then the values.

    Args:
        path: the .gz file.
        md5: the expected MD5 sum of the compressed file.

    Returns:
        A uint8 array with the dimensions in the header of the file.

    Raises:
        UserError: the file is missing, has another MD5 sum, or is damaged.
    """
    path = Path(path)
    try:
        compressed = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if md5 is not None:
        found = hashlib.md5(compressed).hexdigest()
        if found != md5:
            raise UserError(
                f"{path} is not the published file: {len(compressed)} bytes with MD5 {found}, "
                f"expected MD5 {md5}. It may be truncated: delete it to download it again."
            )
    try:
        content = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise UserError(
            f"{path} is not an idx file of unsigned bytes: it starts with {content[:4].hex()!r}, "
            "expected 000008 and the number of dimensions"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise UserError(f"{path} ends within its header, after {len(content)} bytes")
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != math.prod(shape):
        raise UserError(f"{path} holds {len(content) - start} values, but its header says {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def find_fashion_mnist(
    split: str, download: bool = True, root: Optional[Union[str, Path]] = None
) -> Path:
    """The folder that holds the gz files of a split.

    Searches `$DETECTRON2_DATASETS/FashionMNIST/raw` (torchvision's layout; `./datasets` if the
    variable is not set, as in detectron2), then the package's cache. If neither has the files,
    downloads them from torchvision's mirrors: to the first folder if the variable is set, else to
    the cache.

    Args:
        split: `"train"` or `"test"`.
        download: whether to download missing files.
        root: if given, only this folder and `FashionMNIST/raw` in it are searched, and files are
            downloaded to the latter.

    Raises:
        UserError: the files are not found, and not downloaded.
        ValueError: no such split.
    """
    files = _files(split)
    stated = os.environ.get(DATASETS_VARIABLE)
    candidates = [
        Path(os.path.expanduser(parent)).absolute() / "FashionMNIST" / "raw"
        for parent in (stated or "datasets", cache_root())
    ]
    if root is not None:
        given = Path(os.path.expanduser(root)).absolute()
        candidates = [given, given / "FashionMNIST" / "raw"]
    for folder in candidates:
        if all((folder / name).is_file() for name, _ in files):
            return folder
    target = candidates[0] if stated and root is None else candidates[1]
    problem = "downloading is off"
    if download:
        try:
            for name, md5 in files:
                if not (target / name).is_file():
                    _download(name, md5, target)
            return target
        # urllib's errors are OSErrors; torchvision raises RuntimeError for a wrong checksum
        except (OSError, RuntimeError, ValueError) as error:
            problem = f"the download into {target} failed: {error}"
    raise UserError(
        f"Fashion-MNIST ({split} split) not found: looked for "
        f"{' and '.join(name for name, _ in files)} in {' and in '.join(map(str, candidates))}; "
        f"{problem}. "
        + (
            "Give the folder that holds them directly or in FashionMNIST/raw."
            if root is not None
            else f"Set {DATASETS_VARIABLE} to the folder that holds FashionMNIST/raw with the "
            f"official gz files, or {CACHE_VARIABLE} to a writable folder."
        )
    )


def _files(split: str) -> tuple[tuple[str, str], tuple[str, str]]:
    if split not in _FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return _FILES[split]


def _download(name: str, md5: str, folder: Path) -> None:
    """Downloads one file; it gets its name only when it is complete."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".download.", dir=folder))
    try:
        for position, mirror in enumerate(FashionMNIST.mirrors, start=1):
            try:
                logger.info("downloading %s%s to %s", mirror, name, folder)
                download_url(mirror + name, str(scratch), filename=name, md5=md5)
                break
            except (OSError, RuntimeError):
                if position == len(FashionMNIST.mirrors):
                    raise
        os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
