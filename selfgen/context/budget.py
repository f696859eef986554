"""How many tokens a pass should carry on this device."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from .ragged import max_positions

LARGEST = 8192


def calibrate_token_budget(model: PreTrainedModel, *, factor: float = 2.0, repeats: int = 3) -> int:
    """Measure the model's cost curve and return ``factor`` times its balance point.

    A forward over n tokens costs about ``fixed + n * per_token`` seconds: the weights are streamed once, whatever n is.
    The balance point is the n at which both parts are equal; n is doubled until the forward takes twice as long as
    that of a single token, and interpolated. Smaller passes waste the streamed weights, larger ones speculate in vain;
    between, around twice the balance point, the cost is flat.
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

    longest = max_positions(model) or LARGEST
    seconds(1)  # warm-up
    single, tokens = seconds(1), 16
    while tokens * 2 <= min(longest, LARGEST) and seconds(tokens) < 2 * single:
        tokens *= 2
    tokens = min(tokens, longest)
    per_token = (seconds(tokens) - single) / max(1, tokens - 1)
    balance = single / per_token if per_token > 0 else LARGEST
    return int(min(max(16, factor * balance), LARGEST))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
