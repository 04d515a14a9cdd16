"""Runs a function in a child process that may use only so much time and memory."""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ws_detectron.errors import UserError


class Outcome(NamedTuple):
    """`status`: "done", "refused" (a UserError), "error" (another), "time" or "died"."""

    index: int
    status: str
    message: str
    seconds: float


def run_limited(
    function: Callable[[Any], Any], inputs: Iterable[Any], *, seconds: float, megabytes: int
) -> Iterator[Outcome]:
    """Calls `function` on each input; a child that dies is followed by another.

    Args:
        function: what is tried.
        inputs: its arguments.
        seconds: for each call.
        megabytes: that a call may add to the memory of this process.
    """
    pending = list(inputs)
    done = 0
    while done < len(pending):
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(read)
            _work(function, pending, done, write, megabytes)
        os.close(write)
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while done < len(pending):
                start = time.perf_counter()
                ready, _, _ = select.select([pipe], [], [], seconds)
                line = _line(pipe) if ready else b""
                if not line:
                    break
                yield Outcome(done, *json.loads(line))
                done += 1
        if done < len(pending):
            took = time.perf_counter() - start
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            timed_out = took >= seconds
            yield Outcome(done, "time" if timed_out else "died", f"wait status {status}", took)
            done += 1
        else:
            os.waitpid(child, 0)


def _line(pipe: Any) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = pipe.read(1)
        if not more:
            return b""
        line += more
    return line


def _work(function: Callable, inputs: list, first: int, pipe: int, megabytes: int) -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit = used + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        torch.set_num_threads(1)  # the threads of the parent are not there
        for item in inputs[first:]:
            start = time.perf_counter()
            try:
                function(item)
                status, message = "done", ""
            except UserError as error:
                status, message = "refused", str(error)
            except BaseException:
                status, message = "error", traceback.format_exc()
            took = time.perf_counter() - start
            os.write(pipe, json.dumps([status, message, took]).encode() + b"\n")
    finally:
        os._exit(0)
