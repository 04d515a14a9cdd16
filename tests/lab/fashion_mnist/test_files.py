import gzip
import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist.files import load_fashion_mnist, load_splits, stratified_split

NAMES = [name for name, _ in FashionMNIST.resources]


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the only mirror, a small data set; both folders that are searched are empty."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    resources = []
    for n, name in enumerate(NAMES, start=5):
        shape = (n, 28, 28) if "images" in name else (n - 1,)
        content = gzip.compress(idx_bytes(np.full(shape, n, np.uint8)))
        (folder / name).write_bytes(content)
        resources.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "stated"))
    monkeypatch.setenv("WS_DETECTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files; a test ends with nothing in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_real_files_hold_60000_and_10000_articles(datasets_root: Path) -> None:
    for split, count in (("train", 60000), ("test", 10000)):
        images, labels = load_fashion_mnist(split, datasets_root)
        assert images.shape == (count, 28, 28) and images.dtype == np.uint8
        # the data set is balanced
        assert np.bincount(labels).tolist() == [count // 10] * 10


@pytest.mark.parametrize(
    ("variable", "target"), [("stated", "stated"), (None, "cache")], ids=["stated", "not stated"]
)
def test_absent_files_are_downloaded_once(
    mirror: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, variable: str, target: str
) -> None:
    root = mirror.parent
    if variable is None:
        monkeypatch.delenv("DETECTRON2_DATASETS")
        monkeypatch.chdir(root)
    raw = root / target / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / NAMES[0]).write_bytes((mirror / NAMES[0]).read_bytes())
    (mirror / NAMES[0]).unlink()  # what is there is not downloaded
    images, labels = load_fashion_mnist("train")
    assert images.shape == (5, 28, 28) and set(images.flat) == {5} and labels.tolist() == [6] * 5
    assert files_in(root / target) == sorted(NAMES)
    for name in NAMES[1:]:
        (mirror / name).unlink()
    raw.chmod(0o500)  # decompressing needs no writable folder
    assert load_fashion_mnist("test")[1].tolist() == [8] * 7


@pytest.mark.parametrize("place", ["mine", "mine/FashionMNIST/raw"])
def test_a_folder_may_hold_the_files_directly(mirror: Path, scratch: Path, place: str) -> None:
    folder = mirror.parent / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    mirror.rename(folder)
    assert load_fashion_mnist("test", mirror.parent / "mine")[0].shape == (7, 28, 28)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_a_failed_download_is_named_and_leaves_nothing(
    mirror: Path, scratch: Path, content: bytes
) -> None:
    for name in NAMES[1:]:
        (mirror / name).unlink() if content is None else (mirror / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_fashion_mnist("train")
    root = mirror.parent
    for part in (
        *NAMES,
        f"{root}/stated/FashionMNIST/raw or {root}/cache/FashionMNIST/raw",
        f"download into {root}/stated/FashionMNIST/raw failed",
        "Set DETECTRON2_DATASETS",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not files_in(root / "stated") and not files_in(root / "cache")


@pytest.mark.parametrize("content", [b"", b"not gzip", "cut short"])
def test_a_wrong_file_is_named_and_stays(mirror: Path, scratch: Path, content: object) -> None:
    damaged = mirror / "train-images-idx3-ubyte.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:30] if content == "cut short" else content)  # type: ignore[arg-type]
    before = damaged.read_bytes()
    message = f"{damaged} is not the published file: {len(before)} bytes.*delete it"
    with pytest.raises(UserError, match=message):
        load_fashion_mnist("train", mirror)
    assert damaged.read_bytes() == before and files_in(mirror) == sorted(NAMES)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'val'"):
        load_fashion_mnist("val")


def test_split_is_stratified_disjoint_and_seeded() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
    train, held_out = stratified_split(labels, 200, 100, seed=4)
    assert np.bincount(labels[train]).tolist() == [20] * 10
    assert np.bincount(labels[held_out]).tolist() == [10] * 10
    assert not set(train) & set(held_out)
    again = stratified_split(labels, 200, 100, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip((train, held_out), again))
    assert not np.array_equal(train, stratified_split(labels, 200, 100, seed=5)[0])


def test_real_images_are_normalized_by_the_training_part(datasets_root: Path) -> None:
    splits = load_splits(1, 1000, 200, datasets_root)
    assert [split.tensors[0].shape for split in splits] == [
        (1000, 1, 28, 28), (200, 1, 28, 28), (200, 1, 28, 28),
    ]  # fmt: skip
    train, validation, test = splits
    assert train.tensors[0].mean().item() == pytest.approx(0, abs=1e-5)
    assert train.tensors[0].std().item() == pytest.approx(1, abs=1e-3)
    assert torch.bincount(validation.tensors[1]).tolist() == [20] * 10
    images, labels = load_fashion_mnist("test", datasets_root)
    assert test.tensors[1].tolist() == labels[:200].tolist()
    # the mean pixel of Fashion-MNIST is 0.286, its standard deviation 0.353
    expected = torch.from_numpy((images[:200] / 255 - 0.286) / 0.353).float()
    assert (test.tensors[0][:, 0] - expected).abs().max().item() < 0.1
