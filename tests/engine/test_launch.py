"""Several CPU processes work as one job; errors end with one message and a status."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ws_detectron.engine import launch, started_by_torchrun
from ws_detectron.errors import UserError

SCRIPT = """
import os
import signal
import sys
import time
from detectron2.utils import comm
from ws_detectron.engine import launch
from ws_detectron.errors import DivergedError, exit_on_user_error

def threads():  # 0 on systems without /proc
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

def say(line):  # in one write, as processes share the pipe; an unbuffered print() makes several
    os.write(1, (line + "\\n").encode())

def main(word):
    ranks = comm.all_gather((comm.get_rank(), comm.get_local_rank(), comm.get_world_size(), word))
    if word == "diverge" and comm.get_rank() == 1:
        raise DivergedError("rank 1 says no")
    if word == "pids":
        say(f"RANK {comm.get_rank()} IS {os.getpid()}")
        while True:
            time.sleep(0.1)
    if word.startswith("SIG") and comm.get_rank() == 1:
        os.kill(os.getpid(), getattr(signal, word))
    if word == "full" and comm.get_rank() == 1:
        raise OSError(28, "No space left on device", "/data/file")
    comm.synchronize()
    if comm.is_main_process():
        say(f"RANKS {ranks}")

if __name__ == "__main__":
    with exit_on_user_error():
        before = threads()
        launch(main, 2, device="cpu", dist_url="auto", args=(sys.argv[1],))
        say(f"THREADS LEFT {threads() - before}")
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    return str(path)


def run(*command: str) -> subprocess.CompletedProcess:
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ)


def test_one_process_runs_here() -> None:
    assert launch(lambda x: x + 1, 1, device="cpu", args=(41,)) == 42


def test_torchrun(script: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = run(*torchrun, "--nproc-per-node", "2", script, "word")
    assert result.returncode == 0, result.stderr
    assert "RANKS [(0, 0, 2, 'word'), (1, 1, 2, 'word')]" in result.stdout
    # gloo threads that are alive while Python shuts down can abort the process
    assert result.stdout.count("THREADS LEFT 0") == 2, result.stdout


def test_user_error_of_one_process_ends_all_with_its_message(script: str) -> None:
    result = run(sys.executable, script, "diverge")
    assert result.returncode == 3
    assert "error: rank 1 says no" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_full_disk_is_a_user_error(script: str) -> None:
    result = run(sys.executable, script, "full")
    assert result.returncode == 2
    assert "error: no space left on device while writing /data/file" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_killed_process_is_named(script: str) -> None:
    result = run(sys.executable, script, "SIGKILL")
    # 1 where the other process meets the broken connection first
    assert result.returncode in (128 + signal.SIGKILL, 1)
    sentence = r"^error: rank 1 of 2 \(process \d+\) was killed by SIGKILL, as .* memory runs out$"
    assert re.search(sentence, result.stderr, re.MULTILINE), result.stderr


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout
    except ProcessLookupError:
        return False
    return bool(state.strip()) and not state.startswith("Z")


def test_no_process_outlives_the_one_that_started_it(script: str) -> None:
    """Started as a shell does with `&`: the job ignores SIGINT."""
    job = subprocess.Popen(
        [sys.executable, script, "pids"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert job.stdout is not None
    pids: list[int] = []
    with job:
        for line in job.stdout:
            pids += [int(pid) for pid in re.findall(r"RANK \d IS (\d+)", line)]
            if len(pids) == 2:
                break
        try:
            assert len(pids) == 2 and all(map(is_alive, pids))
            job.terminate()
            assert job.wait(120) == 128 + signal.SIGTERM
            end = time.monotonic() + 120
            while any(map(is_alive, pids)) and time.monotonic() < end:
                time.sleep(0.05)
            assert not any(map(is_alive, pids))
        finally:
            job.kill()
            for pid in filter(is_alive, pids):
                os.kill(pid, signal.SIGKILL)


def test_auto_url_on_several_machines_is_refused() -> None:
    with pytest.raises(UserError, match="--dist-url"):
        launch(print, 1, device="cpu", num_machines=2, dist_url="auto")


def test_torchrun_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    assert started_by_torchrun()
    monkeypatch.delenv("LOCAL_RANK")
    assert not started_by_torchrun()
