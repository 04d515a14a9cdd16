"""SIGTERM and SIGINT finish the step, in one process and in several, with workers or without."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainer import SmallTrainer, small_cfg
from torch.utils.data import DataLoader

from ws_detectron.engine.loaders import end_with_parent_alone
from ws_detectron.engine.signals import Stopped, on_signals

JOB = """
import os, sys, time
from pathlib import Path
from detectron2.engine import HookBase
from detectron2.utils import comm
from small_trainer import Model, SmallTrainer, small_cfg
from ws_detectron.engine import launch

class Job(SmallTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = Model()
        model.norm.bias.requires_grad_(False)  # it has no part in the loss
        return model

class Slow(HookBase):
    def after_step(self):
        if self.trainer.iter == 1:
            Path(self.trainer.cfg.OUTPUT_DIR, f"pid{comm.get_rank()}").write_text(str(os.getpid()))
        time.sleep(0.05)

def main(folder):
    cfg = small_cfg(Path(folder), iterations=10000)
    cfg.SOLVER.IMS_PER_BATCH = 2
    trainer = Job(cfg)
    trainer.register_hooks([Slow()])
    trainer.resume_or_load(resume=True)
    trainer.train()

if __name__ == "__main__":
    launch(main, 2, device="cpu", args=(sys.argv[1],))
"""


@pytest.fixture(autouse=True)
def sigint_is_not_ignored() -> Iterator[None]:
    """As it is, also for children, if a shell has started the tests with `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start_job(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A training in a process group of its own, and the ids of its two processes."""
    folder.mkdir()
    (folder.parent / "job.py").write_text(JOB)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    job = subprocess.Popen(
        [sys.executable, "job.py", str(folder)],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    files = [folder / f"pid{rank}" for rank in range(2)]
    while not all(file.is_file() and file.read_text() for file in files):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    return job, [int(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("number", "target"), [(signal.SIGINT, "group"), (signal.SIGTERM, "rank 1")]
)
def test_a_signal_ends_all_processes_with_a_checkpoint(
    tmp_path: Path, number: int, target: str
) -> None:
    """Sent to all processes, as a terminal and Slurm do it, or to one of them."""
    job, ranks = start_job(tmp_path / "run")
    with job:
        if target == "group":
            os.killpg(job.pid, number)
        else:
            os.kill(ranks[1], number)
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + number, output
    assert f"{signal.Signals(number).name}: the training ends after iteration" in output
    assert "Traceback" not in output
    name = (tmp_path / "run" / "last_checkpoint").read_text()
    checkpoint = torch.load(tmp_path / "run" / name, weights_only=False)
    assert name == f"model_{checkpoint['iteration']:07d}.pth" and checkpoint["iteration"] > 0
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())
    assert record["iterations"] < 10000 and record["processes"] == 2


def stop_in(folder: Path, iteration: int, iterations: int = 4, **solver: int) -> SmallTrainer:
    """A training that gets SIGTERM in an iteration."""

    class Signalled(SmallTrainer):
        evaluations = 0

        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                os.kill(os.getpid(), signal.SIGTERM)

        @classmethod
        def test(cls, *args: Any) -> dict:
            cls.evaluations += 1
            return {}

    cfg = small_cfg(folder, iterations)
    cfg.TEST.EVAL_PERIOD = 2
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    trainer = Signalled(cfg)
    with pytest.raises(Stopped) as caught:
        trainer.train()
    assert caught.value.code == 143
    return trainer


@pytest.mark.parametrize("iteration", [1, 3])
@pytest.mark.parametrize("period", [1, 5000])
def test_the_evaluation_waits_for_the_resumed_run(
    tmp_path: Path, iteration: int, period: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = stop_in(tmp_path, iteration, CHECKPOINT_PERIOD=period)
    assert signal.getsignal(signal.SIGTERM) is before
    assert type(trainer).evaluations == iteration // 2
    name = "model_final.pth" if iteration == 3 else "model_0000001.pth"
    assert (tmp_path / "last_checkpoint").read_text() == name
    resumed = type(trainer)(trainer.cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == iteration + 1
    resumed.train()
    assert type(trainer).evaluations == 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr("ws_detectron.engine.signals.time.monotonic", lambda: now[0])
    return now


def test_a_second_signal_ends_the_process_but_not_the_same_again(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[int] = []
    with on_signals(got.append):
        for clock[0], number in [(0.0, signal.SIGINT), (0.5, signal.SIGTERM)]:
            os.kill(os.getpid(), number)
        assert got == [signal.SIGINT]
        clock[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # stands for the default
            monkeypatch.setattr(signal, "SIG_DFL", signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_ignored_signals_stay_so_and_threads_handle_none() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_signals(got.append):
            os.kill(os.getpid(), signal.SIGINT)
        assert got == [] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def in_thread() -> None:
        with on_signals(got.append):
            got.append(-1)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert got == [-1]


def worker_pid(index: int) -> int:
    time.sleep(0.2)
    return os.getpid()


class Pids:
    __getitem__: Callable[[Any, int], int] = staticmethod(worker_pid)  # type: ignore[assignment]

    def __len__(self) -> int:
        return 4


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system has no sigwaitinfo")
def test_workers_survive_signals_of_others_and_end_with_their_parent() -> None:
    loader = iter(
        DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=end_with_parent_alone)
    )
    pid = int(next(loader))
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)  # not of the parent
    assert [int(found) for found in loader] == [pid] * 3
    loader = iter(
        DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=end_with_parent_alone)
    )
    os.kill(int(next(loader)), signal.SIGTERM)
    (worker,) = loader._workers
    worker.join(10)
    assert worker.exitcode == 0
