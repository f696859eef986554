"""What the device needs for a call: replays of a CUDA graph that holds many of them, on inputs that no cache keeps.

The host's clock over calls from Python is the other figure: with launches, checks and allocations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

Call = Callable[[], object]
REPLAYS, LEAST_SECONDS = 20, 1e-3  # of a graph: how often at least, and how long one should take
MOST_COPIES = 256  # of the inputs of one call
LEAST_COPIES_BYTES = 2  # times the L2


class Times(NamedTuple):
    """Seconds a call: medians of two rounds by graph replay, and of calls from Python."""

    graph: float
    again: float
    python: float


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def copies_for(nbytes: int, device: str) -> int:
    """How many copies of inputs of so many bytes are more than the L2 holds."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_COPIES, -(-LEAST_COPIES_BYTES * cache // max(1, nbytes))))


def times_of(calls: Sequence[Call], device: str, *, seconds: float = 0.2) -> Times:
    """Of calls that do the same on inputs of their own, run one after the other."""
    python = from_python(calls, device, seconds=seconds / 4)
    if device == "cpu":  # a rehearsal
        return Times(python, python, python)
    with captured(calls, repeats=max(1, round(LEAST_SECONDS / (python * len(calls))))) as (replay, count):
        first, again = (_replays(replay, seconds / 3) / count for _ in range(2))
    return Times(first, again, python)


def from_python(calls: Sequence[Call], device: str, *, seconds: float = 0.05) -> float:
    """Median seconds a call by the host's clock over rounds of all calls, with one wait at a round's end."""
    for call in calls[:2]:  # compiles
        call()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begin < seconds:
        synchronize(device)
        started = time.perf_counter()
        for call in calls:
            call()
        synchronize(device)
        found.append((time.perf_counter() - started) / len(calls))
    return statistics.median(found)


@contextmanager
def captured(calls: Sequence[Call], repeats: int = 1) -> Iterator[tuple[Call, int]]:
    """A replay of all calls, ``repeats`` times one after the other, and how many calls that is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    try:
        yield graph.replay, repeats * len(calls)
    finally:
        torch.cuda.synchronize()
        graph.reset()


def _replays(replay: Call, seconds: float) -> float:
    """Median seconds of a replay by the device's clock."""
    replay()
    torch.cuda.synchronize()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < REPLAYS or time.perf_counter() - begin < seconds:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        replay()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) * 1e-3)
        if len(found) >= 3 and time.perf_counter() - begin > 4 * seconds:  # long ones
            break
    return statistics.median(found)


class Rates(NamedTuple):
    """Ceilings of the device, measured."""

    copy: float  # bytes a second, read and written
    flops: dict[str, float]  # a second, by dtype: of a square matrix product


def copy_rate(device: str) -> float:
    numbers = 1 << (20 if device == "cpu" else 29)
    source, target = (torch.zeros(numbers, dtype=torch.float16, device=device) for _ in range(2))
    return 2 * source.nbytes / times_of([lambda: target.copy_(source)], device).graph


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Of random numbers: zeros are multiplied faster, as they take less power."""
    size = 64 if device == "cpu" else 8192 if dtype.itemsize == 2 else 4096
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / times_of([lambda: left @ right], device).graph


def rates(device: str) -> Rates:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return Rates(copy_rate(device), {name: product_rate(dtype, device) for name, dtype in dtypes.items()})
