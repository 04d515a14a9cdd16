"""Weight files that once took hours, gigabytes or the process; most are a few bytes."""

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from typing import Any, Optional

import numpy as np
import torch

HUGE = 20 * 2**30
_DATA = b"\x80\x02}X\x01\x00\x00\x00w"  # {"w": ... up to SETITEM and STOP
_NEST = 200_000


def doubled(first: bytes, step: bytes, times: int = 40) -> bytes:
    """Opcodes that put into the stack a value which holds itself 2 ** times times."""
    return first + b"".join(b"r" + struct.pack("<I", i) + _get(i) + step for i in range(times))


def _get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def _pickled(value: bytes) -> bytes:
    return _DATA + value + b"s."


def _array_of(data: bytes, count: int) -> bytes:
    """A list of arrays that all have one bytes object as data."""
    length = struct.pack("<I", len(data))
    make = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    state = b"(K\x01J" + length + b"\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87Rq\x05"
    state += b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    arrays = b"".join(make + state + b"\x89h\x01tb" for _ in range(count))
    return b"B" + length + data + b"q\x010](" + arrays + b"e"


PICKLES = {
    "doubled list": _pickled(doubled(b"]", b"\x86")),
    "doubled dict": _pickled(doubled(b"}", b"\x86")),
    "doubled tuple as a key": b"\x80\x02}" + doubled(b")", b"\x86") + b"Ns.",
    "doubled tuple as a key of DICT": b"\x80\x02(" + doubled(b")", b"\x86") + b"Nd.",
    "doubled tuple as a key of SETITEMS": b"\x80\x02}(" + doubled(b")", b"\x86") + b"Nu.",
    "doubled tuple in a set": b"\x80\x04\x8f(" + doubled(b")", b"\x86") + b"\x90.",
    "doubled tuple in a frozenset": b"\x80\x04(" + doubled(b")", b"\x86") + b"\x91.",
    "doubled tuple as a key of OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]"
    + doubled(b")", b"\x86") + b"N\x86a\x85R.",
    # A message must not print such a value: its text is as long as the value expanded.
    "doubled tuple as a dtype": _pickled(b"cnumpy\ndtype\n" + doubled(b")", b"\x86") + b"\x85R"),
    "doubled tuple as a text encoding": _pickled(
        b"c_codecs\nencode\nX\x01\x00\x00\x00a" + doubled(b")", b"\x86") + b"\x86R"
    ),
    "doubled tuple as a name": _pickled(doubled(b")", b"\x86") + doubled(b")", b"\x86") + b"\x93"),
    "doubled tuple as a device": _pickled(
        b"ctorch\ndevice\n" + doubled(b")", b"\x86") + b"\x85R"
    ),
    "doubled tuple as a byte order": _pickled(
        b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87R(K\x03"
        + doubled(b")", b"\x86") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    ),
    "doubled tuple as a storage": _pickled(doubled(b")", b"\x86") + b"Q"),
    "doubled tuple as a shape": _pickled(b"ctorch\nSize\n" + doubled(b")", b"\x86") + b"\x85R"),
    "deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * _NEST + b"Ns.",
    "deep list": _pickled(b"]" * _NEST + b"a" * (_NEST - 1)),
    "deep tuple": _pickled(b")" + b"\x85" * _NEST),
    "BINBYTES8": _pickled(b"\x8e" + struct.pack("<Q", HUGE)),
    "BINUNICODE8": _pickled(b"\x8d" + struct.pack("<Q", HUGE)),
    "BYTEARRAY8": _pickled(b"\x96" + struct.pack("<Q", HUGE)),
    "BINBYTES": _pickled(b"B" + struct.pack("<I", 2**32 - 1)),
    "BINUNICODE": _pickled(b"X" + struct.pack("<I", 2**32 - 1)),
    "BINSTRING": _pickled(b"T" + struct.pack("<i", 2**31 - 1)),
    "LONG4": _pickled(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"}",
    "13 bytes": b"\x80\x04}\x8e" + struct.pack("<Q", HUGE) + b".",
    "one bytes object in 200 arrays": _pickled(_array_of(bytes(100_000), 200)),
    "one text encoded 10,000 times": _pickled(
        b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x000]("
        + b"c_codecs\nencode\nh\x00\x85R" * 10_000 + b"e"
    ),
    "one dict copied 20,000 times": b"\x80\x02}(" + b"".join(
        b"J" + struct.pack("<i", i) + b"N" for i in range(20_000)
    ) + b"uq\x00]q\x01(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 20_000 + b"e0.",
    "huge shape": _pickled(
        _array_of(b"1234", 1).replace(
            b"(K\x01J\x04\x00\x00\x00\x85", b"(K\x01(" + b"J\xff\xff\xff\x7f" * 60 + b"t"
        )
    ),
    "long integer": _pickled(b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000),
    "decimal integer": _pickled(b"L" + b"9" * 100_000 + b"L\n"),
    "integers of one hash as keys": b"\x80\x02}(" + b"".join(
        b"\x8a\x10" + (i * (2**61 - 1) << 0).to_bytes(16, "little") + b"N" for i in range(9, 40_000)
    ) + b"u.",
    "memo index": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"0\x8a\x01\x00" + b".",
    "resized data": _pickled(
        b"\x96" + struct.pack("<Q", 4) + b"1234q\x000"
        b"cnumpy.core.numeric\n_frombuffer\n(h\x00cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87R"
        b"K\x04\x85X\x01\x00\x00\x00CtRq\x020h\x00K\x01a"
    ),
}  # fmt: skip
"""Each must be refused as a pickle, and as the data.pkl of a torch zip file."""


def torch_zip(
    content: bytes, storages: Optional[dict[str, bytes]] = None, compression: int = 0
) -> bytes:
    """A torch file with this data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        entries = {"data.pkl": content, "version": b"3\n"}
        entries |= {f"data/{key}": data for key, data in (storages or {}).items()}
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, compression)
    return file.getvalue()


def tensor_pickle(
    size: tuple[int, ...],
    stride: tuple[int, ...],
    numel: int,
    offset: int = 0,
    storage: str = "FloatStorage",
    rebuild: str = "_rebuild_tensor_v2",
    last: Any = None,
) -> bytes:
    """data.pkl of `{"w": tensor}`, with any numbers in it."""

    def tuple_of(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(pickle.dumps(v, 2)[2:-1] for v in values) + b"t"

    text = b"X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\n"
    number = pickle.dumps(numel, 2)[2:-1]
    pid = b"(" + text + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number + b"tQ"
    args = b"(" + pid + pickle.dumps(offset, 2)[2:-1] + tuple_of(size) + tuple_of(stride)
    args += b"\x89ccollections\nOrderedDict\n)R"
    args += (pickle.dumps(last, 2)[2:-1] if last is not None else b"") + b"t"
    return _DATA + b"ctorch._utils\n" + rebuild.encode() + b"\n" + args + b"Rs."


FOUR = np.arange(4, dtype="f4").tobytes()
TENSORS = {
    "huge stride": torch_zip(tensor_pickle((2, 2), (10**12, 1), 4), {"0": FOUR}),
    "expanded to 10^12": torch_zip(tensor_pickle((10**12,), (0,), 4), {"0": FOUR}),
    "overlapping windows": torch_zip(tensor_pickle((10**6, 10**6), (0, 0), 4), {"0": FOUR}),
    "10^5 expanded to 10^5 each": torch_zip(
        _DATA + b"](" + tensor_pickle((10**5,), (0,), 4)[len(_DATA) : -2] * 10_000 + b"es.",
        {"0": FOUR},
    ),
    "offset beyond": torch_zip(tensor_pickle((1,), (1,), 4, offset=4), {"0": FOUR}),
    "negative offset": torch_zip(tensor_pickle((1,), (1,), 4, offset=-1), {"0": FOUR}),
    "negative size": torch_zip(tensor_pickle((-1,), (1,), 4), {"0": FOUR}),
    "negative stride": torch_zip(tensor_pickle((2,), (-1,), 4, offset=1), {"0": FOUR}),
    "shape of 2^100": torch_zip(tensor_pickle((2**100,), (0,), 4), {"0": FOUR}),
    "storage larger than its entry": torch_zip(tensor_pickle((9,), (1,), 9), {"0": FOUR}),
    "storage of a terabyte": torch_zip(tensor_pickle((1,), (1,), 10**12), {"0": FOUR}),
    "storage that is not there": torch_zip(tensor_pickle((4,), (1,), 4)),
    "conj": torch_zip(tensor_pickle((4,), (1,), 4, last={"conj": True}), {"0": FOUR}),
    "neg": torch_zip(tensor_pickle((4,), (1,), 4, last={"neg": True}), {"0": FOUR}),
    "slots set by BUILD": torch_zip(
        tensor_pickle((4,), (1,), 4)[:-2] + b"N}X\x05\x00\x00\x00value]s\x86bs.", {"0": FOUR}
    ),
    "complex": torch_zip(tensor_pickle((1,), (1,), 1, storage="ComplexFloatStorage"), {"0": FOUR}),
    "set_ by BUILD": torch_zip(tensor_pickle((4,), (1,), 4)[:-2] + b"N\x85bs.", {"0": FOUR}),
}


def saved(content: Any, zipped: bool = True) -> bytes:
    """What `torch.save` writes, the same each time."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if zipped:
        return file.getvalue()
    data = file.getvalue()  # names its storages by their addresses
    for number, key in enumerate(dict.fromkeys(re.findall(rb"X.\x00{3}(\d{9,})q", data))):
        text = b"X" + struct.pack("<I", len(key)) + key
        data = data.replace(text, b"X\x03\x00\x00\x00%03d" % number)
    return data


def special_tensors() -> dict[str, torch.Tensor]:
    """Tensors that are no weights."""
    floats = torch.arange(4.0)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return {
        "float8": floats.to(torch.float8_e4m3fn),
        "sparse": floats.to_sparse(),
        "sparse csr": torch.eye(2).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8),
        "meta": floats.to("meta"),
        "nested": nested,
        "complex": floats.to(torch.complex64),
        "conj": torch.view_as_complex(torch.ones(2, 2)).conj(),
        "neg": torch.view_as_complex(torch.ones(2, 2)).conj().imag,
        "uint16": torch.zeros(4, dtype=torch.uint16),
    }


def legacy_with(numel: int) -> bytes:
    """A file of before torch 1.6 whose storage states another length."""
    data = saved({"w": torch.arange(4.0)}, zipped=False)
    pid_number, in_storage = b"cpuq\x06K\x04", struct.pack("<q", 4)
    assert data.count(in_storage) == 1
    index = data.index(b"K\x04", data.index(b"storage"))
    assert pid_number[-2:] == data[index : index + 2]
    number = pickle.dumps(numel, 2)[2:-1]
    return data[:index] + number + data[index + 2 :].replace(in_storage, struct.pack("<q", numel))


def flipped(data: bytes, inside: bytes) -> bytes:
    """One bit of a stored tensor changed."""
    assert data.count(inside) == 1
    return data.replace(inside, bytes([inside[0] ^ 1]) + inside[1:])


def _changed_directory(size: int) -> bytes:
    """A zip file whose directory states another size for the storage."""
    data = torch_zip(tensor_pickle((4,), (1,), 4), {"0": FOUR})
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/0"))
    return data[: entry + 20] + struct.pack("<II", size, size) + data[entry + 28 :]


def _with_entry(name: str) -> bytes:
    file = io.BytesIO(torch_zip(tensor_pickle((4,), (1,), 4), {"0": FOUR}))
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(f"archive/{name}", bytes(16))
    return file.getvalue()


def _overlapping_entries() -> bytes:
    """Many entries of the directory for one place in the file."""
    data = torch_zip(tensor_pickle((4,), (1,), 4), {"0": FOUR})
    start, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    directory = data[start:end]
    entry = directory[directory.rindex(b"PK\x01\x02", 0, directory.index(b"archive/data/0")) :]
    entry = entry[: 46 + len("archive/data/0")]
    copies = [entry[:-1] + bytes([65 + i]) for i in range(20)]
    final = bytearray(data[end:])
    final[8:16] = struct.pack("<HHI", 23, 23, len(directory) + len(b"".join(copies)))
    return data[:start] + directory + b"".join(copies) + bytes(final)


ZIPS = {
    "directory states 3 GB": _changed_directory(3 * 2**30),
    "directory states 17 bytes": _changed_directory(17),
    "doubled entry": _with_entry("data/0"),
    "overlapping entries": _overlapping_entries(),
    "compressed": torch_zip(tensor_pickle((4,), (1,), 4), {"0": FOUR}, zipfile.ZIP_DEFLATED),
    "TorchScript": _with_entry("constants.pkl"),
}


def safetensors(entries: dict[str, Any], data: bytes = b"", header: bytes = b"") -> bytes:
    """A `.safetensors` file with this header and these bytes."""
    header = header or json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def _entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFETENSORS = {
    "ends early": safetensors(_entry([4], [0, 16]), bytes(8)),
    "terabyte": safetensors(_entry([10**12], [0, 4 * 10**12]), bytes(16)),
    "other shape": safetensors(_entry([5], [0, 16]), bytes(16)),
    "negative shape": safetensors(_entry([-2, -2], [0, 16]), bytes(16)),
    "fractional shape": safetensors(_entry([4.0], [0, 16]), bytes(16)),
    "gap": safetensors(_entry([2], [8, 16]), bytes(16)),
    "overlap": safetensors({**_entry([4], [0, 16]), "v": _entry([2], [8, 16])["w"]}, bytes(16)),
    "bytes of no tensor": safetensors(_entry([2], [0, 8]), bytes(16)),
    "unknown type": safetensors(_entry([4], [0, 16], "F8_E4M3"), bytes(16)),
    "huge empty shape": safetensors(_entry([0, 10**30], [0, 0])),
    "product of many": safetensors(_entry([2**62] * 100_000, [0, 16]), bytes(16)),
    "same name twice": safetensors(
        {}, bytes(16), b"{" + 2 * b'"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},' + b"}"
    ).replace(b",}", b"} "),
    "deep header": safetensors({}, header=b'{"w":' + b"[" * _NEST + b"]" * _NEST + b"}"),
    "no JSON": safetensors({}, header=b"{" + bytes(20)),
    "entry without offsets": safetensors({"w": {"dtype": "F32", "shape": [4]}}, bytes(16)),
    "entry of another kind": safetensors({"w": [1, 2]}),
}


def npy(header: str, data: bytes = bytes(16), version: bytes = b"\x01\x00") -> bytes:
    """A `.npy` entry with this header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def npz(entries: dict[str, bytes], compression: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def _header(shape: str, dtype: str = "<f4") -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"


_OBJECTS = pickle.dumps([1, 2])
NPZS = {
    "objects": npz({"w.npy": npy(_header("(2,)", "|O"), _OBJECTS)}),
    "text": npz({"w.npy": npy(_header("(4,)", "<U1"))}),
    "records": npz({"w.npy": npy("{'descr': [('a', '<f4')], 'fortran_order': 0, 'shape': (4,)}")}),
    "terabyte": npz({"w.npy": npy(_header("(1000000000000,)"))}),
    "other shape": npz({"w.npy": npy(_header("(5,)"))}),
    "negative shape": npz({"w.npy": npy(_header("(-2, -2)"))}),
    "huge empty shape": npz({"w.npy": npy(_header("(0, 10000000000000000000)"), b"")}),
    "deep header": npz({"w.npy": npy("(" * 9000 + ")" * 9000)}),
    "version 3": npz({"w.npy": npy(_header("(4,)"), version=b"\x03\x00")}),
    "expands": npz({"w.npy": npy(_header("(5000000,)"), bytes(20_000_000))}, zipfile.ZIP_DEFLATED),
    "other entry": npz({"w.npy": npy(_header("(4,)")), "readme.txt": b"hello"}),
    "flipped bit": flipped(npz({"w.npy": npy(_header("(4,)"), FOUR)}), FOUR),
}


def all_files() -> dict[str, bytes]:
    """Every file of this module."""
    files = {f"pickle, {name}": content for name, content in PICKLES.items()}
    files |= {f"zip, {name}": torch_zip(content) for name, content in PICKLES.items()}
    files |= {f"tensor, {name}": content for name, content in TENSORS.items()}
    files |= {f"archive, {name}": content for name, content in ZIPS.items()}
    files |= {f"safetensors, {name}": content for name, content in SAFETENSORS.items()}
    files |= {f"npz, {name}": content for name, content in NPZS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several of these kinds are prototypes
        for name, tensor in special_tensors().items():
            files[f"{name}, zip"] = saved({"w": tensor})
            files[f"{name}, legacy"] = saved({"w": tensor}, zipped=False)
    files["legacy, terabyte"] = legacy_with(10**12)
    files["legacy, other length"] = legacy_with(3)
    legacy = saved({"w": torch.arange(4.0)}, zipped=False)
    protocol = pickle.dumps(1001, 2)
    bomb = b"\x80\x02" + doubled(b")", b"\x86", 18) + b"."
    files["legacy, doubled tuple as its protocol"] = legacy.replace(protocol, bomb, 1)
    # tarfile.is_tarfile would try to unpack it.
    files["lzma, dictionary of 4 GB"] = b"]" + b"\xff" * 12 + bytes(600)
    files["flipped bit"] = flipped(saved({"w": torch.arange(4.0)}), FOUR)
    return files
