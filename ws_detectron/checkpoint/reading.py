"""Reads weight files of all supported formats without executing anything in them.

`torch.load(weights_only=True)` can run code before torch 2.6 (CVE-2025-32434). In every version it
trusts sizes stated in the file, ignores checksums, and crashes on some keys. Formats:
torch/serialization.py of torch 2.11; `numpy.lib.format`; README of huggingface/safetensors.
"""

import io
import json
import math
import os
import pickle
import stat
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
import torch

from ws_detectron.errors import WeightsError, list_some, shown

from .safe_pickle import RefusedPickle, load_plain_pickle

_ZIP = b"PK\x03\x04"
# The pickled magic number at the start of files that torch.save wrote before 1.6.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<": "a web page (was the download address right?)",
}
_LOCAL_HEADER = 30  # bytes before the name of a zip entry
_NPZ_EXPANSION = 8  # how many times its size a compressed .npz may have; weights hardly compress
_MAX_DIMENSIONS = 64
_SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_WRAPPERS = ("model", "state_dict", "model_state", "blobs")


def read_weight_file(path: Union[str, Path]) -> dict[str, Any]:
    """Reads a torch file (`.pth`, `.pth.tar`, `.pt`, `.bin`), a pickle of numpy arrays (`.pkl`),
    `.safetensors` or `.npz`.

    The format is recognized by the contents, not by the name. Checksums of zip files, which torch
    and numpy write, are verified. Time and memory are at most a small multiple of the file's size.

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
        advice = ""
        if name.startswith("mmengine."):
            advice = (
                ". It is a training checkpoint of mmdetection 3; reduce it to its weights with "
                "their tools/model_converters/publish_model.py"
            )
        raise WeightsError(
            f"{path} is refused: it asks for {name}, and a weight file needs dense tensors, "
            f"numbers and text only{advice}"
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
        start = file.read(512)
    size = os.path.getsize(path)
    if not start:
        raise WeightsError(f"the weight file {path} is empty")
    try:
        if start.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                is_npz = any(name.endswith(".npy") for name in archive.namelist())
                return (_read_npz if is_npz else _read_archive)(archive, size)
        # A length and a JSON object; as a length, the first bytes of other formats are exabytes.
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
            with open(path, "rb") as file:
                return _read_safetensors(file, size)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # zipfile, numpy and json have no common base class
        message = str(error).strip().partition("\n")[0]  # torch and numpy have longer ones
        raise pickle.UnpicklingError(message or type(error).__name__) from None
    if start[257:262] == b"ustar":
        raise WeightsError(f"{path} is a tar archive, not a weight file; unpack it first")
    for text, meaning in _TEXTS.items():
        if start.lstrip().lower().startswith(text):
            raise WeightsError(f"{path} is {meaning}")
    content = path.read_bytes()
    if start.startswith(_LEGACY_TORCH):
        return _read_legacy(io.BytesIO(content), len(content))
    try:
        return load_plain_pickle(io.BytesIO(content))
    except RefusedPickle:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is neither a torch, safetensors or .npz file nor a pickle of arrays, or it is "
            "damaged "
            f"({shown(error, 300)})"
        ) from None


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    """Reads what `torch.save` writes; tensors are on the CPU, and parameters become tensors."""
    _check_entries(archive.infolist(), size)
    entries = {entry.filename: entry for entry in archive.infolist()}
    name = next((name for name in entries if name.split("/")[1:] == ["data.pkl"]), None)
    if name is None:
        names = ", ".join(list(entries)[:3])
        raise pickle.UnpicklingError(f"it is a zip archive ({names}…) but no torch file")
    folder = name.partition("/")[0]
    if f"{folder}/constants.pkl" in entries:
        raise RefusedPickle("a TorchScript program")
    order = f"{folder}/byteorder"
    swap = order in entries and archive.read(order).decode("ascii", "replace") != sys.byteorder

    def read_storage(key: str, dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        entry = entries.get(f"{folder}/data/{key}")
        if entry is None or entry.file_size != nbytes:
            found = "is missing" if entry is None else f"has {entry.file_size:,}"
            raise pickle.UnpicklingError(
                f"its storage {key!r:.80} should have {nbytes:,} bytes and {found}"
            )
        data = torch.empty(nbytes, dtype=torch.uint8)
        with archive.open(entry) as file:  # checks the CRC-32 at the end
            _fill(data, file, dtype.itemsize if swap else 1)
        return data

    return load_plain_pickle(io.BytesIO(archive.read(name)), size, read_storage)


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """Reads what `numpy.savez` and `savez_compressed` write, of floats and integers."""
    entries = archive.infolist()
    _check_entries(entries, size, compressed=True)
    if sum(entry.file_size for entry in entries) > _NPZ_EXPANSION * size:
        raise pickle.UnpicklingError(
            f"it would expand to more than {_NPZ_EXPANSION} times its size"
        )
    arrays = {}
    for entry in entries:
        with archive.open(entry) as file:  # checks the CRC-32 at the end
            version = np.lib.format.read_magic(file)
            if version != (1, 0):  # later ones are for structured arrays with long names
                raise pickle.UnpicklingError(f"its entry {entry.filename!r} has version {version}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.kind not in "fiu":
                raise RefusedPickle(f"an array of {dtype} ({entry.filename})")
            data = bytearray(file.read())
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(
                f"its entry {entry.filename!r} should hold {shape} of {dtype} and has "
                f"{len(data):,} bytes"
            )
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
        name = entry.filename.removesuffix(".npy")
        arrays[name] = np.array(array, dtype.newbyteorder("="), order="C")
    return arrays


def _read_safetensors(file: BinaryIO, size: int) -> dict[str, torch.Tensor]:
    """Reads a header of types, shapes and offsets, then the tensors without gaps between them."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype, shape = _SAFETENSORS_TYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise RefusedPickle(f"a tensor of {shown(entry['dtype'], 20)}")
        whole = all(type(number) is int and number >= 0 for number in (start, stop, *shape))
        whole = whole and len(shape) <= _MAX_DIMENSIONS  # the product of many takes hours
        if not whole or start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise pickle.UnpicklingError(f"the offsets of {name!r:.80} do not fit its shape")
        if stop > size - 8 - length:
            raise pickle.UnpicklingError(f"it ends within {name!r:.80}")
        data = torch.empty(stop - start, dtype=torch.uint8)
        _fill(data, file, dtype.itemsize if sys.byteorder == "big" else 1)
        tensors[name], end = data.view(dtype).reshape(shape), stop
    if end != size - 8 - length:
        raise pickle.UnpicklingError(f"it has {size - 8 - length - end:,} bytes of no tensor")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise pickle.UnpicklingError("two of its tensors have the same name")
    return dict(pairs)


