"""The self-probability of each step: a given one, or one that follows what the steps before it have measured.

What counts is how many tokens of a context differ from the reference, and that is p times the share of self tokens that
differ: a third for one model, one in seventy for another. So ``self_prob="auto"`` keeps that product at a target.

A warm-up may end where the loss under references has settled, as before that a model that knows something learns more
from references. One that knows nothing, whose first loss is that of guessing, learns most from its own tokens early on,
so it has no such warm-up.

All processes count the tokens and losses of all, and p depends on nothing else. So it is the same everywhere, and known
before the contexts of a step are made. A checkpoint has what was counted.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from ..context import ContextStats
from .checkpoints import COUNTED, SELF_PROB
from .config import AUTO, DISAGREEMENT, SETTLED, BSSConfig
from .meter import Meter, differing_tokens
from .schedules import Schedule

logger = logging.getLogger(__name__)

_DECAY = 0.95  # of what a step has counted, with each step after it
_LOOKS = 256  # while the steps double: each reads the losses of all steps so far
_FIRST = 4  # steps, whose mean loss is what the loss has fallen from
_LEAST = 64  # steps: before them, quarters are too short to be compared
_OF_FALL = 0.05  # of what the loss has fallen so far
_OF_LOSS = 0.02  # of the loss itself
_LEAST_EXPECTED = 0.01  # of self tokens, that differ
_OF_GUESSING = 0.95  # of the loss of a uniform guess: from there on a model knows nothing


def settled(losses: Sequence[float], least: int = _LEAST) -> bool:
    """Whether the losses of the steps so far have settled.

    They have if the last quarter of the steps is hardly better than the quarter before: if its mean is lower by at most
    2%, and by at most 5% of what the loss has fallen since the first steps. (The latter alone would take a slow fall
    for none after a steep one.) In place of the latter, the last quarter may be at most 2% better than the first: then
    there was nothing to learn. A fall counts as one standard error larger than it looks, and a rise as no fall, so that
    noise delays the answer.

    Args:
        losses: of all steps, each the mean over its tokens.
        least: steps before which they have not.
    """
    count = len(losses)
    if count < least:
        return False
    size = count // 4
    both = losses[count - 2 * size :]
    last = _mean(both[size:])
    # Differences of neighbours have twice the variance of a step, and hardly any trend.
    error = math.sqrt(_mean([(after - one) ** 2 for one, after in pairwise(both)]) / size)
    falls = [max(0.0, _mean(before) - last) + error for before in (losses[:size], both[:size])]
    has_fallen = _mean(losses[:_FIRST]) - last
    return falls[1] <= _OF_LOSS * last and (falls[1] <= _OF_FALL * has_fallen or falls[0] <= _OF_LOSS * last)


def expected_disagreement(losses: Sequence[float]) -> float:
    """The share of self tokens that may differ at most, by the mean loss of the last quarter of the steps; at least 1%.

    A token sampled at temperature 1 is the reference with the probability that the model gives it, whose mean is at
    least exp(-loss) by Jensen's inequality. The least is there so that it can turn out otherwise.
    """
    last = losses[-max(1, len(losses) // 4) :]
    return min(1.0, max(_LEAST_EXPECTED, 1.0 - math.exp(-_mean(last))))


def least_steps(warmup: int, max_steps: int) -> int:
    """The steps before which the loss of a run has not settled, whatever it is like.

    They are a tenth of the run, and enough for the last two quarters to lie after the ``warmup`` steps in which the
    learning rate rises from 0, where losses stand still.
    """
    return max(_LEAST, 2 * warmup, max_steps // 10)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class DifferenceBudget:
    """The p under which the share ``target`` of all answer tokens are self tokens that differ from the reference.

    It is target / d, and at most ``cap``; d is the share of self tokens that differ, in steps of which later ones count
    more. One self token is counted beforehand, of which the share ``expected`` differs: by default all of it, so that p
    begins at the target, and even a model whose self tokens all differ stays within it.
    """

    def __init__(self, target: float, cap: float):
        self.target, self.cap = float(target), float(cap)
        self.self_tokens = self.differing = 0.0
        self.expected = 1.0

    @property
    def self_prob(self) -> float:
        return min(self.cap, self.target / self.disagreement)

    @property
    def disagreement(self) -> float:
        """d, in (0, 1]."""
        return (self.expected + self.differing) / (1 + self.self_tokens)

    def count(self, self_tokens: float, differing: float) -> None:
        """Take what a step has counted."""
        self.self_tokens = _DECAY * self.self_tokens + self_tokens
        self.differing = _DECAY * self.differing + differing


class SelfProb(TrainerCallback):
    """Tells p before the contexts of a step are made, and learns from each step when it is done.

    Args:
        args: of the run.
        accelerator: of its processes.
        meter: is told the p of each step.
        vocab_size: tells how many ids a uniform guess chooses from; None where the loss is no mean cross-entropy.
    """

    def __init__(
        self,
        args: BSSConfig,
        accelerator: Accelerator,
        meter: Meter,
        vocab_size: Callable[[], int | None] = lambda: None,
    ):
        self._args, self._accelerator, self._meter, self._vocab_size = args, accelerator, meter, vocab_size
        self._begin()

    @property
    def _of_guessing(self) -> float:
        ids = self._vocab_size()
        return math.inf if ids is None else _OF_GUESSING * math.log(ids)

    def _begin(self) -> None:
        self._budget = DifferenceBudget(self._args.difference_target, self._args.self_prob_cap)
        waits = self._args.warm_up == SETTLED and self._args.self_prob != 0  # where it is, nothing is to be mixed
        self._losses: list[float] | None = [] if waits else None  # None: settled
        self._forget_step()

    def _forget_step(self) -> None:
        self._used: float | None = None
        self._loss, self._self_tokens, self._differing = 0.0, 0, 0

    def at(self, step: int, max_steps: int, schedule: Schedule | None = None) -> float:
        """p of the 0-based ``step`` that comes next, or is under way."""
        args = self._args
        if not args.follows_steps:
            return args.self_prob_at(step, max_steps, schedule)
        args.check_schedule(schedule)
        if self._losses is not None or (args.warm_up != SETTLED and step < args.first_mixed_step(max_steps)):
            return 0.0
        if args.self_prob == AUTO:
            return self._budget.self_prob
        share = self._budget.disagreement if args.self_prob_schedule == DISAGREEMENT else 1.0
        return float(args.self_prob or 0) * share

    def mixed(self, self_prob: float, stats: ContextStats) -> None:
        """Count contexts of this step, which were made with ``self_prob``."""
        self._used = self_prob
        self._self_tokens += stats.self_tokens
        self._differing += differing_tokens(stats)

    def trained(self, loss: Tensor) -> None:
        """Count the loss of a micro-batch, which is its part of that of the step."""
        if self._losses is not None:
            self._loss += float(loss)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # else a checkpoint was loaded
            self._begin()
        if self._losses is None:
            return
        least = least_steps(self._args.get_warmup_steps(state.max_steps), state.max_steps)
        if state.global_step - len(self._losses) + least >= state.max_steps:
            self._say_that_none_are_mixed(
                "no contexts will be mixed (unless the model only guesses, as with random weights): the training has "
                "%d steps, and whether its loss has settled is told after %d at the earliest",
                state.max_steps,
                least,
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self._losses:
            self._say_that_none_are_mixed(
                "nothing was mixed, as the loss of %d steps has not settled", state.global_step
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._used is None:  # contexts are not made here
            return
        self._meter.counts["self_prob"] += self._used  # type: ignore[assignment]
        if self._args.follows_steps:
            self._learn(state.global_step, state.max_steps)
        self._forget_step()

    def _learn(self, steps: int, max_steps: int) -> None:
        """Take what all processes have counted in a step, of which each calls this; ``steps`` are done now."""
        losses, self_tokens, differing = self._of_all()
        if self._used:
            self._budget.count(sum(self_tokens), sum(differing))
        if self._losses is None:
            return
        loss = _mean(losses)
        if not math.isfinite(loss):  # fp16's loss scaler leaves out steps that overflow
            return
        self._losses.append(loss)
        count, least = len(self._losses), least_steps(self._args.get_warmup_steps(max_steps), max_steps)
        if count == 1 and loss >= self._of_guessing:
            self._mix_from_now("the first loss, %.2f, is that of guessing: the model has nothing to unlearn", loss)
            return
        if count % max(1, count // _LOOKS) == 0 and settled(self._losses, least):
            if self._args.self_prob_schedule == DISAGREEMENT:
                self._budget.expected = expected_disagreement(self._losses)
            self._mix_from_now("the loss has settled after %d steps", steps)

    def _mix_from_now(self, why: str, *numbers: float) -> None:
        self._losses = None
        if self._args.process_index == 0:
            logger.info(f"{why}; contexts are mixed from now on", *numbers)

    def _say_that_none_are_mixed(self, why: str, *numbers: int) -> None:
        if self._args.process_index == 0:
            remedy = "to mix contexts from the first step on, give self_prob a number (--self-prob 0.1)"
            logger.warning(f"{why}; {remedy}", *numbers)

    def _of_all(self) -> list[list[float]]:
        """The loss, self tokens and differing tokens of the processes; of those that have the same rows, one counts."""
        mine = [self._loss, self._self_tokens, self._differing]
        if self._accelerator.num_processes == 1:
            return [[one] for one in mine]
        told = torch.tensor([mine], dtype=torch.float64, device=self._accelerator.device)
        told = self._accelerator.gather(told)[:: self._args.tensor_parallel]
        return told.T.tolist()  # summed up in the same order in each process

    def save(self, folder: Path) -> None:
        """Write what `load` reads: one file, as all processes have counted the same."""
        if self._args.follows_steps and self._args.should_save:
            budget = self._budget
            counted = [self._losses, budget.self_tokens, budget.differing, budget.expected]
            (folder / SELF_PROB).write_text(json.dumps(dict(zip(COUNTED, counted, strict=True))) + "\n")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, which is whole."""
        self._begin()
        if not self._args.follows_steps:
            return
        file = folder / SELF_PROB
        if file.is_file():
            counted = json.loads(file.read_text())
            budget = self._budget
            self._losses, budget.self_tokens, budget.differing, budget.expected = (counted[name] for name in COUNTED)
        elif self._args.process_index == 0:  # of another program
            logger.warning("%s has no %s, so what self_prob follows is counted from this step on", folder, SELF_PROB)
