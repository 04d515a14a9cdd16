"""Rebuilds plain values from a pickle without running anything that it names.

A pickle is a program: it names functions to import and calls them. Weight files need a few of
numpy and torch. This module reads the opcodes with `pickletools.genops`, interprets those that
build plain values, and calls functions of its own for these names; it refuses everything else.

A `pickle.Unpickler` with a `find_class` of its own is not enough: it reserves memory for any length
and memo index in a file, hashes nested tuples in exponential time, and lets a file set the state of
arrays and tensors (with a forged dtype, numpy interprets bytes of the file as pointers).

Time and memory are at most a small multiple of the file's size: sizes stated in the file are
checked before memory is allocated, and copies and repeated references are counted.
"""

import math
import pickle
import pickletools
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Optional

import numpy as np
import torch

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_MAX_DIMS = 64  # numpy's and torch's
_MAX_BITS = 128  # of an integer, as in the state of a random generator
# Bytes that may be copied while reading: this many times the file's size, plus a constant. A valid
# file needs one copy of each array.
_COPIES, _FEW_BYTES = 4, 1 << 16
_ENTRY = 64  # bytes of an entry in a container, roughly
# Size of the result, with repeated references and expanded tensors counted in full: values, bytes,
# and bytes as a multiple of the file's size. The larger limit applies.
_MANY_VALUES = 1_000_000
_MANY_BYTES = 1 << 30
_EXPANSION = 16

_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
# Storage class -> dtype; others are not used for weights.
_STORAGES = {
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
# What may be in the result, beside containers, strings, arrays and tensors.
_LEAVES = (bool, int, float, set, Counter, torch.dtype, torch.device)
# What is named but not called.
_VALUES: dict[str, Any] = {
    "numpy.ndarray": None,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    **{f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype},
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in _STORAGES.items()},
}

ReadStorage = Callable[[str, torch.dtype, int], torch.Tensor]
"""Key of a storage, its dtype, its size in bytes -> its bytes, uint8 (size,)."""


class RefusedPickle(pickle.UnpicklingError):
    """A pickle asks for more than weights need; the message says for what."""


def load_plain_pickle(
    file: BinaryIO, size: Optional[int] = None, read_storage: Optional[ReadStorage] = None
) -> Any:
    """Reads a pickle of dicts, lists, tuples, strings, numbers, arrays and torch's tensors.

    An OrderedDict becomes a plain dict. Byte strings of Python 2 are read with the encoding
    "latin1", as in detectron2; in its oldest protocol, 0, `pickletools` reads only ASCII.

    Args:
        file: `io.BytesIO` at the start of the pickle; is left at its end.
        size: of the whole weight file in bytes, by which results are limited; by default that of
            `file`.
        read_storage: called once for each storage of tensors; None refuses tensors.

    Raises:
        RefusedPickle: the pickle names another function or class, or has an object array.
        pickle.UnpicklingError: it is damaged, truncated, not a pickle, or expands to many times
            its size.
    """
    if size is None:
        here = file.tell()
        size = file.seek(0, 2)
        file.seek(here)
    try:
        interpreter = _Interpreter(size, read_storage)
        return interpreter.finish(interpreter.run(file))[0]
    except pickle.UnpicklingError:
        raise
    except RecursionError:
        raise pickle.UnpicklingError("nested too deeply") from None
    except Exception as error:  # opcodes of a damaged file can raise any
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class _Function:
    """A name in a pickle that it may call."""

    call: Callable[..., Any]


@dataclass(frozen=True)
class _Storage:
    """The elements of one or several tensors, (numel,)."""

    elements: torch.Tensor


@dataclass
class _Array:
    """A numpy array, whose contents follow in its state."""

    array: Optional[np.ndarray] = None


