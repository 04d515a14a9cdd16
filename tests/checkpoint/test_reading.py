"""Hostile and broken files: each is refused by name, and runs nothing."""

import collections
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hostile_weights import FOUR, all_files, safetensors, saved, tensor_pickle, torch_zip
from limited import run_limited

from ws_detectron.checkpoint import (
    WeightsError,
    WSCheckpointer,
    convert_file,
    read_weight_file,
)
from ws_detectron.checkpoint.reading import check_finite, unwrap_state


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.target}'",))


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_weight_file(path)
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """Exists once a payload has run."""
    return tmp_path / "code_was_run"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reduce_payload_in_a_pickle(tmp_path: Path, proof: Path, protocol: int) -> None:
    path = tmp_path / "weights.pkl"
    nested: Any = {"key": Payload(proof)}
    for _ in range(20):
        nested = {"model": [nested, (1, 2.0, "text")]}
    in_array = np.array([Payload(proof)], dtype=object)
    for content, name in ((nested, "system"), (Payload(proof), "system"), (in_array, "'O8'")):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert name in refused(path)
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_reduce_payload_in_a_torch_file(tmp_path: Path, proof: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": Payload(proof)}, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert "system" in message
    assert "weights_only=False" not in message, "must not advise to load without protection"
    assert not proof.exists()


class ForgedDtype:
    """dtype('f4') with fields in its state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (np.dtype, ("f4", False, True), (3, "<", None, ("a",), {"a": 1}, 4, 1, 0))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([None], dtype=object), "'O8'"),
        (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), "'V8'"),
        (ForgedDtype(), "structured"),
    ],
)
def test_arrays_of_other_types_are_refused(tmp_path: Path, value: Any, reason: str) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"w": value}))
    assert reason in refused(path)


def test_array_shape_beyond_its_bytes(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.zeros(7, dtype="f4")}, protocol=2)
    assert data.count(b"K\x07\x85") == 1
    path = tmp_path / "weights.pkl"
    path.write_bytes(data.replace(b"K\x07\x85", b"K\x09\x85"))
    assert "28 bytes" in refused(path)


def test_small_files_that_expand_or_lie(tmp_path: Path) -> None:
    """In a process limited to 5 seconds and 256 MB, which torch exceeds on many of them."""
    files = all_files()
    paths = {}
    for number, (name, content) in enumerate(files.items()):
        paths[name] = tmp_path / f"{number}.pth"
        paths[name].write_bytes(content)
    outcomes = list(run_limited(read_weight_file, paths.values(), seconds=5, megabytes=256))
    wrong = {
        name: (outcome.status, outcome.message)
        for name, outcome in zip(files, outcomes)
        if outcome.status != "refused"
        or "\n" in outcome.message
        or len(outcome.message) > 500
        or str(paths[name]) not in outcome.message
    }
    assert not wrong and len(outcomes) == len(files) > 100


@pytest.mark.parametrize("name", ["tensor, storage of a terabyte", "legacy, terabyte"])
def test_a_storage_is_not_reserved_before_its_size_is_checked(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(all_files()[name])
    with mock.patch.object(torch, "empty", side_effect=AssertionError):
        assert "should have 4,000,000,000,000 bytes" in refused(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("archive, compressed", "is compressed"),
        ("archive, TorchScript", "asks for a TorchScript program"),
        ("archive, doubled entry", "two of its entries have the same name"),
        ("archive, overlapping entries", "is larger than its part of the file"),
        ("flipped bit", "Bad CRC-32"),
        ("sparse, zip", "asks for torch._utils._rebuild_sparse_tensor"),
        ("pickle, doubled tuple as a key", "asks for a dict key of type tuple"),
        ("pickle, deep list", "nested too deeply"),
        ("pickle, doubled list", "expands to"),
        ("pickle, one bytes object in 200 arrays", "copies its values many times"),
        ("safetensors, ends early", "it ends within 'w'"),
        ("safetensors, overlap", "the offsets of 'v' do not fit its shape"),
        ("safetensors, bytes of no tensor", "it has 8 bytes of no tensor"),
        ("safetensors, same name twice", "two of its tensors have the same name"),
        ("safetensors, unknown type", "asks for a tensor of F8_E4M3"),
        ("npz, objects", "asks for an array of object"),
        ("npz, other shape", r"'w.npy' should hold (5,) of float32 and has 16 bytes"),
        ("npz, expands", "expand to more than 8 times its size"),
        ("npz, flipped bit", "Bad CRC-32"),
    ],
)
def test_the_message_says_why(tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(all_files()[name])
    assert reason in refused(path)


def test_pipe_device_and_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    for name in ("pipe.pth", "zero.pth"):
        path = tmp_path / name
        assert "is a device or pipe" in refused(path)
        with pytest.raises(WeightsError, match="device or pipe"):
            convert_file(path)
        with pytest.raises(WeightsError, match="there is no weight file"):
            WSCheckpointer(torch.nn.Linear(1, 1)).load(str(path))


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    key = "w\x1b[2J\x07\u202e"
    path = tmp_path / "\x1b[31mred.pth"
    torch.save({key: torch.ones(1)}, path)
    with pytest.raises(WeightsError) as caught:
        unwrap_state(read_weight_file(path), str(path))
    assert str(caught.value).isprintable() and "\\x1b[31mred" in str(caught.value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl\x1b[2J", "x")
    with pytest.raises(WeightsError) as caught:
        read_weight_file(path)
    assert str(caught.value).isprintable() and "\\x1b[2J" in str(caught.value)
    path.write_bytes(b"\x80\x02c\x1b[2J\nx\n.")
    with pytest.raises(WeightsError) as caught:
        read_weight_file(path)
    assert str(caught.value).isprintable()


def state_of_everything() -> dict[str, Any]:
    base = torch.arange(24.0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(2, 2, 1, 1)).sum().backward()
    optimizer.step()
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "an attribute"
    dtypes = "bfloat16 bool uint8 int8 float64 float32 float16 int32 int64 int16".split()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": collections.Counter([5, 5, 9]),
        "types": {name: torch.ones(3).to(getattr(torch, name)) for name in dtypes},
        "views": [base, base[2:7], base.view(4, 6).t(), base.view(2, 3, 4)[:, 1:, ::2]],
        "empty": [torch.zeros(0), torch.zeros(3, 0, 2), torch.tensor(2.5)],
        "expanded": torch.ones(1).expand(5, 7),
        "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": parameter,
        "set": {1, "a"},
        "plain": [torch.Size([1, 2]), torch.device("cuda", 1), torch.float16, None, True, 1.5],
        "text": ("é\n", b"\xff", -(2**63), 2**127, {None: 1, 2.5: 2, b"k": 3}),
    }


def same(found: Any, expected: Any) -> bool:
    """Values and their types; OrderedDict, Parameter and Size become dict, tensor and tuple."""
    if isinstance(expected, torch.Tensor):
        return (
            type(found) is torch.Tensor
            and found.dtype == expected.dtype
            and found.stride() == expected.stride()
            and torch.equal(found, expected)
        )
    if isinstance(expected, dict) and not isinstance(expected, collections.Counter):
        return (
            type(found) is dict
            and list(found) == list(expected)
            and all(same(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_as_torch_reads_them(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved(state_of_everything(), zipped))
    found, expected = read_weight_file(path), torch.load(path, weights_only=True)
    assert list(found) == list(expected)
    wrong = [key for key in expected if not same(found[key], expected[key])]
    assert not wrong
    pointers = {view.untyped_storage().data_ptr() for view in found["views"]}
    assert len(pointers) == 1, "what shared its memory when it was saved does so again"
    found["views"][0][3] = -1
    assert found["views"][1][1] == -1


def test_file_of_a_machine_with_the_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    swapped = np.arange(4, dtype=">f4").tobytes()
    path.write_bytes(torch_zip(tensor_pickle((4,), (1,), 4), {"0": swapped}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big" if sys.byteorder == "little" else "little")
    assert read_weight_file(path)["w"].tolist() == [0, 1, 2, 3]
    assert torch.load(path, weights_only=True)["w"].tolist() == [0, 1, 2, 3]


def test_storages_of_a_gpu_are_read_onto_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    content = tensor_pickle((2, 2), (2, 1), 4).replace(b"ctorch\nFloat", b"ctorch.cuda\nFloat")
    path.write_bytes(torch_zip(content.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0"),
                               {"0": FOUR}))  # fmt: skip
    found = read_weight_file(path)["w"]
    assert found.tolist() == [[0, 1], [2, 3]] and found.device.type == "cpu"


def test_finite_check_of_an_expanded_tensor_takes_its_memory_only() -> None:
    state = {"w": torch.ones(3, 1, 2).expand(3, 10**12, 2)}
    check_finite(state, "x.pth")
    state["v"] = torch.tensor([1.0, float("nan")]).expand(10**12, 2)
    with pytest.raises(WeightsError, match="x.pth has NaN or infinite values in v"):
        check_finite(state, "x.pth")


def test_huge_memo_index_takes_no_memory(tmp_path: Path) -> None:
    # LONG_BINPUT: the C unpickler would allocate 2^31 entries here.
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    assert read_weight_file(path) == {}


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02cnumpy\nload\n.",
        b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pid\n.",  # PERSID
        b"\x80\x02cnumpy\ndtype\n}b.",  # BUILD on an allowed name
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
    ],
)
def test_opcodes_that_reach_for_more(tmp_path: Path, opcodes: bytes) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(opcodes)
    refused(path)


def test_dict_that_holds_itself(tmp_path: Path) -> None:
    looped: dict[str, Any] = {}
    looped["model"] = looped
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(looped))
    assert "holds itself" in refused(path)


@pytest.mark.parametrize("name", ["../../escaped", "/etc/escaped", "archive\\..\\escaped"])
def test_zip_entry_that_points_outside(tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder" / "weights.pth"
    path.parent.mkdir()
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "payload")
    assert "outside" in refused(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_zip_that_is_no_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no torch file" in refused(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_as_numpy_writes_it(tmp_path: Path, write: Any) -> None:
    arrays = {
        "a/kernel": np.random.randn(3, 2, 4, 5).astype("f4"),
        "a/fortran": np.asfortranarray(np.random.randn(3, 2)),
        "big endian": np.arange(6, dtype=">i8").reshape(2, 3),
        "scalar": np.float16(0.5),
        "empty": np.zeros((0, 3), "f4"),
    }
    path = tmp_path / "weights.npz"
    write(path, **arrays)
    content = read_weight_file(path)
    assert content.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(content[key], value)
        assert content[key].dtype.isnative and content[key].flags.c_contiguous
    assert all(isinstance(value, torch.Tensor) for value in unwrap_state(content, "x")[0].values())


def test_safetensors_as_its_readme_describes_it(tmp_path: Path) -> None:
    one, two = np.arange(6, dtype="<f4"), np.array([-1, 2**40], "<i8")
    # 1.0 and -2.0 of bfloat16 are the upper halves of the float32 numbers
    half = np.array([0x3F80, 0xC000], "<u2")
    entries = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "c": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [40, 44]},
        "d": {"dtype": "F32", "shape": [], "data_offsets": [44, 48]},
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        safetensors(entries, b"".join(v.tobytes() for v in (one, two, half, one[1:2])))
    )
    content = read_weight_file(path)
    assert content.keys() == {"a", "b", "c", "d"}
    torch.testing.assert_close(content["a"], torch.from_numpy(one).view(2, 3), rtol=0, atol=0)
    assert content["b"].tolist() == [-1, 2**40] and content["d"].item() == 1.0
    assert content["c"].dtype == torch.bfloat16 and content["c"].tolist() == [[1.0], [-2.0]]


def test_tar_archive(tmp_path: Path) -> None:
    member, path = tmp_path / "inside.txt", tmp_path / "weights.pth.tar"
    member.write_text("hello")
    with tarfile.open(path, "w") as archive:
        archive.add(member, "../escaped")
    assert "tar archive" in refused(path)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_truncated_file(tmp_path: Path, form: str, kept: float) -> None:
    path = tmp_path / "weights.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"w": np.arange(1000, dtype="f4")}))
    else:
        state = {"w": torch.arange(1000.0)}
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "is empty"),
        (b"These are my weights.\n", "neither a torch, safetensors or .npz file nor a pickle"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (bytes(range(256)) * 4, "neither"),
        (pickle.dumps([1, 2, 3]), "holds a list"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, hint: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert hint in refused(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.pth")
    assert "directory" in refused(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_survive_every_protocol(tmp_path: Path, protocol: int) -> None:
    generator = np.random.default_rng(0)
    expected = {
        "f4": generator.standard_normal((2, 3, 4)).astype("f4"),
        "fortran": np.asfortranarray(generator.standard_normal((3, 4))),
        "big_endian": np.arange(5, dtype=">i4"),
        "empty": np.zeros((0, 3), dtype="f4"),
        "scalar_array": np.array(2.5, dtype="f2"),
        "bool": np.array([True, False]),
    }
    path = tmp_path / "weights.pkl"
    content = {"blobs": collections.OrderedDict(expected), "n": np.float64(0.1), "b": b"\xff"}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_weight_file(path)
    assert type(found["blobs"]) is dict
    assert found["n"] == 0.1
    assert found["b"] == b"\xff"
    for key, array in expected.items():
        np.testing.assert_array_equal(found["blobs"][key], array)
        assert found["blobs"][key].flags["WRITEABLE"]


def test_python_2_pickle(tmp_path: Path) -> None:
    # What cPickle of Python 2.7 writes for {'w': numpy.array([1, 2], dtype='f4')}.
    data = (
        b"\x80\x02}q\x01U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U"
        b"\x01b\x87Rq\x02(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ"
        b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tbs."
    )
    path = tmp_path / "weights.pkl"
    path.write_bytes(data)
    np.testing.assert_array_equal(read_weight_file(path)["w"], [1.0, 2.0])


@pytest.mark.parametrize("name", ["x.pth", "x.pth.tar", "x.pkl", "x"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_told_by_their_contents(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    torch.save({"w": torch.arange(3)}, path, _use_new_zipfile_serialization=zipped)
    torch.testing.assert_close(read_weight_file(path)["w"], torch.arange(3))


def test_mmengine_checkpoint_gets_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mmengine.logging")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging"})
    path = tmp_path / "epoch_12.pth"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", module)
        torch.save({"message_hub": module.HistoryBuffer()}, path)
    assert "publish_model.py" in refused(path)
