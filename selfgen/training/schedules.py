"""Self-probability over training: how fast reference tokens in a context give way to self tokens.

The shapes are those of Bengio et al. 2015 (arXiv 1506.03099, section 2.4). There they are decays of the share of
reference tokens over steps; here they lead from a start to an end over the progress of a training run of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, float, float], float]
"""(start, end, progress in [0, 1]) -> self-probability"""

_DECAYS = 5.0  # time constants of `exponential` in a run: at its end the share is within 1% of what it goes to
_STEEPNESS = 10.0  # of `inverse_sigmoid`: its logistic runs from -5 to 5


def constant(start: float, end: float, progress: float) -> float:
    """``end`` throughout."""
    return end


def linear(start: float, end: float, progress: float) -> float:
    """A straight line from ``start`` to ``end``."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine: slow at both ends."""
    return linear(start, end, (1 - math.cos(math.pi * progress)) / 2)


def exponential(start: float, end: float, progress: float) -> float:
    """Fast at first: the distance to ``end`` decays exponentially."""
    return linear(start, end, math.expm1(-_DECAYS * progress) / math.expm1(-_DECAYS))


def inverse_sigmoid(start: float, end: float, progress: float) -> float:
    """Slow at both ends and steep in the middle: a logistic curve."""
    low, here, high = (1 / (1 + math.exp(-_STEEPNESS * (place - 0.5))) for place in (0.0, progress, 1.0))
    return linear(start, end, (here - low) / (high - low))


SCHEDULES: dict[str, Schedule] = {
    schedule.__name__: schedule for schedule in (constant, linear, cosine, exponential, inverse_sigmoid)
}