class _Dtype:
    """A numeric numpy dtype, whose byte order may follow in its state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if type(code) is not str or not _DTYPE.fullmatch(code):
            raise RefusedPickle(f"a numpy array of type {_short(code)}")
        self.dtype = np.dtype(code)


class _Interpreter:
    """Runs the opcodes of one pickle."""

    def __init__(self, size: int, read_storage: Optional[ReadStorage]) -> None:
        self._read_storage = read_storage
        self._storages: dict[str, torch.Tensor] = {}
        self._budget = _COPIES * size + _FEW_BYTES
        self._max_values = max(_MANY_VALUES, size)
        self._max_bytes = max(_MANY_BYTES, _EXPANSION * size)
        # id of a container -> (copy, values, bytes); None while it is copied
        self._finished: dict[int, Optional[tuple[Any, int, int]]] = {}
        self._functions: dict[str, Callable[..., Any]] = {
            "__builtin__.bytes": lambda: b"",  # Python 3 writes b"" like this for Python 2
            "__builtin__.set": self._set,
            "_codecs.encode": self._encode,
            "builtins.set": self._set,
            "collections.Counter": lambda counts: Counter(self._dict(counts)),
            "collections.OrderedDict": self._dict,
            "numpy.dtype": _Dtype,
            "torch.Size": self._size,
            "torch._tensor._rebuild_from_type_v2": _rebuild_without_attributes,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch._utils._rebuild_tensor": _rebuild_tensor,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch.device": _device,
        }
        for core in ("numpy.core", "numpy._core"):
            self._functions[f"{core}.multiarray._reconstruct"] = lambda *_: _Array()
            self._functions[f"{core}.multiarray.scalar"] = self._scalar
            self._functions[f"{core}.numeric._frombuffer"] = self._array
        # Opcodes that replace values on the stack by one.
        self._operations: dict[str, Callable[..., Any]] = {
            "NONE": lambda: None,
            "NEWTRUE": lambda: True,
            "NEWFALSE": lambda: False,
            "EMPTY_DICT": dict,
            "DICT": lambda *items: _set_items({}, *items),
            "SETITEM": _set_items,
            "SETITEMS": _set_items,
            "EMPTY_LIST": list,
            "LIST": lambda *items: list(items),
            "APPEND": _append,
            "APPENDS": _append,
            **dict.fromkeys(
                ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"), lambda *items: items
            ),
            "STACK_GLOBAL": self._find,
            "REDUCE": _call,
            "BUILD": self._set_state,
            "BINPERSID": self._load_storage,
        }

    def run(self, file: BinaryIO) -> Any:
        """Reads up to the opcode STOP; returns the value with the placeholders of this module."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name in _LITERALS:
                if type(argument) is int and argument.bit_length() > _MAX_BITS:
                    raise RefusedPickle(f"an integer of {argument.bit_length()} bits")
                stack.append(argument)
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "POP":
                stack.pop()
            elif name == "GLOBAL":
                stack.append(self._find(*argument.split(" ", 1)))
            elif name in self._operations:
                before = opcode.stack_before
                if pickletools.markobject in before:
                    start = marks.pop() - before.index(pickletools.markobject)
                else:
                    start = len(stack) - len(before)
                if start < 0:
                    raise pickle.UnpicklingError(f"{name} without its values")
                stack[start:] = [self._operations[name](*stack[start:])]
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise RefusedPickle(f"the opcode {name}")
        return stack[-1]

    def finish(self, value: Any) -> tuple[Any, int, int]:
        """A copy of a value without placeholders; its number of values, and of their bytes.

        An object with several references is copied once and stays one object, but each reference
        counts towards the size limits, as a traversal of the result would visit each.
        """
        if type(value) is _Array:
            value = value.array
        if isinstance(value, np.ndarray):
            return value, 1, value.nbytes
        if isinstance(value, torch.Tensor):
            return value, 1, value.numel() * value.element_size()
        if type(value) in (str, bytes):
            return value, 1, len(value)
        if value is None or type(value) in _LEAVES:
            return value, 1, 0
        if type(value) not in (dict, list, tuple):
            raise RefusedPickle(f"an object of type {type(value).__name__.lstrip('_')}")
        if id(value) not in self._finished:
            self._finished[id(value)] = None
            self._finished[id(value)] = self._copy(value)
        known = self._finished[id(value)]
        if known is None:
            raise pickle.UnpicklingError("a container that holds itself")
        return known

    def _copy(self, container: Any) -> tuple[Any, int, int]:
        values, nbytes, copies = 1, 0, []
        for item in container.values() if type(container) is dict else container:
            copy, more, more_bytes = self.finish(item)
            copies.append(copy)
            values, nbytes = values + more, nbytes + more_bytes
        if values > self._max_values or nbytes > self._max_bytes:
            raise pickle.UnpicklingError(
                f"it expands to {values:,} values and {nbytes:,} bytes, many times its size"
            )
        copied = (
            dict(zip(container, copies)) if type(container) is dict else type(container)(copies)
        )
        return copied, values, nbytes

    def _spend(self, nbytes: int) -> None:
        self._budget -= nbytes
        if self._budget < 0:
            raise pickle.UnpicklingError("it copies its values many times")

    def _find(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise RefusedPickle("a name that is not a string")
        full = f"{module}.{name}"
        if full in self._functions:
            return _Function(self._functions[full])
        if full in _VALUES:
            return _VALUES[full]
        raise RefusedPickle(full)

    def _set_state(self, target: Any, state: Any) -> Any:
        if type(target) is _Array:
            shape, dtype, fortran_order, data = state[-4:]
            order = "F" if fortran_order is True else "C"
            target.array = self._array(data, dtype, shape, order)
        elif type(target) is _Dtype:
            byte_order, *structure = state[1:5]
            if structure != [None, None, None] or byte_order not in ("<", ">", "|", "="):
                raise RefusedPickle("a structured numpy array")
            if byte_order in "<>":
                target.dtype = target.dtype.newbyteorder(byte_order)
        elif type(target) is not dict:  # PyTorch adds attributes to state dicts
            raise RefusedPickle(f"changing a {type(target).__name__.lstrip('_').lower()}")
        return target

    def _load_storage(self, pid: Any) -> _Storage:
        if self._read_storage is None or type(pid) is not tuple or pid[0] != "storage":
            raise RefusedPickle("a persistent object")
        dtype, key, _location, numel, *view = pid[1:]
        if type(key) is not str or type(dtype) is not torch.dtype:
            raise RefusedPickle("another persistent object than a storage")
        if dtype not in _STORAGES.values():
            raise RefusedPickle(f"a storage of {dtype}")
        if key not in self._storages:
            self._storages[key] = self._read_storage(key, dtype, _count((numel,)) * dtype.itemsize)
        elements = self._storages[key].view(dtype)
        if view and view[0] is not None:  # a slice, in files of early torch versions
            _, start, length = view[0]
            _count((start, length))
            elements = elements[start : start + length]
        return _Storage(elements)

    def _dict(self, pairs: Any = ()) -> dict:
        items = list(pairs.items()) if type(pairs) is dict else list(pairs)
        self._spend(_ENTRY * len(items))
        return _set_items({}, *(part for key, value in items for part in (key, value)))

    def _set(self, items: Any = ()) -> set:
        self._spend(_ENTRY * len(items))
        for item in items:
            _check_key(item)
        return set(items)

    def _size(self, sizes: Any) -> tuple:
        self._spend(_ENTRY * len(sizes))
        return tuple(sizes)

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Python 3 writes bytes like this in the pickle protocols of Python 2."""
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise RefusedPickle(f"the text encoding {_short(encoding)}")
        self._spend(len(text))
        return text.encode("latin1")

    def _array(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """A numeric array with a copy of `data`, in the byte order of this machine."""
        if type(dtype) is not _Dtype:
            raise RefusedPickle("a numpy array without a numeric type")
        if type(data) not in (bytes, bytearray, str):
            raise RefusedPickle("a numpy array of objects")
        self._spend(len(data))
        if type(data) is str:  # a byte string of Python 2
            data = data.encode("latin1")
        if _count(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"array of shape {tuple(shape)!s:.80} with {len(data)} bytes")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
        return np.array(array, dtype.dtype.newbyteorder("="), order="C")

    def _scalar(self, dtype: Any, data: Any = b"") -> Any:
        return self._array(data, dtype, (), "C").item()


def _count(shape: Any) -> int:
    """The number of elements in a shape that a file states."""
    if type(shape) not in (tuple, list) or len(shape) > _MAX_DIMS:
        raise ValueError(f"a shape that is not a tuple of at most {_MAX_DIMS} numbers")
    if not all(type(size) is int and 0 <= size <= sys.maxsize for size in shape):
        raise ValueError("a shape with other entries than sizes")
    return math.prod(shape)


def _check_key(key: Any) -> None:
    """Accepts only keys that hash in constant time and cannot be made to collide."""
    if key is not None and type(key) not in (str, bytes, int, float, bool):
        raise RefusedPickle(f"a dict key of type {type(key).__name__.lstrip('_')}")
    if type(key) is int and key.bit_length() > 64:
        raise RefusedPickle("a dict key of more than 64 bits")


def _set_items(target: Any, *items: Any) -> Any:
    if type(target) is not dict:
        raise RefusedPickle(f"setting an item of a {type(target).__name__.lstrip('_')}")
    if len(items) % 2:
        raise ValueError("a key without value")
    for key, value in zip(items[::2], items[1::2]):
        _check_key(key)
        target[key] = value
    return target


def _append(target: Any, *items: Any) -> Any:
    if type(target) is not list:
        raise RefusedPickle(f"appending to a {type(target).__name__.lstrip('_')}")
    target.extend(items)
    return target


def _call(function: Any, args: Any) -> Any:
    if type(function) is not _Function or type(args) is not tuple:
        raise RefusedPickle("calling something that is not a function")
    return function.call(*args)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *further: Any) -> Any:
    """`further`: requires_grad, hooks, and since torch 1.11 the conj and neg bits."""
    if type(storage) is not _Storage:
        raise RefusedPickle("a tensor without storage")
    if len(further) > 2 and further[2]:
        raise RefusedPickle("a tensor that is stored conjugated or negated")
    elements, numel = storage.elements, _count(size)
    _count((offset, *stride))
    if len(size) != len(stride):
        raise ValueError(f"{len(size)} sizes and {len(stride)} strides")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if not numel:
        return elements[:0].as_strided(size, stride, 0)
    if last >= elements.numel():
        raise ValueError(f"a tensor of shape {tuple(size)!s:.80} in {elements.numel()} elements")
    return elements.as_strided(size, stride, offset + elements.storage_offset())


def _rebuild_without_attributes(rebuild: Any, tensor_type: Any, args: Any, state: Any) -> Any:
    return _call(rebuild, args)


def _device(*args: Any) -> torch.device:
    if not all(type(arg) in (str, int) for arg in args):
        raise RefusedPickle("a device without a name")
    return torch.device(*args)


def _short(value: Any) -> str:
    """For a message; the `repr` of a container that a file repeats could take forever."""
    return f"{value!r:.40}" if type(value) is str else f"a {type(value).__name__}"
