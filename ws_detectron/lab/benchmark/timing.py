"""Candidates timed in turns, so that a change of the machine's load meets all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Action = Callable[[], Any]
"""What is timed. One that returns a float, on a CPU, has timed itself: these are its seconds."""


def interleave(
    candidates: Mapping[str, Action],
    rounds: int,
    warmup: int,
    device: str,
    *,
    collect: bool = True,
) -> dict[str, list[float]]:
    """Runs every candidate once in each round, in the order of `round_order`.

    Args:
        candidates: name -> what is timed.
        rounds: timed runs of each.
        warmup: runs of each before, not timed.
        device: `"cuda"` times with CUDA events, and waits for the GPU around each run.
        collect: collect garbage before each run, which takes a fifth of a second; without, no
            garbage is collected in between.

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
    gc.disable()
    try:
        for number in range(rounds):
            for name in round_order(list(candidates), number):
                if collect:
                    gc.collect()
                seconds[name].append(measure(candidates[name]))
    finally:
        gc.enable()
    return seconds


def round_order(names: Sequence[str], number: int) -> list[str]:
    """The order of one round: A B C, B C A, C A B, then the same backwards: B A C, A C B, C B A.

    Over as many rounds as there are names, each stands once at every place, so none is always the
    one that starts a round or follows the candidate that fills the caches; over twice as many, it
    also follows each of its neighbours as often as it precedes them.

    Args:
        names: of the candidates.
        number: of the round, from 0.
    """
    turn = number % len(names)
    order = [*names[turn:], *names[:turn]]
    return order[::-1] if number // len(names) % 2 else order


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> dict[str, float]:
    """How many times as long `name` took as `to`: median and quartiles of the rounds' ratios."""
    return spread([a / b for a, b in zip(seconds[name], seconds[to])])


def spread(values: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


def peak_bytes(action: Action, device: str) -> int:
    """The most memory that tensors made by `action` held at one time, above what was held before.

    On a CPU it is read off torch's record of every allocation, so it does not depend on what the
    system's allocator does with them.
    """
    action()  # what is allocated once and kept is not counted
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    results: Any = profile.profiler
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def gpu_work(action: Action) -> dict[str, float]:
    """What one run of `action` gives a GPU to do.

    Returns:
        `busy_seconds`: durations of its kernels and copies, summed; `launches`: how many.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        action()
        torch.cuda.synchronize()
    on_gpu = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    microseconds = sum(event.time_range.elapsed_us() for event in on_gpu)
    return {"busy_seconds": microseconds / 1e6, "launches": len(on_gpu)}


def _seconds(action: Action) -> float:
    start = time.perf_counter()
    own = action()
    return own if isinstance(own, float) else time.perf_counter() - start


def _seconds_on_cuda(action: Action) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
