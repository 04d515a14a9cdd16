"""Reads weight files of all supported formats without executing anything in them."""

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
# The pickled magic number at the start of files that torch.save wrote before 1.6.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<": "a web page (was the download address right?)",
}


def read_weight_file(path: Union[str, Path]) -> dict[str, Any]:
    """Reads a torch file (`.pth`, `.pth.tar`, `.pt`) or a pickle of numpy arrays (`.pkl`).

    The format is recognized by the contents, not by the name. Checksums of torch's zip files are
    verified. Time and memory are at most a small multiple of the file's size.

    Args:
        path: a local file.

    Returns:
        The dict in the file. Values may be CPU tensors, arrays, numbers, strings and containers of
        these.

    Raises:
        WeightsError: there is no such file; or it is not a regular file, is empty, damaged or of
            another format, requests code, expands to many times its size, or does not contain a
            dict.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "directory" if path.is_dir() else "device or pipe"
            raise WeightsError(f"{path} is a {what}; name a weight file")
        content = _read(path)
    except OSError as error:
        raise WeightsError(f"cannot read the weight file {path}: {error.strerror}") from None
    except RefusedPickle as error:
        name = shown(error, 200)
        raise WeightsError(
            f"{path} is refused: it asks for {name}, and a weight file needs tensors, numbers and "
            f"text only{_advice(name)}"
        ) from None
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


def _advice(name: str) -> str:
    if name.startswith("mmengine."):
        return (
            ". It is a training checkpoint of mmdetection 3; reduce it to its weights with their "
            "tools/model_converters/publish_model.py"
        )
    return ""
