"""Unpickles weights without running any function that the file names.

A pickle is a program: it names functions to import and calls them. Weight files need only a few
functions of numpy. These names resolve to stand-ins in this file, which rebuild plain numeric
arrays; all other names are refused. numpy's own functions are not called: with a forged `dtype`
state, `numpy.ndarray.__setstate__` would interpret bytes of the file as pointers.

Time and memory are at most a small multiple of the file's size: sizes stated in the file are
checked before memory is allocated, and copies and repeated references are counted.
"""

import math
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Union

import numpy as np

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_MAX_DIMS = 64  # numpy's and torch's
_MAX_BITS = 128  # of an integer, as in the state of a random generator
# Bytes that may be copied while reading: this many times the file's size, plus a constant. A valid
# file needs one copy of each array.
_COPIES, _FEW_BYTES = 4, 1 << 16
ENTRY = 64  # bytes of an entry in a container, roughly
# Size of the result, with repeated references and expanded tensors counted in full: values, bytes,
# and bytes as a multiple of the file's size. The larger limit applies.
_MANY_VALUES = 1_000_000
_MANY_BYTES = 1 << 30
_EXPANSION = 16

Plain = Union[dict, list, tuple, str, bytes, int, float, bool, None, np.ndarray]
"""The types of values in a safe pickle, at any nesting level."""


class RefusedPickle(Exception):
    """A pickle asks for more than weights need; the message says for what."""


def load_plain_pickle(file: BinaryIO) -> Plain:
    """Loads a pickle of dicts, lists, tuples, strings, numbers and numeric numpy arrays.

    Pickles of Python 2 are read with the encoding "latin1", as in detectron2. An OrderedDict
    becomes a plain dict.

    Args:
        file: `io.BytesIO`, at the start of the pickle.

    Raises:
        RefusedPickle: the pickle names another function or class, or has an object array.
        pickle.UnpicklingError: it is damaged, truncated, not a pickle, or expands to many times
            its size.
    """
    return PlainUnpickler(file, size_of(file)).load_plain()


def size_of(file: BinaryIO) -> int:
    """The size of a seekable file in bytes; keeps its position."""
    here = file.tell()
    size = file.seek(0, 2)
    file.seek(here)
    return size