def _check_entries(entries: list[zipfile.ZipInfo], size: int, compressed: bool = False) -> None:
    """Checks that names are unique and inside the archive, and that sizes fit into the file."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise pickle.UnpicklingError("two of its entries have the same name")
    end = size
    for entry in sorted(entries, key=lambda entry: -entry.header_offset):
        parts = entry.filename.replace("\\", "/").split("/")
        deflated = compressed and entry.compress_type == zipfile.ZIP_DEFLATED
        stored = entry.header_offset + _LOCAL_HEADER + len(entry.orig_filename)
        stored += entry.compress_size
        problem = None
        if ".." in parts or not parts[0] or ":" in parts[0]:
            problem = "points outside the archive"
        # torch.save does not compress, and a few kilobytes could unpack to any size.
        elif entry.compress_type != zipfile.ZIP_STORED and not deflated:
            problem = "is compressed"
        elif stored > end or (entry.file_size != entry.compress_size and not deflated):
            problem = "is larger than its part of the file"
        if problem:
            raise pickle.UnpicklingError(f"its entry {entry.filename!r} {problem}")
        end = entry.header_offset


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Reads what `torch.save` wrote before torch 1.6: five pickles, then the storages."""
    storages: dict[str, tuple[torch.Tensor, int]] = {}
    unread = size

    def reserve(key: str, dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        nonlocal unread
        unread -= nbytes
        if unread < 0:
            raise pickle.UnpicklingError(f"its storage {key!r:.80} should have {nbytes:,} bytes")
        data = torch.empty(nbytes, dtype=torch.uint8)
        storages[key] = data, dtype.itemsize
        return data

    _, protocol, system = (load_plain_pickle(file, size) for _ in range(3))
    if protocol != 1001 or not isinstance(system, dict):
        raise pickle.UnpicklingError("its protocol is not 1001")
    swap = system.get("little_endian", True) != (sys.byteorder == "little")
    content = load_plain_pickle(file, size, reserve)
    keys = load_plain_pickle(file, size)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise pickle.UnpicklingError("its list of storages is not that of its tensors")
    for key in map(str, keys):
        data, itemsize = storages[key]
        stated = file.read(8)
        if len(stated) < 8 or struct.unpack("<q", stated)[0] * itemsize != len(data):
            raise pickle.UnpicklingError(
                f"its storage {key!r} has another size than its tensors say"
            )
        _fill(data, file, itemsize if swap else 1)
    return content


def _fill(data: torch.Tensor, file: Any, swapped_bytes: int) -> None:
    array = data.numpy()
    if file.readinto(array) != len(array):
        raise pickle.UnpicklingError("it ends within a storage")
    if swapped_bytes > 1:
        array.view(f"u{swapped_bytes}").byteswap(inplace=True)


def unwrap_state(
    content: Mapping[str, Any], path: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Finds the tensors in a dict as returned by `read_weight_file`.

    Returns:
        The tensors under the keys of the file, without a common `module.` prefix; and the other
        entries of the file.

    Raises:
        WeightsError: there are none, or one of the values is not a tensor.
    """
    wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
    inner = content[wrapper] if wrapper else content
    extras = {key: value for key, value in content.items() if wrapper and key != wrapper}
    tensors = {}
    for key, value in inner.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsError(
                f"{path}: the entry {key!r:.100} is a {type(value).__name__}, not a tensor"
            )
        if not key.isprintable():  # detectron2 logs keys as they are
            raise WeightsError(f"{path}: a key has control characters: {key!r:.100}")
        tensors[key] = tensor.detach()
    if not tensors:
        raise WeightsError(f"{path} holds no tensors")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key[len("module.") :]: value for key, value in tensors.items()}
    return tensors, extras


def check_finite(state: Mapping[str, torch.Tensor], path: str) -> None:
    """Raises WeightsError if a tensor contains NaN or infinity; names the keys."""
    broken = []
    for key, value in state.items():
        # Without the repetitions of an expanded tensor, which can be huge.
        once = value[tuple(slice(1) if step == 0 else slice(None) for step in value.stride())]
        if value.is_floating_point() and not bool(torch.isfinite(once).all()):
            broken.append(key)
    if broken:
        raise WeightsError(f"{path} has NaN or infinite values in {list_some(broken)}")
