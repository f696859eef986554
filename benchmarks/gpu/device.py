"""Graph replays of the engine as they happen, by the device's clock; in a rehearsal, of what stands in for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from . import results
from .lab import Lab


class Replays:
    """While ``on``, how many graphs were replayed and how long the device took for them."""

    def __init__(self) -> None:
        self.on, self.count = False, 0
        self._events: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def around(self, replay: Any) -> Any:
        """``replay``, counted and timed."""

        def timed(*args: Any) -> Any:
            if not self.on:
                return replay(*args)
            self.count += 1
            if not torch.cuda.is_available():
                started = time.perf_counter()
                replay(*args)
                self._seconds += time.perf_counter() - started
                return None
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            replay(*args)
            after.record()
            self._events.append((before, after))
            return None

        return timed

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.on, self.count, self._seconds = True, 0, 0.0
        self._events.clear()
        try:
            yield
        finally:
            self.on = False

    @property
    def seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize()
        return self._seconds + sum(before.elapsed_time(after) for before, after in self._events) * 1e-3


@contextmanager
def replays(lab: Lab) -> Iterator[Replays]:
    """Inside, generators that are made have graphs whose replays are counted; whatever the engine does with them."""
    found = Replays()
    if not lab.rehearsal:
        original = torch.cuda.CUDAGraph.replay
        torch.cuda.CUDAGraph.replay = found.around(original)  # type: ignore[method-assign]
        try:
            yield found
        finally:
            torch.cuda.CUDAGraph.replay = original  # type: ignore[method-assign]
        return
    folder = str(results.ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    stand_in = import_module("helpers.graphs")
    record = stand_in.Recorder._record
    stand_in.Recorder._record = lambda self, run: found.around(record(self, run))
    try:
        with stand_in.recorded_passes():
            yield found
    finally:
        stand_in.Recorder._record = record
