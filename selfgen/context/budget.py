"""How many tokens a pass should carry on this device, and what a pass costs by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .forward import Forward, Passes, Size, numbers_for
from .models import arguments_of, max_positions
from .ragged import RaggedPass
from .sharding import ALONE, Together

LARGEST = 8192
_BALANCES = 8


@dataclass(frozen=True)
class PassBudget:
    """How large passes may be, and by what speculation is weighed.

    ``tokens``, at least 1, caps a pass: it bounds memory. ``balance`` is the number of tokens that cost as much as a
    pass by itself: it decides how much speculation is worth its price (``plan.least_log_chance``). ``curve`` is what
    both were measured by: seconds of a forward, by the number of its tokens.
    """

    tokens: int
    balance: float
    curve: dict[int, float] = field(default_factory=dict, compare=False)


class _Trial(Passes):
    """Passes over the first tokens of one row, whatever they are."""

    is_trial = True
    hidden_states = None
    settings = ()

    def __init__(self, forward: Forward, longest: int):
        self.num_slots, _ = forward.room(longest, 1)
        self.slots = torch.arange(longest, device=forward.device)
        self.tokens = torch.zeros_like(self.slots)
        self.numbers = numbers_for(0, forward.device)

    def run(self, forward: Forward, size: Size) -> None:
        slots = self.slots[: size.tokens]
        bounds = pad(slots[-1:] + 1, (1, 0))  # [0, N]
        ragged_pass = RaggedPass(slots, slots[None], bounds.int(), bounds[None])
        forward.logits(ragged_pass, self.tokens[slots], slots[-1:])


def measure_budget(
    model: PreTrainedModel, *, forward: Forward | None = None, repeats: int = 3, together: Together = ALONE
) -> PassBudget:
    """Measure the model's cost curve; the cap is 8 times its balance point.

    A forward over n tokens costs about ``fixed + n * per_token`` seconds: the weights are streamed once, whatever n is.
    The balance point is the n at which both parts are equal; above a few times that, a larger pass gains no more. n is
    doubled until the forward takes four times as long as that of a single token, in two trials, and the last doubling
    shows what a token costs. ``forward``, if given, is what runs the passes, recorded ones if it records any of so many
    tokens; otherwise the model does, with an attention of its own. All processes that are ``together`` measure, and
    each time is that of the slowest: they come to the same budget.
    """
    longest = min(max_positions(model) or LARGEST, LARGEST)
    if forward is not None:
        longest = forward.most_slots(longest)
    device = model.device
    trial = None if forward is None else _Trial(forward, longest)

    def run(tokens: int) -> None:
        if forward is not None and trial is not None:
            forward.run(trial, Size(tokens, 1))
            return
        ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        mask = torch.ones_like(ids)[None]
        model(**arguments_of(model, input_ids=ids[None], attention_mask=mask, use_cache=False, logits_to_keep=1))

    def seconds(tokens: int) -> float:
        times = []
        for _ in range(repeats + (forward is not None)):  # a size may be recorded at first
            _synchronize(device)
            started = time.perf_counter()
            run(tokens)
            _synchronize(device)
            times.append(time.perf_counter() - started)
        return together.most(min(times))  # whatever else the machine does only adds to a time

    with nullcontext() if forward is None or trial is None else forward.over(trial):
        seconds(1)  # warm-up
        return budget_of(seconds, longest)


def budget_of(seconds: Callable[[int], float], longest: int = LARGEST) -> PassBudget:
    """The budget for a cost curve: ``seconds`` of a forward over n tokens, up to ``longest``."""
    found: dict[int, float] = {}

    def measure(tokens: int) -> float:
        found[tokens] = min(found.get(tokens, math.inf), seconds(tokens))
        return found[tokens]

    single, now, tokens, before = measure(1), 0.0, 1, 1
    while tokens < longest and now < 4 * single:
        tokens, before = min(2 * tokens, longest), tokens
        now = measure(tokens)
        if now >= 4 * single:  # unless something else ran on the machine just then
            single, _, now, more = measure(1), measure(before), measure(tokens), min(2 * tokens, longest)
            if measure(more) < now:  # which is no time of fewer tokens
                tokens, now = more, found[more]
    per_token = max((now - found[before]) / (tokens - before), (now - single) / (tokens - 1)) if tokens > 1 else 0.0
    balance = single / per_token if per_token > 0 else LARGEST
    tokens = int(min(max(16, _BALANCES * balance), LARGEST))
    return PassBudget(tokens, tokens / _BALANCES, found)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
