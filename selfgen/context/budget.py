"""How many tokens a pass should carry on this device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .ragged import max_positions

LARGEST = 8192
_BALANCES = 8


def balance_of(token_budget: int) -> float:
    """The balance point that goes with a token budget: how many tokens cost as much as the weights of a pass."""
    return token_budget / _BALANCES


def calibrate_token_budget(model: PreTrainedModel, *, repeats: int = 3) -> int:
    """Measure the model's cost curve and return 8 times its balance point.

    A forward over n tokens costs about ``fixed + n * per_token`` seconds: the weights are streamed once, whatever n is.
    The balance point is the n at which both parts are equal. It decides how much speculation is worth its price
    (``plan.least_log_chance``); beyond a few times of it a larger pass gains no more. n is doubled until the forward
    takes four times as long as that of a single token, and the last doubling shows what a token costs.
    """

    def seconds(tokens: int) -> float:
        input_ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
        attention_mask = torch.ones_like(input_ids)
        times = []
        for _ in range(repeats):
            _synchronize(model.device)
            started = time.perf_counter()
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
            _synchronize(model.device)
            times.append(time.perf_counter() - started)
        return min(times)  # whatever else the machine does only adds to a time

    seconds(1)  # warm-up
    return token_budget_of(seconds, min(max_positions(model) or LARGEST, LARGEST))


def token_budget_of(seconds: Callable[[int], float], longest: int = LARGEST) -> int:
    """The token budget for a cost curve: ``seconds`` of a forward over n tokens, up to ``longest``."""
    single = before = seconds(1)
    tokens, per_token = 1, 0.0
    while tokens < longest and before < 4 * single:
        more = min(2 * tokens, longest)
        now = seconds(more)
        per_token = (now - before) / (more - tokens)
        tokens, before = more, now
    balance = single / per_token if per_token > 0 else LARGEST
    return int(min(max(16, _BALANCES * balance), LARGEST))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
