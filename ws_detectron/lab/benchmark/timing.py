"""Times candidates interleaved, so that changes of the machine's load affect all of them."""

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ws_detectron.utils.command_line import progress

Action = Callable[[], object]


def time_and_memory(
    candidates: Mapping[str, Action], rounds: int, warmup: int, device: str
) -> dict[str, Any]:
    """Measures time and memory of candidates.

    Args:
        candidates, rounds, warmup, device: as for `interleave`.

    Returns:
        `seconds` as from `interleave`; `peak_bytes`, name -> bytes; and on CUDA `gpu`, name -> as
        from `gpu_work`.
    """
    measured: dict[str, Any] = {"seconds": interleave(candidates, rounds, warmup, device)}
    if device == "cuda":
        measured["gpu"] = {name: gpu_work(action) for name, action in candidates.items()}
    measured["peak_bytes"] = {n: peak_bytes(action, device) for n, action in candidates.items()}
    return measured


def interleave(
    candidates: Mapping[str, Action], rounds: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Runs every candidate once in each round, in the order of `round_order`.

    Args:
        candidates: name -> function to time.
        rounds: timed runs of each.
        warmup: untimed runs of each before.
        device: `"cuda"` times with CUDA events, and waits for the GPU around each run.

    Returns:
        Name -> seconds of each round.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for action in candidates.values():
        for _ in range(warmup):
            action()
    measure = _seconds_on_cuda if device == "cuda" else _seconds
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.freeze()  # what is there now is not looked at again, which would take 0.2 s for each run
    gc.disable()
    try:
        for number in progress(range(rounds), "timing", "round"):
            for name in round_order(list(candidates), number):
                gc.collect()
                seconds[name].append(measure(candidates[name]))
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


def round_order(names: Sequence[str], number: int) -> list[str]:
    """The order of one round: A B C, B C A, C A B, then the same backwards: B A C, A C B, C B A.

    In as many rounds as there are names, each is at every position once, so none always starts a
    round or always follows the one that fills the caches; in twice as many, it also follows each of
    its neighbours as often as it precedes it.

    Args:
        names: names of the candidates.
        number: number of the round, from 0.
    """
    turns, first = divmod(number, max(len(names), 1))
    order = [*names[first:], *names[:first]]
    return order[::-1] if turns % 2 else order


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def peak_bytes(action: Action, device: str) -> int:
    """Peak memory of the tensors that `action` allocates, above what was allocated before.

    On a CPU it is computed from the allocations that torch's profiler records, so it does not
    depend on the system's allocator.
    """
    action()  # allocations that are kept, such as caches, are not counted
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in changes), default=0)


def gpu_work(action: Action) -> dict[str, float]:
    """Work of one run of `action` on the GPU and on the host.

    Returns:
        `busy_seconds`: summed durations of its kernels and copies; `launches`: their number;
        `host_seconds`: time until the last of them is launched, the minimum of 5 runs.
    """
    host = []
    for _ in range(5):
        torch.cuda.synchronize()
        host.append(_seconds(action))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        action()
        torch.cuda.synchronize()
    durations = [
        event.time_range.elapsed_us()
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    return {
        "busy_seconds": sum(durations) / 1e6,
        "launches": len(durations),
        "host_seconds": min(host),
    }


def _seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _seconds_on_cuda(action: Action) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
