"""Fixtures that every test shares."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch, which reads it once. Threads that outnumber the cores wait for each other: a worker
# of `make test` has one core, a single process two; the tools that tests start take it from here.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import numpy as np
import pytest
import torch

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets


@pytest.fixture(autouse=True)
def seeded_rng() -> Iterator[None]:
    """Seeds every generator before a test and puts their states back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(scope="session")
def datasets_root() -> Path:
    """The folder that DETECTRON2_DATASETS names; tests that need data skip without it."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root:
        pytest.skip("needs data: DETECTRON2_DATASETS is not set")
    return Path(root)


@pytest.fixture(scope="session")
def coco_root(datasets_root: Path) -> Path:
    """The folder `coco` below DETECTRON2_DATASETS, with annotations and images of 2017."""
    root = datasets_root / "coco"
    if not (root / "annotations" / "instances_val2017.json").is_file():
        pytest.skip(f"needs data: no COCO annotations in {root}")
    return root
