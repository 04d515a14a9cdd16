"""A small study whose runs a stand-in for tools/train_net.py trains."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from small_study import write_study

from ws_detectron.lab.study import Options, Study


@pytest.fixture(scope="session", autouse=True)
def polls_often() -> Iterator[None]:
    """The runs of the stand-in end within milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ws_detectron.lab.study.workers.POLL_SECONDS", 0.02)
        yield


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    """`write_study` in a folder of its own."""
    return partial(write_study, tmp_path)


@pytest.fixture
def options() -> Options:
    return Options()
