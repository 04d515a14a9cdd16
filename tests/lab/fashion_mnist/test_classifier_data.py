from pathlib import Path

import numpy as np
import pytest
import torch

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist.files import load_fashion_mnist
from ws_detectron.lab.fashion_mnist.training_data import (
    Images,
    batches,
    load_test_data,
    load_training_data,
    stratified_split,
)


def test_split_is_stratified_disjoint_and_seeded() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
    train, held_out = stratified_split(labels, 200, 100, seed=4)
    assert np.bincount(labels[train]).tolist() == [20] * 10
    assert np.bincount(labels[held_out]).tolist() == [10] * 10
    assert not set(train) & set(held_out)
    again = stratified_split(labels, 200, 100, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip((train, held_out), again))
    assert not np.array_equal(train, stratified_split(labels, 200, 100, seed=5)[0])


def test_split_refuses_what_it_cannot_balance() -> None:
    labels = np.repeat(np.arange(10), 30)
    with pytest.raises(ValueError, match="multiples of 10, got 205"):
        stratified_split(labels, 205, 50, seed=0)
    with pytest.raises(ValueError, match="class 0 has 30 images, 31 are needed"):
        stratified_split(labels, 300, 10, seed=0)


def test_batches_are_the_images_in_the_order_asked_for() -> None:
    data = Images(torch.arange(20.0).view(20, 1, 1, 1), torch.arange(20))
    order = torch.randperm(20)
    found = list(batches(data, order, 8))
    assert [len(labels) for _, labels in found] == [8, 8, 4]
    assert torch.equal(torch.cat([labels for _, labels in found]), order)
    assert torch.equal(torch.cat([images for images, _ in found]).flatten(), order.float())


def test_many_small_batches_are_cut_from_larger_pieces() -> None:
    data = Images(torch.arange(20000.0).view(-1, 1, 1, 1), torch.arange(20000))
    order = torch.randperm(20000)
    found = [labels for _, labels in batches(data, order, 3)]
    assert torch.equal(torch.cat(found), order)
    # none but the last is smaller: the schedule counts steps, and BN cannot do with one image
    assert [len(labels) for labels in found] == [3] * 6666 + [2]


def test_real_images_are_normalized_by_the_training_part(datasets_root: Path) -> None:
    data = load_training_data(datasets_root, seed=1, train=1000, validation=200)
    assert data.train.images.shape == (1000, 1, 28, 28)
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train.images.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.bincount(data.validation.labels).tolist() == [20] * 10
    # the mean pixel of Fashion-MNIST is 0.286, its deviation 0.353
    assert data.mean == pytest.approx(0.286, abs=0.01) and data.std == pytest.approx(
        0.353, abs=0.01
    )

    test = load_test_data(datasets_root, 50, data.mean, data.std)
    images, labels = load_fashion_mnist("test")
    expected = (images[:50] / 255 - data.mean) / data.std
    torch.testing.assert_close(test.images[:, 0], torch.from_numpy(expected).float())
    assert test.labels.tolist() == labels[:50].tolist()


def test_damaged_files_are_named(datasets_root: Path, tmp_path: Path) -> None:
    source = datasets_root / "FashionMNIST" / "raw"
    for path in source.glob("*.gz"):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            content[:1000] if "train-images" in path.name else content
        )
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        UserError, match="train-images-idx3-ubyte.gz is not the published file: 1000"
    ):
        load_training_data(tmp_path, seed=0, train=100, validation=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
