"""Reads weight files of every format this project knows, safely: nothing in them is executed."""

import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Union

import torch

from .errors import WeightsError
from .safe_pickle import RefusedPickle, load_plain_pickle

_ZIP = b"PK\x03\x04"
# What torch.save wrote before 1.6 starts with its pickled magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<": "a web page (was the download address right?)",
}


def read_weight_file(path: Union[str, Path]) -> dict[str, Any]:
    """Reads a torch file (`.pth`, `.pth.tar`, `.pt`) or a pickle of numpy arrays (`.pkl`).

    The format is told from the contents, not from the name. Torch files are read with
    `torch.load(weights_only=True)` onto the CPU, pickles by `load_plain_pickle`.

    Args:
        path: a local file.

    Returns:
        The dict that the file holds, as it is; values may be tensors, arrays, numbers, strings
        and containers of these.

    Raises:
        WeightsError: there is no such file, it is empty, damaged, of another format, asks for
            code to be run, or holds something else than a dict.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"cannot read the weight file {path}: {error.strerror}") from None
    if not start:
        raise WeightsError(f"the weight file {path} is empty")
    if start.startswith(_ZIP):
        content = _read_zip(path)
    elif start.startswith(_LEGACY_TORCH):
        content = _torch_load(path)
    elif tarfile.is_tarfile(path):
        raise WeightsError(f"{path} is a tar archive, not a weight file; unpack it first")
    else:
        content = _read_pickle(path, start)
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; a weight file holds a dict of tensors"
        )
    return content


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is damaged or truncated: {error}") from None
    for entry in entries:
        parts = re.split(r"[/\\]", entry.filename)
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise WeightsError(
                f"{path} is refused: its entry {entry.filename!r} points outside the archive"
            )
        # torch.save does not compress; a few kilobytes could unpack to any size.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"{path} is refused: its entry {entry.filename!r} is compressed")
    if not any(entry.filename.split("/")[-1] == "data.pkl" for entry in entries):
        names = ", ".join(entry.filename for entry in entries[:3])
        raise WeightsError(f"{path} is a zip archive ({names}…) but no torch file")
    return _torch_load(path)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = str(error)
        asked = re.search(r"GLOBAL ([\w.]+)|(?:class|global|function):? ([\w.]*\.\w+)", message)
        if asked is None:
            # The advice that torch adds, to load without protection, must not reach the user.
            reason = message.split("WeightsUnpickler error:")[-1].strip().splitlines()[:1]
            raise WeightsError(f"{path} is damaged or refused: {' '.join(reason)}") from None
        name = asked[1] or asked[2]
        raise WeightsError(f"{path} is refused: {_asks_for(name)}{_advice(name)}") from None
    except Exception as error:  # torch raises whatever a damaged file leads to
        reason = str(error).strip().splitlines()[:1]
        raise WeightsError(f"{path} is damaged or truncated: {' '.join(reason)}") from None


def _read_pickle(path: Path, start: bytes) -> Any:
    for text, meaning in _TEXTS.items():
        if start.lstrip().lower().startswith(text):
            raise WeightsError(f"{path} is {meaning}")
    try:
        with open(path, "rb") as file:
            return load_plain_pickle(file)
    except RefusedPickle as error:
        raise WeightsError(f"{path} is refused: {_asks_for(str(error))}") from None
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is neither a torch file nor a pickle of arrays, or it is damaged ({error})"
        ) from None


def _asks_for(name: str) -> str:
    return f"it asks for {name}, and a weight file needs tensors, numbers and text only"


def _advice(name: str) -> str:
    if name.startswith("mmengine."):
        return (
            ". It is a training checkpoint of mmdetection 3; reduce it to its weights with their "
            "tools/model_converters/publish_model.py"
        )
    return ""
