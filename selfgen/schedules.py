"""Self-probability over training: how fast the context turns from the reference's to the model's own."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[float, float, float], float]
"""(start, end, progress in [0, 1]) -> self-probability"""


def constant(start: float, end: float, progress: float) -> float:
    """``end`` throughout."""
    return end


def linear(start: float, end: float, progress: float) -> float:
    """A straight line from ``start`` to ``end`` (linear decay of the reference share, Bengio et al. 2015)."""
    return start + (end - start) * progress


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear}
