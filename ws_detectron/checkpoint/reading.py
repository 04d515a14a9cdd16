"""Reads weight files of every format this project knows, safely: nothing in them is executed."""

import io
import os
import pickle
import stat
import tarfile
from pathlib import Path
from typing import Any, Union

from ws_detectron.errors import WeightsError, shown

from .safe_pickle import RefusedPickle, load_plain_pickle
from .torch_files import read_legacy_torch, read_torch_zip

_ZIP = b"PK\x03\x04"
# What torch.save wrote before 1.6 starts with its pickled magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<": "a web page (was the download address right?)",
}


def read_weight_file(path: Union[str, Path]) -> dict[str, Any]:
    """Reads a torch file (`.pth`, `.pth.tar`, `.pt`) or a pickle of numpy arrays (`.pkl`).

    The format is told from the contents, not from the name. Checksums of torch's zip files are
    compared. Time and memory are at most a small multiple of the file's size.

    Args:
        path: a local file.

    Returns:
        The dict that the file holds, as it is; values may be tensors on the CPU, arrays, numbers,
        strings and containers of these.

    Raises:
        WeightsError: there is no such file, it is no regular file, empty, damaged, of another
            format, asks for code to be run, expands to many times its size, or holds something
            else than a dict.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise WeightsError(f"{path} is a {_kind(path)}; name a weight file")
        content = _read(path)
    except OSError as error:
        raise WeightsError(f"cannot read the weight file {path}: {error.strerror}") from None
    except RefusedPickle as error:
        name = shown(error, 200)
        raise WeightsError(f"{path} is refused: {_asks_for(name)}{_advice(name)}") from None
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} is damaged or refused: {shown(error, 300)}") from None
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; a weight file holds a dict of tensors"
        )
    return content


def _read(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"the weight file {path} is empty")
    if start.startswith(_ZIP):
        return read_torch_zip(path)
    if tarfile.is_tarfile(path):
        raise WeightsError(f"{path} is a tar archive, not a weight file; unpack it first")
    for text, meaning in _TEXTS.items():
        if start.lstrip().lower().startswith(text):
            raise WeightsError(f"{path} is {meaning}")
    content = path.read_bytes()
    if start.startswith(_LEGACY_TORCH):
        return read_legacy_torch(io.BytesIO(content), len(content))
    try:
        return load_plain_pickle(io.BytesIO(content))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is neither a torch file nor a pickle of arrays, or it is damaged "
            f"({shown(error, 300)})"
        ) from None


def _kind(path: Path) -> str:
    return "directory" if path.is_dir() else "device or pipe"


def _asks_for(name: str) -> str:
    return f"it asks for {name}, and a weight file needs tensors, numbers and text only"


def _advice(name: str) -> str:
    if name.startswith("mmengine."):
        return (
            ". It is a training checkpoint of mmdetection 3; reduce it to its weights with their "
            "tools/model_converters/publish_model.py"
        )
    return ""
