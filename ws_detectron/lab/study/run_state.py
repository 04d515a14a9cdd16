"""What is known of a run, in its folder: `cell.json`, and the output of its process."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from ws_detectron.errors import ConfigError
from ws_detectron.utils.io import write_json

from .plan import StudyRun

# What another start of the same run may change without another result: on another machine, data
# lie elsewhere
FREE = ("OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "DATASETS.REGISTER")
# What another machine may have for the runs that have not ended: half a run is of one of them
FREE_AT_THE_END = ("MODEL.DEVICE",)

STATE = "cell.json"
OUTPUT = "cell.log"

RUNNING, FINISHED, FAILED = "running", "finished", "failed"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Args:
        state: "running" also where its process was killed: it then goes on from its checkpoint.
        reason: why it failed.
        seconds: wall time of the last process, start-up and evaluations included.
        settings: the config that it runs with.
        lost: whether a failure is that of the training itself, a loss that became infinite, and
            would come again; not where it was killed, or its machine or a file failed.
    """

    state: str
    settings: dict[str, Any]
    reason: str = ""
    seconds: Optional[float] = None
    lost: bool = True


def read_state(run: StudyRun, folder: Optional[Path] = None) -> Optional[RunState]:
    """What `write_state` wrote; None for a run that was never started.

    Args:
        run: whose state it should be.
        folder: where it lies; None: the run's own.

    Raises:
        ConfigError: the folder holds a run of other settings; names the keys.
    """
    folder = folder or run.folder
    path = folder / STATE
    try:
        state = RunState(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is broken: {error}; delete the folder to run it anew") from error
    # Keys that only one of them has are new or gone with a version of detectron2.
    ended = state.state == FINISHED or (run.searching and has_lost(state))
    free = (*FREE, *FREE_AT_THE_END) if ended else FREE
    differing = {
        key: f"{key} was {state.settings[key]!r} and is {value!r}"
        for key, value in run.settings.items()
        if key in state.settings and state.settings[key] != value and key not in free
    }
    if differing:
        raise ConfigError(
            f"{folder} holds a run with other settings: {'; '.join(differing.values())}. Give the "
            "study another `output`, or delete the folder"
            + (
                ", or end it with the --device it was begun on"
                if "MODEL.DEVICE" in differing
                else ""
            )
        )
    return state


def is_finished(run: StudyRun) -> bool:
    """Raises as `read_state` does."""
    state = read_state(run)
    return state is not None and state.state == FINISHED


def has_lost(state: Optional[RunState]) -> bool:
    """Whether it failed, and by itself."""
    return state is not None and state.state == FAILED and state.lost


def write_state(
    run: StudyRun,
    state: str,
    *,
    reason: str = "",
    seconds: Optional[float] = None,
    lost: bool = True,
) -> RunState:
    """Writes and returns a run's state."""
    written = RunState(state, run.settings, reason, seconds, lost)
    write_json(run.folder / STATE, asdict(written))
    return written


def last_words(path: Path) -> str:
    """Why a process failed: its last `error:` line, else its last line that is not empty."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote nothing"
    said = [line.strip() for line in lines if line.strip()]
    errors = [line[len("error: ") :] for line in said if line.startswith("error: ")]
    return (errors or said or ["it wrote nothing"])[-1]
