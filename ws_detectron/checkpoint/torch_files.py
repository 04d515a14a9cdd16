"""Reads files of `torch.save`: the zip format, and the legacy format from before torch 1.6.

`torch.load(weights_only=True)` can run code before torch 2.6 (CVE-2025-32434). In every version it
trusts sizes stated in the file, ignores checksums, and crashes on some keys. Formats:
torch/serialization.py of torch 2.11.
"""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .safe_pickle import (
    ENTRY,
    PlainUnpickler,
    RefusedPickle,
    Sealed,
    StandIn,
    Value,
    check_key,
    count,
)

_LOCAL_HEADER = 30  # bytes before the name of a zip entry
# Storage class -> dtype; others are not used for weights.
_TYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_OTHER_TENSORS = {
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a custom device",
    "_rebuild_device_tensor_from_numpy": "a tensor of a custom device",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_tensor_v3": "a tensor with a dtype other than "
    + ", ".join(str(dtype).replace("torch.", "") for dtype in _TYPES.values()),
    "_rebuild_wrapper_subclass": "a tensor subclass",
}


class DamagedFile(pickle.UnpicklingError):
    """The parts of a torch file are inconsistent; the message says which."""


def read_torch_zip(path: Path) -> Any:
    """Reads a zip file of `torch.save`.

    Returns:
        The saved object; tensors are on the CPU, and parameters become tensors.

    Raises:
        DamagedFile: it is truncated, modified, or another zip file.
        RefusedPickle, pickle.UnpicklingError: as `load_plain_pickle`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, os.path.getsize(path))
    except (RefusedPickle, pickle.UnpicklingError):
        raise
    except Exception as error:  # zipfile has no common base class
        raise DamagedFile(str(error) or type(error).__name__) from None


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    _check_entries(archive.infolist(), size)
    name = next((name for name in entries if name.split("/")[1:] == ["data.pkl"]), None)
    if name is None:
        names = ", ".join(list(entries)[:3])
        raise DamagedFile(f"it is a zip archive ({names}…) but no torch file")
    folder = name.partition("/")[0]
    if f"{folder}/constants.pkl" in entries:
        raise RefusedPickle("a TorchScript program")
    order = f"{folder}/byteorder"
    swap = order in entries and archive.read(order).decode("ascii", "replace") != sys.byteorder

    def read(key: str, data: torch.Tensor, itemsize: int) -> None:
        entry = entries.get(f"{folder}/data/{key}")
        if entry is None or entry.file_size != data.numel():
            there = "none" if entry is None else f"{entry.file_size} bytes"
            raise DamagedFile(f"its storage {key!r} should have {data.numel()} bytes, has {there}")
        with archive.open(entry) as file:  # checks the CRC-32 at the end
            _fill(data, file, itemsize if swap else 1)

    content = io.BytesIO(archive.read(name))
    return _TorchUnpickler(content, size, read).load_plain()


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Checks that names are unique and inside the archive, and that sizes fit into the file."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise DamagedFile("two of its entries have the same name")
    end = size
    for entry in sorted(entries, key=lambda entry: -entry.header_offset):
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise DamagedFile(f"its entry {entry.filename!r} points outside the archive")
        # torch.save does not compress, and a few kilobytes could unpack to any size.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DamagedFile(f"its entry {entry.filename!r} is compressed")
        header = _LOCAL_HEADER + len(entry.orig_filename)
        stored = entry.header_offset + header + max(entry.file_size, entry.compress_size)
        if stored > end or entry.file_size != entry.compress_size:
            raise DamagedFile(f"its entry {entry.filename!r} is larger than its part of the file")
        end = entry.header_offset


def read_legacy_torch(file: BinaryIO, size: int) -> Any:
    """Reads the format of `torch.save` before torch 1.6: five pickles, then the storages.

    Args:
        file: `io.BytesIO` of the whole file.
        size: its size in bytes.

    Raises:
        DamagedFile, RefusedPickle, pickle.UnpicklingError: as `read_torch_zip`.
    """
    storages: dict[str, tuple[torch.Tensor, int]] = {}

    def reserve(key: str, data: torch.Tensor, itemsize: int) -> None:
        storages[key] = data, itemsize

    def load() -> Any:
        return _TorchUnpickler(file, size, reserve).load_plain()

    _, protocol, system = load(), load(), load()
    if protocol != 1001 or not isinstance(system, dict):
        raise DamagedFile(f"its protocol is {protocol!r:.40}; expected 1001")
    swap = system.get("little_endian", True) != (sys.byteorder == "little")
    content, keys = load(), load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise DamagedFile("its list of storages is not that of its tensors")
    for key in map(str, keys):
        data, itemsize = storages[key]
        stated = file.read(8)
        if len(stated) < 8 or struct.unpack("<q", stated)[0] * itemsize != data.numel():
            raise DamagedFile(f"its storage {key!r} has another size than its tensors say")
        _fill(data, file, itemsize if swap else 1)
    return content


def _fill(data: torch.Tensor, file: Any, swapped_bytes: int) -> None:
    array = data.numpy()
    if file.readinto(array) != len(array):
        raise DamagedFile("it ends within a storage")
    if swapped_bytes > 1:
        array.view(f"u{swapped_bytes}").byteswap(inplace=True)


class _StorageType(Sealed):
    """Replaces a storage class."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(Sealed):
    """The elements of one or several tensors, (numel,)."""

    __slots__ = ("elements",)

    def __init__(self, elements: torch.Tensor) -> None:
        self.elements = elements


