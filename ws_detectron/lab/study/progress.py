"""Prints the progress of a study: starts and ends of runs, and the time left."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

from ws_detectron.evaluation.coco_report import TITLES, UNDEFINED
from ws_detectron.evaluation.comparison import duration
from ws_detectron.evaluation.runs import METRICS, Run, read_run

from .plan import StudyRun
from .records import FINISHED, OUTPUT, RunResult, RunState, read_run_record


class Progress:
    """Prints a line for each start and each end of a run, with the time left.

    The time left is estimated from the seconds per image of finished runs: those of the same batch
    if there are any, else all.

    Args:
        results: results of all selected runs, finished ones included.
        workers: number of runs that train at a time; None if unknown, as in a queue, so that no
            time is estimated.
        say: prints a line.
        now: a clock in seconds.
        keep: called with each run that has ended and its state, before the line is printed.
    """

    def __init__(
        self,
        results: Sequence[RunResult],
        workers: Optional[int],
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        keep: Optional[Callable[[StudyRun, RunState], None]] = None,
    ) -> None:
        self._runs, self._workers = [result.run for result in results], workers
        self._say, self._now, self._keep = say, now, keep
        self._begun: dict[str, float] = {}
        self._ended: set[str] = set()
        self._speeds: dict[int, list[float]] = {}  # batch -> seconds per image
        for result in results:
            if result.state is not None and result.status == FINISHED:
                self._ended.add(result.run.name)
                self._learn(result.run, result.state, result.run_record)
        if self._ended:
            say(f"{len(self._ended)} of {len(results)} runs are finished already")

    def began(self, run: StudyRun) -> None:
        self._begun[run.name] = self._now()
        done = steps_done(run)
        again = f" again, its metrics end at {done} of {run.iterations} iterations" if done else ""
        self._say(f"{self._position()} {run.name} begins{again}; log: {run.folder}/{OUTPUT}")

    def ended(self, run: StudyRun, state: RunState) -> None:
        self._ended.add(run.name)
        self._learn(run, state, read_run_record(run.folder))
        if self._keep is not None:
            self._keep(run, state)
        if state.state == FINISHED:
            what = f"finished in {duration(state.seconds)}: {ap_text(read_run(run.folder, ''))}"
        else:
            what = f"{state.state.upper()}: {state.reason}"
        self._say(f"{self._position()} {run.name} {what}; {self.left()}")

    def report_running(self, running: Iterable[StudyRun]) -> None:
        """Prints the iterations of the running runs."""
        shown = [f"{run.name} {steps_done(run)}/{run.iterations}" for run in running]
        self._say(f"{self._position()} running: {', '.join(shown)}; {self.left()}")

    def left(self) -> str:
        """The time left, as text."""
        seconds = self.seconds_left()
        return "time left unknown" if seconds is None else f"about {duration(seconds)} left"

    def seconds_left(self) -> Optional[float]:
        """None before any run has finished, and for a queue."""
        all_speeds = [speed for speeds in self._speeds.values() for speed in speeds]
        if not all_speeds or self._workers is None:
            return None
        total = 0.0
        for run in self._runs:
            if run.name not in self._ended:
                known = self._speeds.get(run.batch, all_speeds)
                whole = run.images * sum(known) / len(known)
                begun = self._begun.get(run.name)
                total += max(0.0, whole - (self._now() - begun)) if begun is not None else whole
        return total / self._workers

    def _learn(self, run: StudyRun, state: RunState, run_record: Mapping[str, Any]) -> None:
        # `seconds` are those of the last start, in which a resumed run sees a part of its images
        whole = run_record.get("starts", 1) == 1
        if state.state == FINISHED and state.seconds and whole:
            self._speeds.setdefault(run.batch, []).append(state.seconds / run.images)

    def _position(self) -> str:
        return f"[{len(self._ended)}/{len(self._runs)}]"


def steps_done(run: StudyRun) -> int:
    """Iterations in the run's metrics; 0 before the first are written."""
    if not (run.folder / METRICS).is_file():
        return 0
    steps = [row["iteration"] + 1 for row in read_run(run.folder, "").rows if "total_loss" in row]
    return steps[-1] if steps else 0


def ap_text(run: Run) -> str:
    """Box and mask AP of a run, as text."""
    found = [
        f"{title} AP {UNDEFINED if value is None else format(value, '.1f')}"
        for task, title in TITLES.items()
        for value in [run.metrics.get(f"{task}/AP")]
        if f"{task}/AP" in run.metrics
    ]
    return ", ".join(found) or "no AP"