class Sealed:
    """Represents an object while a pickle is read; the pickle cannot change it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickle(f"to change a {type(self).__name__.lstrip('_').lower()}")


class Value(Sealed):
    """A finished value, with the size of its data in bytes."""

    __slots__ = ("nbytes", "value")

    def __init__(self, value: Any, nbytes: int = 0) -> None:
        self.value, self.nbytes = value, nbytes


class StandIn(Sealed):
    """Replaces an allowed function or class that a pickle names; has no state."""

    __slots__ = ("_function",)

    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RefusedPickle(f"to set the attribute {name}")


# The Python implementation, because the C one allocates memory for any memo index in a file, and
# hashes any key, which takes exponential time or overflows the stack for nested tuples.
_Unpickler: Any = pickle._Unpickler


class PlainUnpickler(_Unpickler):
    """Unpickles plain values; `load_plain` reads the next pickle of the file.

    Args:
        file: `io.BytesIO`.
        size: of the whole weight file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._size = size
        self._budget = _COPIES * size + _FEW_BYTES
        self.allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): StandIn(self._ordered_dict),
            ("_codecs", "encode"): StandIn(self._encode),
            ("__builtin__", "bytes"): StandIn(_no_bytes),
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): StandIn(_Dtype),
        }
        for core in ("numpy.core", "numpy._core"):
            self.allowed[core + ".multiarray", "_reconstruct"] = StandIn(self._reconstruct)
            self.allowed[core + ".multiarray", "scalar"] = StandIn(self._scalar)
            self.allowed[core + ".numeric", "_frombuffer"] = StandIn(self._from_buffer)

    def load_plain(self) -> Any:
        """Reads one pickle; raises as `load_plain_pickle`."""
        try:
            return _Plain(self._size).convert(self.load())
        except (RefusedPickle, pickle.UnpicklingError):
            raise
        except RecursionError:
            raise pickle.UnpicklingError("nested too deeply") from None
        except EOFError:
            raise pickle.UnpicklingError("it ends too early") from None
        except Exception as error:  # opcodes of a damaged file can raise any
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None

    def spend(self, count: int) -> None:
        """Counts copied bytes against the budget."""
        self._budget -= count
        if self._budget < 0:
            raise pickle.UnpicklingError("it copies its values many times")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except (KeyError, TypeError):
            raise RefusedPickle(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("a persistent object")

    def get_extension(self, code: int) -> Any:
        raise RefusedPickle(f"the registered extension {code}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        content: dict = {}
        _set_items(content, self.pop_mark())
        self.append(content)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(length, sys.maxsize))))

    def load_no_set(self) -> None:
        raise RefusedPickle("a set")

    dispatch = {
        **_Unpickler.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        **dict.fromkeys((op[0] for op in (pickle.ADDITEMS, pickle.FROZENSET)), load_no_set),
    }

    def _ordered_dict(self, items: Any = ()) -> "_Dict":
        result = _Dict()
        pairs = list(items.items()) if isinstance(items, dict) else list(items)
        self.spend(ENTRY * len(pairs))
        for pair in pairs:
            _set_items(result, list(pair))
        return result

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Python 3 writes bytes like this in the pickle protocols of Python 2."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise RefusedPickle(f"the text encoding {encoding!r:.40}")
        self.spend(len(text))
        return text.encode("latin1")

    def _reconstruct(self, array_type: Any, shape: Any, code: Any) -> "_Array":
        if array_type is not _NDARRAY:
            raise RefusedPickle("a subclass of numpy.ndarray")
        return _Array(self)

    def _from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> "_Array":
        result = _Array(self)
        result.array = self.array(data, dtype, shape, order)
        return result

    def _scalar(self, dtype: Any, data: Any = b"") -> Union[int, float, bool]:
        return self.array(data, dtype, (), "C").item()

    def array(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """A numeric array with a copy of `data`, in the byte order of this machine."""
        if not isinstance(dtype, _Dtype):
            raise RefusedPickle("a numpy array without a numeric type")
        if not isinstance(data, (bytes, bytearray, str)):
            raise RefusedPickle("a numpy array of objects")
        self.spend(len(data))
        if isinstance(data, str):  # a byte string of Python 2
            data = data.encode("latin1")
        if count(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"array of shape {tuple(shape)!s:.80} with {len(data)} bytes")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
        return np.array(array, dtype.dtype.newbyteorder("="), order="C")


def count(shape: Any) -> int:
    """The number of elements in a shape that a file states.

    Raises:
        ValueError: it is not a shape.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) > _MAX_DIMS:
        raise ValueError(f"a shape that is not a tuple of at most {_MAX_DIMS} numbers")
    if not all(type(size) is int and 0 <= size <= sys.maxsize for size in shape):
        raise ValueError("a shape with other entries than sizes")
    return math.prod(shape)


def check_key(key: Any) -> None:
    """Accepts only keys that hash in constant time and cannot be made to collide.

    Raises:
        RefusedPickle: for another key.
    """
    if key is not None and type(key) not in (str, bytes, int, float, bool):
        raise RefusedPickle(f"a dict key of type {type(key).__name__.lstrip('_')}")
    if type(key) is int and key.bit_length() > 64:
        raise RefusedPickle("a dict key of more than 64 bits")


def _set_items(target: Any, items: list) -> None:
    if type(target) not in (dict, _Dict):
        raise RefusedPickle(f"to set an item of a {type(target).__name__.lstrip('_')}")
    if len(items) % 2:
        raise ValueError("a key without value")
    for key, value in zip(items[::2], items[1::2]):
        check_key(key)
        target[key] = value


class _Dict(dict):
    """An OrderedDict of the file; attributes that PyTorch adds to state dicts are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numeric numpy dtype, whose byte order may follow in its state."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise RefusedPickle(f"a numpy array of type {code!r:.40}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        byte_order, *structure = state[1:5]
        if structure != [None, None, None] or byte_order not in ("<", ">", "|", "="):
            raise RefusedPickle("a structured numpy array")
        if byte_order in "<>":
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """A numpy array, whose contents follow in its state."""

    __slots__ = ("_unpickler", "array")

    array: np.ndarray

    def __init__(self, unpickler: PlainUnpickler) -> None:
        self._unpickler = unpickler

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran_order, data = state[-4:]
        order = "F" if fortran_order is True else "C"
        self.array = self._unpickler.array(data, dtype, shape, order)


def _no_bytes(*args: Any) -> bytes:
    """Python 3 writes b"" like this in the pickle protocols of Python 2."""
    if args:
        raise RefusedPickle("bytes made by a call")
    return b""


def _no_call(*args: Any) -> Any:
    raise RefusedPickle("to make a numpy.ndarray by a call")


_NDARRAY = StandIn(_no_call)


class _Plain:
    """Copies containers, replacing the types of this file with plain ones.

    An object with several references is copied once and stays one object, but each reference
    counts towards the size limits, as a traversal of the result would visit each.
    """

    def __init__(self, size: int) -> None:
        self._max_values = max(_MANY_VALUES, size)
        self._max_bytes = max(_MANY_BYTES, _EXPANSION * size)
        # id -> (copy, values, bytes, original); keeping the original alive keeps its id unique
        self._done: dict[int, tuple[Any, int, int, Any]] = {}
        self._parents: set[int] = set()

    def convert(self, value: Any) -> Any:
        """Raises RefusedPickle and UnpicklingError."""
        return self._convert(value)[0]

    def _convert(self, value: Any) -> tuple[Any, int, int]:
        if isinstance(value, _Array):
            return value.array, 1, value.array.nbytes
        if isinstance(value, Value):
            return value.value, 1, value.nbytes
        if value is None or type(value) in (float, bool):
            return value, 1, 0
        if type(value) in (str, bytes):
            return value, 1, len(value)
        if type(value) is int:
            if value.bit_length() > _MAX_BITS:
                raise RefusedPickle(f"an integer of {value.bit_length()} bits")
            return value, 1, 0
        if type(value) not in (dict, _Dict, list, tuple):
            raise RefusedPickle(f"an object of type {type(value).__name__.lstrip('_')}")
        known = self._done.get(id(value))
        if known is None:
            if id(value) in self._parents:
                raise pickle.UnpicklingError("a container that holds itself")
            self._parents.add(id(value))
            known = (*self._container(value), value)
            self._parents.remove(id(value))
            self._done[id(value)] = known
        return known[:3]

    def _container(self, value: Any) -> tuple[Any, int, int]:
        values, nbytes, keys = 1, 0, None
        items: Iterable = value
        if isinstance(value, dict):
            keys, items = list(value), value.values()
        copies = []
        for item in items:
            copy, more, more_bytes = self._convert(item)
            copies.append(copy)
            values, nbytes = values + more, nbytes + more_bytes
        if values > self._max_values or nbytes > self._max_bytes:
            raise pickle.UnpicklingError(
                f"it expands to {values:,} values and {nbytes:,} bytes, many times its size"
            )
        if keys is not None:
            return dict(zip(keys, copies)), values, nbytes
        return type(value)(copies), values, nbytes
