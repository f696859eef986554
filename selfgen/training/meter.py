"""What training steps cost, and what their contexts were like: the figures of the log.

A checkpoint keeps what was counted since the last line of the log, so that the next line of a resumed run is that of an
unbroken one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..context import ContextStats
from .weights import diverged

_FILE = "selfgen_log_{}.json"  # of each process, in every checkpoint
MOST_LEFT_OUT = 50
"""Steps in a row that fp16's loss scaler may leave out: it begins at 2**16, and halves with each of them."""


def differing_tokens(stats: ContextStats) -> int:
    """Self tokens that are not the reference."""
    return round((1 - stats.agreement) * stats.self_tokens)


class Meter:
    """What contexts and training cost since the last log, and what the contexts were like."""

    def __init__(self, scales_loss: bool = False, has_graphs: bool = False) -> None:
        self.scales_loss = scales_loss  # as fp16 does, so that steps may be left out
        self.has_graphs = has_graphs  # passes are to be CUDA graphs
        self._mark = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.steps = 0
        self.stats: list[ContextStats] = []
        self.context_seconds = self.training_seconds = 0.0
        self.skipped_steps = 0
        self.counts: Counter[str] = Counter()  # of what a method counts besides
        self.loss: float | Tensor = 0.0  # summed up in the order in which the Trainer does it
        self._carried: float | Tensor = 0.0

    def _since_mark(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def step_begin(self) -> None:
        self._since_mark()

    def contexts_begin(self) -> None:
        self.training_seconds += self._since_mark()

    def contexts_end(self, stats: ContextStats | None = None, *, made: bool = True) -> None:
        """The time since `contexts_begin` is that of contexts only if some were ``made``: plain steps have none."""
        seconds = self._since_mark()
        self.context_seconds += seconds if made else 0.0
        self.training_seconds += 0.0 if made else seconds
        if stats is not None:
            self.stats.append(stats)

    def step_end(self) -> None:
        self.training_seconds += self._since_mark()
        self.steps += 1

    def step_loss(self, loss: Tensor) -> Tensor:
        """Count the loss of a micro-batch; returns what the Trainer is to add to its own sum."""
        loss, self._carried = self._carried + loss, 0.0
        self.loss = self.loss + loss
        return loss

    def save(self, folder: Path, rank: int, logged_at: int) -> None:
        """Write what `load` reads, with the step of the last line of the log."""
        counted = {name: getattr(self, name) for name in ("steps", "context_seconds", "training_seconds")}
        counted |= {"skipped_steps": self.skipped_steps, "loss": float(self.loss), "counts": self.counts}
        counted |= {"stats": [asdict(stats) for stats in self.stats], "logged_at": logged_at}
        (folder / _FILE.format(rank)).write_text(json.dumps(counted) + "\n")

    @property
    def carried(self) -> float:
        """The losses since the last line of the log that a checkpoint has brought, until a step takes them."""
        return float(self._carried)

    def load(self, folder: Path, rank: int) -> int | None:
        """Go on from a checkpoint; returns the step of the last line of the log, or None where that is not known."""
        self.reset()
        file = folder / _FILE.format(rank)
        if not file.is_file():  # of an earlier version
            return None
        counted = json.loads(file.read_text())
        self.steps, self.skipped_steps = counted["steps"], counted["skipped_steps"]
        self.context_seconds, self.training_seconds = counted["context_seconds"], counted["training_seconds"]
        self.stats = [ContextStats(**stats) for stats in counted["stats"]]
        self.counts, self._carried = Counter(counted["counts"]), counted["loss"]
        return counted["logged_at"]

    def flush(self) -> dict[str, float]:
        """Means over the steps since the last flush."""
        steps = max(1, self.steps)

        def total(name: str) -> float:
            return sum(getattr(stats, name) for stats in self.stats)

        self_tokens = total("self_tokens")
        agreeing = sum(stats.agreement * stats.self_tokens for stats in self.stats)
        logs = {
            "self_share": self_tokens / max(1, total("answer_tokens")),
            "differing_share": sum(map(differing_tokens, self.stats)) / max(1, total("answer_tokens")),
            "passes": total("passes") / steps,
            "computed_per_token": total("tokens_computed") / max(1, total("context_tokens")),
            "invalid": total("invalid"),
            "context_seconds": self.context_seconds / steps,
            "training_seconds": self.training_seconds / steps,
        }
        if self_tokens:
            logs["agreement"] = agreeing / self_tokens
        if (seconds := self.context_seconds + self.training_seconds) > 0:
            logs["tokens_per_second"] = total("context_tokens") / seconds
        if self.has_graphs:
            computed = total("tokens_computed") + total("padding")
            logs["replayed_share"] = total("replayed") / max(1, total("passes"))
            logs["padding_share"] = total("padding") / max(1, computed)
        if "self_prob" in self.counts:
            logs["self_prob"] = self.counts["self_prob"] / steps
        if rows := self.counts["privileged"]:
            logs["privileged_too_long"] = self.counts["privileged_too_long"] / rows
        if self.scales_loss:
            logs["skipped_steps"] = self.skipped_steps
        self.reset()
        return logs


class StepTimer(TrainerCallback):
    """Tells the meter when training begins, and when an optimizer step is done on the device, or was left out.

    Raises:
        DivergedError: so many steps in a row were left out that smaller loss scales will not help.
    """

    def __init__(self, meter: Meter):
        self.meter = meter
        self._left_out = 0  # in a row

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # else a checkpoint was loaded
            self.meter.reset()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self.meter.skipped_steps += skipped
        self._left_out = self._left_out + 1 if skipped else 0
        if self._left_out >= MOST_LEFT_OUT:
            raise diverged(state.global_step, f"this and the {MOST_LEFT_OUT - 1} steps before it overflowed in fp16")
        if args.device.type != "cpu":
            torch.accelerator.synchronize(args.device)  # the next step's contexts would wait here anyway
        self.meter.step_end()
