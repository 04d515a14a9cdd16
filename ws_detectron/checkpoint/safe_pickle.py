"""Reads pickled weights without running anything that the file asks for.

A pickle is a program: it names functions to import and calls them. Weight files need a few of
numpy's only. Here these names lead to stand-ins written in this file, which rebuild plain numeric
arrays; every other name is refused. numpy's own functions are not called either: a forged `dtype`
state makes `numpy.ndarray.__setstate__` take bytes of the file for pointers.
"""

import math
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO, Union

import numpy as np

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")

Plain = Union[dict, list, tuple, str, bytes, int, float, bool, None, np.ndarray]
"""What a safe pickle can hold, and hold nested."""


class RefusedPickle(Exception):
    """A pickle that asks for more than weights need. The message says for what."""


def load_plain_pickle(file: BinaryIO) -> Plain:
    """Loads a pickle of dicts, lists, tuples, strings, numbers and numeric numpy arrays.

    Pickles of Python 2 are read with the encoding "latin1", as detectron2 does. Dict subclasses
    of the standard library become plain dicts.

    Args:
        file: open for reading bytes, at the start of the pickle.

    Raises:
        RefusedPickle: the pickle names a function or class beyond those, or an object array.
        pickle.UnpicklingError: it is damaged, truncated, or no pickle at all.
    """
    try:
        return _to_plain(_Unpickler(file).load(), set())
    except (RefusedPickle, pickle.UnpicklingError):
        raise
    except RecursionError:
        raise pickle.UnpicklingError("nested too deeply") from None
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


# The Python implementation, as the C one reserves memory for whatever memo index a file names.
class _Unpickler(pickle._Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except (KeyError, TypeError):
            raise RefusedPickle(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("a persistent object")

    def get_extension(self, code: int) -> Any:
        raise RefusedPickle(f"the registered extension {code}")


class _StandIn:
    """What the name of an allowed function or class in a pickle leads to; carries no state."""

    __slots__ = ("_function",)

    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RefusedPickle(f"to set the attribute {name}")

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickle("to change a function")


class _Dict(dict):
    """An OrderedDict of the file; the attributes that PyTorch hangs on state dicts are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numeric numpy dtype whose byte order may still have to come."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise RefusedPickle(f"a numpy array of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        byte_order, *structure = state[1:5]
        if structure != [None, None, None] or byte_order not in ("<", ">", "|", "="):
            raise RefusedPickle("a structured numpy array")
        if byte_order in "<>":
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """A numpy array whose contents come after its creation."""

    __slots__ = ("array",)

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran_order, data = state[-4:]
        self.array = _array(data, dtype, shape, "F" if fortran_order else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise RefusedPickle("a numpy array without a numeric type")
    if isinstance(data, str):  # how Python 3 sees the byte strings of Python 2
        data = data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise RefusedPickle("a numpy array of objects")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"array shape {shape!r}")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f"array of shape {tuple(shape)} with {len(data)} bytes")
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return np.array(array, dtype.dtype.newbyteorder("="), order="C")


def _reconstruct(array_type: Any, shape: Any, code: Any) -> _Array:
    if array_type is not _NDARRAY:
        raise RefusedPickle("a subclass of numpy.ndarray")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    result = _Array()
    result.array = _array(data, dtype, shape, order)
    return result


def _scalar(dtype: Any, data: Any = b"") -> Union[int, float, bool]:
    return _array(data, dtype, (), "C").item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes for the pickle protocols of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedPickle(f"the text encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*args: Any) -> bytes:
    """How Python 3 writes b"" for the pickle protocols of Python 2."""
    if args:
        raise RefusedPickle("bytes made by a call")
    return b""


def _no_call(*args: Any) -> Any:
    raise RefusedPickle("to make a numpy.ndarray by a call")


def _ordered_dict(*items: Any) -> _Dict:
    return _Dict(*items)


_NDARRAY = _StandIn(_no_call)
_ALLOWED = {
    ("collections", "OrderedDict"): _StandIn(_ordered_dict),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("_codecs", "encode"): _StandIn(_encode),
    ("__builtin__", "bytes"): _StandIn(_no_bytes),
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = _StandIn(_reconstruct)
    _ALLOWED[_core + ".multiarray", "scalar"] = _StandIn(_scalar)
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _StandIn(_from_buffer)


def _to_plain(value: Any, parents: set[int]) -> Any:
    """Copies containers, so that nothing of this file's types remains."""
    if isinstance(value, _Array):
        return value.array
    if value is None or type(value) in (str, bytes, int, float, bool):
        return value
    if type(value) in (dict, _Dict, list, tuple):
        if id(value) in parents:
            raise pickle.UnpicklingError("a container that holds itself")
        parents.add(id(value))
        if isinstance(value, dict):
            plain: Any = {}
            for key, item in value.items():
                if type(key) not in (str, bytes, int):
                    raise RefusedPickle(f"a dict key of type {type(key).__name__}")
                plain[key] = _to_plain(item, parents)
        else:
            plain = type(value)(_to_plain(item, parents) for item in value)
        parents.remove(id(value))
        return plain
    raise RefusedPickle(f"an object of type {type(value).__name__.lstrip('_')}")
