"""What is printed while a study runs: what began, what ended, how long the rest will take."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Optional

from ws_detectron.evaluation.coco_report import TITLES, UNDEFINED
from ws_detectron.evaluation.comparison import duration
from ws_detectron.evaluation.runs import METRICS, Run, read_run

from .cell_state import FINISHED, CellState, read_state
from .cells import Cell
from .results import read_record


class Progress:
    """Prints a line for each start and each end of a cell, with the time left.

    The time left is reckoned from the seconds per image of the cells that have finished: those of
    the same batch where there are any, else all.

    Args:
        cells: all that are to be run, finished ones included.
        side_by_side: how many run at a time; None if that is not ours to say, as in a queue, and
            then nothing is reckoned.
        say: takes a line.
        now: a clock in seconds.
        keep: is called with each cell that has ended and its state, before it is said.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        side_by_side: Optional[int],
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        keep: Optional[Callable[[Cell, CellState], None]] = None,
    ) -> None:
        self._cells, self._side_by_side = cells, side_by_side
        self._say, self._now, self._keep = say, now, keep
        self._begun: dict[str, float] = {}
        self._ended: set[str] = set()
        self._speeds: dict[int, list[float]] = {}  # batch -> seconds per image
        for cell in cells:
            state = read_state(cell)
            if state is not None and state.state == FINISHED:
                self._ended.add(cell.name)
                self._learn(cell, state)
        if self._ended:
            say(f"{len(self._ended)} of {len(cells)} cells are finished already")

    def began(self, cell: Cell) -> None:
        self._begun[cell.name] = self._now()
        done = steps_done(cell)
        again = f" again, its metrics end at {done} of {cell.iterations} iterations" if done else ""
        self._say(f"{self._position()} {cell.name} begins{again}; log: {cell.folder}/cell.log")

    def ended(self, cell: Cell, state: CellState) -> None:
        self._ended.add(cell.name)
        self._learn(cell, state)
        if self._keep is not None:
            self._keep(cell, state)
        if state.state == FINISHED:
            what = f"finished in {duration(state.seconds)}: {figures(read_run(cell.folder, ''))}"
        else:
            what = f"FAILED: {state.reason}"
        self._say(f"{self._position()} {cell.name} {what}; {self.left()}")

    def beat(self, running: Iterable[Cell]) -> None:
        """A sign of life: how far the running cells are."""
        shown = [f"{cell.name} {steps_done(cell)}/{cell.iterations}" for cell in running]
        self._say(f"{self._position()} running: {', '.join(shown)}; {self.left()}")

    def left(self) -> str:
        """The time left, in words."""
        seconds = self.seconds_left()
        return "time left unknown" if seconds is None else f"about {duration(seconds)} left"

    def seconds_left(self) -> Optional[float]:
        """None before any cell has finished, and for a queue."""
        everything = [speed for speeds in self._speeds.values() for speed in speeds]
        if not everything or self._side_by_side is None:
            return None
        total = 0.0
        for cell in self._cells:
            if cell.name not in self._ended:
                known = self._speeds.get(cell.batch, everything)
                whole = cell.images * sum(known) / len(known)
                begun = self._begun.get(cell.name)
                total += max(0.0, whole - (self._now() - begun)) if begun is not None else whole
        return total / self._side_by_side

    def _learn(self, cell: Cell, state: CellState) -> None:
        # `seconds` are of the last start, which for a resumed cell is a part of its images
        whole = read_record(cell.folder).get("starts", 1) == 1
        if state.state == FINISHED and state.seconds and whole:
            self._speeds.setdefault(cell.batch, []).append(state.seconds / cell.images)

    def _position(self) -> str:
        return f"[{len(self._ended)}/{len(self._cells)}]"


def steps_done(cell: Cell) -> int:
    """Iterations in the cell's metrics; 0 before the first are written."""
    if not (cell.folder / METRICS).is_file():
        return 0
    steps = [row["iteration"] + 1 for row in read_run(cell.folder, "").rows if "total_loss" in row]
    return steps[-1] if steps else 0


def figures(run: Run) -> str:
    """Box and mask AP of a run, in words."""
    found = [
        f"{title} AP {UNDEFINED if value is None else format(value, '.1f')}"
        for task, title in TITLES.items()
        for value in [run.figures.get(f"{task}/AP")]
        if f"{task}/AP" in run.figures
    ]
    return ", ".join(found) or "no AP"
