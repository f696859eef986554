"""What a process holds, looked at from time to time, and whether it grows: memory, tensors, objects, files, threads,
and the processor time of a step."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch


class Sample(NamedTuple):
    """Of what a process holds after a step."""

    step: int
    memory: int  # bytes that are resident
    tensors: int
    objects: int  # that the garbage collector knows
    files: int
    threads: int
    seconds: float  # of processor time per step since the sample before


class Watch:
    """Takes a sample ``every`` so many steps; what is done between two marks and is no step does not count as time."""

    def __init__(self, every: int):
        self.every, self.samples = every, list[Sample]()
        self._seconds, self._mark = 0.0, time.process_time()

    def mark(self) -> None:
        """What comes now is a step's."""
        self._mark = time.process_time()

    def step_done(self, step: int) -> None:
        self._seconds += time.process_time() - self._mark
        if step % self.every == 0:
            held = _held(ours=len(self.samples))
            self.samples.append(Sample(step, *held, self._seconds / self.every))
            self._seconds = 0.0
        self.mark()


def _held(ours: int) -> tuple[int, int, int, int, int]:
    """What a sample says of the process; ``ours`` are the objects that samples are."""
    gc.collect()
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    objects = gc.get_objects()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), tensors, len(objects) - ours, files, threading.active_count()


def watched(step: Callable[[int], object], steps: int, every: int) -> list[Sample]:
    """Run the steps 1, 2, ... and sample."""
    watch = Watch(every)
    for number in range(1, steps + 1):
        step(number)
        watch.step_done(number)
    return watch.samples


class Trend(NamedTuple):
    """Growth over the second half, by the median of all slopes (Theil 1950, Sen 1968), with its 99% interval."""

    growth: float
    low: float
    high: float
    level: float


def trend(steps: Sequence[int], values: Sequence[float]) -> Trend:
    steps, values = steps[len(steps) // 2 :], values[len(values) // 2 :]
    slopes = sorted((values[j] - values[i]) / (steps[j] - steps[i]) for i, j in combinations(range(len(steps)), 2))
    n, many = len(steps), len(slopes)
    reach = 2.576 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)  # of Kendall's S, by which the interval is found
    low, high = (slopes[min(many - 1, max(0, round((many + sign * reach) / 2)))] for sign in (-1, 1))
    span = steps[-1] - steps[0]
    return Trend(median(slopes) * span, low * span, high * span, median(values))


def trends(samples: Sequence[Sample]) -> dict[str, Trend]:
    steps = [sample.step for sample in samples]
    return {name: trend(steps, [getattr(one, name) for one in samples]) for name in Sample._fields[1:]}


def grown(samples: Sequence[Sample]) -> dict[str, Trend]:
    """What grows for sure, and by more than is nothing.

    Nothing is: 1% of the memory, a tensor in 50 steps, an object in 10 (a log has some), half a file or thread, and 5%
    of a step's time, over the second half.
    """
    steps = (samples[-1].step - samples[len(samples) // 2].step) or 1
    found = trends(samples)
    nothing = {
        "memory": 0.01 * found["memory"].level,
        "tensors": steps / 50,
        "objects": steps / 10,
        "files": 0.5,
        "threads": 0.5,
        "seconds": 0.05 * found["seconds"].level,
    }
    return {name: one for name, one in found.items() if one.low > 0 and one.growth > nothing[name]}


def report(samples: Sequence[Sample]) -> str:
    """A line for each figure."""
    lines = []
    for name, one in trends(samples).items():
        interval = f"{one.low:+.3g} to {one.high:+.3g}"
        lines.append(f"{name:8} {one.level:14.6g}, growth over the second half {one.growth:+.3g} (99%: {interval})")
    return "\n".join(lines)
