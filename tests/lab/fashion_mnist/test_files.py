import gzip
import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torchvision

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist import files
from ws_detectron.lab.fashion_mnist.files import find_fashion_mnist, load_fashion_mnist, read_idx_gz

TRAIN_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def raw_folder(datasets_root: Path) -> Path:
    folder = datasets_root / "FashionMNIST" / "raw"
    if not (folder / TRAIN_FILES[0]).is_file():
        pytest.skip(f"needs data: no Fashion-MNIST in {folder}")
    return folder


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An empty folder and the address under which this machine serves it."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nowhere(tmp_path: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both folders that are searched for Fashion-MNIST are empty; `mirror` is the only mirror."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "stated"))
    monkeypatch.setenv("WS_DETECTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [mirror[1]])
    return tmp_path


def test_idx_file_is_read_as_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx_bytes(array)))
    np.testing.assert_array_equal(read_idx_gz(path), array)


def test_real_files_hold_60000_and_10000_articles(raw_folder: Path) -> None:
    for split, count in (("train", 60000), ("test", 10000)):
        images, labels = load_fashion_mnist(split, raw_folder)
        assert images.shape == (count, 28, 28) and images.dtype == np.uint8
        # the data set is balanced
        assert np.bincount(labels).tolist() == [count // 10] * 10


def test_real_files_equal_what_torchvision_reads(raw_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for path in raw_folder.glob("t10k-*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    # torchvision wants the training files to exist before it reads the test files
    for name in TRAIN_FILES:
        (folder / name[:-3]).touch()
    theirs = torchvision.datasets.FashionMNIST(tmp_path, train=False)
    images, labels = load_fashion_mnist("test", raw_folder)
    np.testing.assert_array_equal(images, theirs.data.numpy())
    np.testing.assert_array_equal(labels, theirs.targets.numpy())


def test_truncated_file_is_named(raw_folder: Path, tmp_path: Path) -> None:
    for path in raw_folder.glob("t10k-*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz.*5000 bytes.*bef4ecab"):
        load_fashion_mnist("test", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete gzip file|not an idx file"),
        (b"not gzip", "not a complete gzip file"),
        (gzip.compress(idx_bytes(np.zeros((3, 4), np.uint8)))[:-9], "not a complete gzip file"),
        (gzip.compress(b"\0\0\x0d\x01" + bytes(8)), "not an idx file of unsigned bytes"),
        (
            gzip.compress(idx_bytes(np.zeros((3, 4), np.uint8))[:-1]),
            "holds 11 values, but .* .3, 4.",
        ),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "ends within its header, after 6"),
    ],
    ids=["empty", "text", "cut short", "other type", "too few values", "header alone"],
)
def test_damaged_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged.gz.*({message})"):
        read_idx_gz(path)


def test_the_message_on_missing_data_names_folders_and_variables(nowhere: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_fashion_mnist("train")
    message = str(caught.value)
    for part in (
        *TRAIN_FILES,
        str(nowhere / "stated" / "FashionMNIST" / "raw"),
        str(nowhere / "cache" / "FashionMNIST" / "raw"),
        "download",
        "DETECTRON2_DATASETS",
        "WS_DETECTRON_CACHE",
    ):
        assert part in message
    # a failed download leaves no file
    assert not [p for p in nowhere.rglob("*") if p.is_file()]


def test_files_in_the_cache_are_found(nowhere: Path) -> None:
    folder = nowhere / "cache" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name in TRAIN_FILES:
        (folder / name).touch()
    assert find_fashion_mnist("train", download=False) == folder
    with pytest.raises(UserError, match="t10k"):
        find_fashion_mnist("test", download=False)


def test_download_writes_complete_files_to_the_folder_of_the_variable(
    nowhere: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [gzip.compress(idx_bytes(np.full(n, 7, np.uint8))) for n in (5, 6)]
    served = []
    for name, content in zip(TRAIN_FILES, contents):
        (mirror[0] / name).write_bytes(content)
        served.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setitem(files._FILES, "train", tuple(served))
    images, labels = load_fashion_mnist("train")
    assert images.tolist() == [7] * 5 and labels.tolist() == [7] * 6
    folder = nowhere / "stated" / "FashionMNIST" / "raw"
    assert sorted(p.name for p in folder.iterdir()) == sorted(TRAIN_FILES)


def test_download_of_a_wrong_file_is_refused(nowhere: Path, mirror: tuple[Path, str]) -> None:
    for name in TRAIN_FILES:
        (mirror[0] / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="download into .*stated.* failed"):
        load_fashion_mnist("train")
    assert not list((nowhere / "stated" / "FashionMNIST" / "raw").iterdir())


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'val'"):
        load_fashion_mnist("val")
