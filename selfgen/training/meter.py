"""What training steps cost, and what their contexts were like: the figures of the log."""

from __future__ import annotations

import time

import torch
from transformers import TrainerCallback

from ..context import ContextStats


class Meter:
    """What contexts and training cost since the last log, and what the contexts were like."""

    def __init__(self) -> None:
        self._mark = 0.0
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.stats: list[ContextStats] = []
        self.context_seconds = self.training_seconds = 0.0

    def _since_mark(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def step_begin(self) -> None:
        self._since_mark()

    def contexts_begin(self) -> None:
        self.training_seconds += self._since_mark()

    def contexts_end(self, stats: ContextStats | None = None) -> None:
        self.context_seconds += self._since_mark()
        if stats is not None:
            self.stats.append(stats)

    def step_end(self) -> None:
        self.training_seconds += self._since_mark()
        self.steps += 1

    def flush(self) -> dict[str, float]:
        """Means over the steps since the last flush."""
        steps = max(1, self.steps)

        def total(name: str) -> float:
            return sum(getattr(stats, name) for stats in self.stats)

        self_tokens = total("self_tokens")
        agreeing = sum(stats.agreement * stats.self_tokens for stats in self.stats)
        logs = {
            "self_share": self_tokens / max(1, total("answer_tokens")),
            "agreement": agreeing / self_tokens if self_tokens else 1.0,
            "passes": total("passes") / steps,
            "computed_per_token": total("tokens_computed") / max(1, total("context_tokens")),
            "context_seconds": self.context_seconds / steps,
            "training_seconds": self.training_seconds / steps,
        }
        self._reset()
        return logs


class StepTimer(TrainerCallback):
    """Tells the meter when an optimizer step is done on the device."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize(args.device)  # the next step's contexts would wait here anyway
        self.meter.step_end()