class _TorchUnpickler(PlainUnpickler):
    """Adds tensors, dtypes, devices and shapes, and the containers in optimizer states.

    Args:
        file, size: as for `PlainUnpickler`.
        fill: called once for each storage with its key, the bytes to fill, and the element size in
            bytes.
    """

    def __init__(
        self, file: BinaryIO, size: int, fill: Callable[[str, torch.Tensor, int], None]
    ) -> None:
        super().__init__(file, size)
        self._fill = fill
        self._storages: dict[str, torch.Tensor] = {}
        self._unread = size
        for name, dtype in _TYPES.items():
            for module in ("torch", "torch.cuda"):
                self.allowed[module, name] = _StorageType(dtype)
        for builtins in ("builtins", "__builtin__"):
            self.allowed[builtins, "set"] = StandIn(self._set)
        self.allowed["collections", "Counter"] = StandIn(self._counter)
        self.allowed["torch", "Size"] = StandIn(self._size_of_tensor)
        self.allowed["torch", "device"] = StandIn(_device)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            self.allowed["torch._utils", name] = StandIn(_tensor)
        for name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            self.allowed["torch._utils", name] = StandIn(lambda tensor, *_: tensor)
        self.allowed["torch._tensor", "_rebuild_from_type_v2"] = StandIn(_of_type)
        for module, name in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
            self.allowed[module, name] = StandIn(_no_call)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _OTHER_TENSORS:
            raise RefusedPickle(_OTHER_TENSORS[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return Value(getattr(torch, name))
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or type(key) is not str:
            raise RefusedPickle("another persistent object than a storage")
        dtype = storage_type.dtype
        itemsize = dtype.itemsize
        if key not in self._storages:
            nbytes = count((numel,)) * itemsize
            self._unread -= nbytes
            if self._unread < 0:
                raise DamagedFile(f"its storage {key!r:.80} should have {nbytes:,} bytes")
            data = torch.empty(nbytes, dtype=torch.uint8)
            self._fill(key, data, itemsize)
            self._storages[key] = data
        elements = self._storages[key].view(dtype)
        if view and view[0] is not None:  # a slice, in files of early torch versions
            _, start, length = view[0]
            count((start, length))
            elements = elements[start : start + length]
        return _Storage(elements)

    def _set(self, items: Any = ()) -> Value:
        self.spend(ENTRY * len(items))
        for item in items:
            check_key(item)
        return Value(set(items))

    def _counter(self, items: Any = ()) -> Value:
        self.spend(ENTRY * len(items))
        return Value(Counter(dict(items)))

    def _size_of_tensor(self, sizes: Any) -> tuple:
        self.spend(ENTRY * len(sizes))
        return tuple(sizes)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *further: Any) -> Value:
    """`further`: requires_grad, hooks, and since torch 1.11 the conj and neg bits."""
    if not isinstance(storage, _Storage):
        raise RefusedPickle("a tensor without storage")
    if len(further) > 2 and further[2]:
        raise RefusedPickle("a tensor that is stored conjugated or negated")
    numel = count(size)
    count((offset, *stride))
    if len(size) != len(stride):
        raise ValueError(f"{len(size)} sizes and {len(stride)} strides")
    last = sum((length - 1) * step for length, step in zip(size, stride))
    if numel and offset + last >= storage.elements.numel():
        raise ValueError(
            f"a tensor of shape {tuple(size)!s:.80} in {storage.elements.numel()} elements"
        )
    elements = storage.elements if numel else storage.elements[:0]
    tensor = elements.as_strided(size, stride, offset + elements.storage_offset() if numel else 0)
    return Value(tensor, numel * tensor.element_size())


def _of_type(rebuild: Any, tensor_type: Any, args: Any, state: Any) -> Any:
    """Rebuilds a tensor that has attributes, without the attributes."""
    if not isinstance(rebuild, StandIn):
        raise RefusedPickle("a tensor made by another function than torch's")
    return rebuild(*args)


def _device(*args: Any) -> Value:
    return Value(torch.device(*args))


def _no_call(*args: Any) -> Any:
    raise RefusedPickle("to make a tensor by a call")
