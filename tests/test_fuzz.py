"""A few hundred changed files of each kind; `python tests/fuzz.py` tries more."""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from fuzz import TARGETS, failures, inputs
from limited import run_limited

from ws_detectron.errors import UserError

COUNTS = {"weights": 600, "yaml": 200, "annotations": 200, "predictions": 200}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc")
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    contents = list(itertools.islice(inputs(TARGETS[name], seed=1), COUNTS[name]))
    found = [
        (outcome.index, outcome.status, outcome.message[-300:])
        for outcome in failures(TARGETS[name], tmp_path, contents)
    ]
    assert not found


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_seed_makes_the_same_inputs(name: str) -> None:
    one, two, other = (list(itertools.islice(inputs(TARGETS[name], s), 250)) for s in (1, 1, 2))
    assert one == two and one != other


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc")
def test_limits() -> None:
    def behave(how: str) -> None:
        if how == "hang":
            time.sleep(60)
        elif how == "allocate":
            bytearray(2**30)
        elif how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "refuse":
            raise UserError("no")

    ways = ["succeed", "hang", "allocate", "refuse", "die", "succeed"]
    outcomes = list(run_limited(behave, ways, seconds=0.5, megabytes=100))
    assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3, 4, 5]
    found = [outcome.status for outcome in outcomes]
    assert found == ["done", "time", "error", "refused", "died", "done"]
    assert "MemoryError" in outcomes[2].message and outcomes[3].message == "no"
