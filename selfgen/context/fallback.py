"""Free-running answers of models that the ragged path refuses, by transformers' ``generate``.

Tokens are drawn from the same noise, inside ``generate``. It is not known beforehand how such a model treats padding,
other rows and its cache. So the first batches are compared with its own forward over each row alone, and where they
differ a slower strategy is taken.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import selfgen_kernels as kernels

from .batch import left_pad
from .free_running import Prompts, Work
from .models import own_logits, text_inputs
from .precision import full_precision
from .sharding import ALONE, Together
from .support import lengths_of

logger = logging.getLogger(__name__)


class _Strategy(NamedTuple):
    """How rows are computed."""

    padded: bool  # with prompts of other lengths
    together: bool  # with other rows
    cache: bool

    def __str__(self) -> str:
        rows = "rows of any length together" if self.padded else "rows of one length together"
        return f"{rows if self.together else 'row by row'}, {'over a cache' if self.cache else 'without a cache'}"


_ALONE = _Strategy(False, False, False)  # the model's own forward over each prefix: the definition itself
_STRATEGIES = (
    _Strategy(True, True, True),
    _Strategy(False, True, True),
    _Strategy(False, False, True),
    _ALONE,
)
_RECOMPUTE = _Strategy(False, True, False)  # right where only the length of a row counts
_FAULTS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_ENOUGH = 64  # tokens, those that begin answers aside, which show whether a strategy suits a model


class Fallback:
    """Answers of one model by ``generate``, with the strategy that was found to suit it."""

    def __init__(self, model: PreTrainedModel, together: Together = ALONE):
        self.model, self._together = model, together
        self._strategies = list(_STRATEGIES)
        self._lengths = lengths_of(model)
        self._shown: Counter[tuple[bool, int]] = Counter()  # tokens of each kind of batch that the first of these has
        # computed rightly

    def __call__(
        self,
        prompts: Prompts,
        sampling: dict[str, Any],
        batch_size: int,
        finish: Callable[[int, Tensor], None],
        *,
        recompute: bool = False,
    ) -> Work:
        """As ``free_running``; ``recompute`` is for models whose cache depends on the final length of a row."""
        waiting = dict.fromkeys(range(len(prompts.tokens)))
        passes = tokens_computed = 0
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()  # without its filters
        try:
            while waiting:
                strategy = _RECOMPUTE if recompute else self._strategies[0]
                if strategy == _ALONE:
                    for row in list(waiting):
                        answer = self._alone(row, prompts, sampling)
                        passes += len(answer)
                        tokens_computed += sum(range(len(prompts.tokens[row]), len(prompts.tokens[row]) + len(answer)))
                        finish(row, answer)
                    break
                rows = _next_batch(prompts, list(waiting), strategy, batch_size)
                sampler = _OwnSampling(rows, prompts, sampling, strategy)
                invalid = sampling["status"].clone()
                try:
                    answers = self._answers(rows, prompts, sampler, strategy)
                except _FAULTS as error:
                    if recompute or isinstance(error, torch.OutOfMemoryError):
                        raise
                    self._next_strategy(error)
                    sampling["status"].copy_(invalid)
                    continue
                passes, tokens_computed = passes + sampler.passes, tokens_computed + sampler.tokens_computed
                if not recompute and self._together.any(not self._suits(rows, prompts, answers, sampler.logits)):
                    self._next_strategy("logits differ from those of a forward over each row alone")
                    sampling["status"].copy_(invalid)
                    continue
                for row, answer in zip(rows, answers, strict=True):
                    finish(row, answer)
                    del waiting[row]
        finally:
            self.model.generation_config = own
        return Work(passes, tokens_computed)

    def _answers(self, rows: list[int], prompts: Prompts, sampler: _OwnSampling, strategy: _Strategy) -> list[Tensor]:
        ids = left_pad([prompts.tokens[row] for row in rows])
        limit = prompts.limits[rows[0]]
        found = self.model.generate(
            ids,
            attention_mask=left_pad([torch.ones_like(prompts.tokens[row]) for row in rows]),
            **text_inputs(self.model, ids),
            generation_config=GenerationConfig(
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=prompts.stop_ids.tolist() or None,
                pad_token_id=0,
                use_cache=strategy.cache,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=False,  # nothing waits for other processes here, or `lockstep` has them run along
        )[:, ids.shape[1] :]
        ends = [torch.isin(answer, prompts.stop_ids).nonzero().flatten().tolist() for answer in found]
        return [answer[: end[0] + 1 if end else limit] for answer, end in zip(found, ends, strict=True)]

    def _alone(self, row: int, prompts: Prompts, sampling: dict[str, Any]) -> Tensor:
        """The answer of one row, int64 [T], by the model's own forward over every prefix."""
        context = prompts.tokens[row]
        first, one = len(context), slice(row, row + 1)
        for _ in range(prompts.limits[row]):
            logits = own_logits(self.model, context, context.new_tensor([len(context) - 1]))
            token, _ = kernels.sample_mix(
                logits,
                context[-1:],
                1.0,
                sample_ids=prompts.sample_ids[one],
                positions=context.new_tensor([len(context) - first]),
                **sampling,
            )
            context = torch.cat([context, token])
            if torch.isin(token, prompts.stop_ids):
                break
        return context[first:]

    def _next_strategy(self, reason: object) -> None:
        del self._strategies[0]
        logger.warning(
            "%s: answers are computed %s from now on, which is slower, because of this: %s",
            type(self.model).__name__,
            self._strategies[0],
            reason,
        )
        self._shown.clear()

    def _suits(self, rows: list[int], prompts: Prompts, answers: list[Tensor], found: list[Tensor]) -> bool:
        """Whether ``found``, `_told` [R, 2] of the tokens of each pass, is that of each row's own forward.

        Where these are not finite, nothing is shown.
        """
        lengths = [len(prompts.tokens[row]) for row in rows]
        longest = max(length + len(answer) for length, answer in zip(lengths, answers, strict=True))
        kind = len(set(lengths)) > 1, bisect_left(self._lengths, longest)  # padded or not, beyond which numbers
        if self._shown[kind] >= _ENOUGH:
            return True
        exact = full_precision(self.model)
        for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            context = torch.cat([prompts.tokens[row], answer])
            places = torch.arange(len(context) - len(answer) - 1, len(context) - 1, device=context.device)
            logits = own_logits(self.model, context, places).float()
            logits[-1:] = own_logits(self.model, context[:-1], places[-1:])  # which the length of the row may change
            want = _told(logits, answer)
            own = torch.stack([of_rows[index] for of_rows in found[: len(answer)]])
            told = want.isfinite().all(1)
            if not told.any():
                continue
            usual = logits[logits.isfinite() & (logits.abs() < 1e30)]  # some models mask logits
            off = (own - want)[told].abs().mean(0).max()
            if not off <= (1e-3 if exact else 0.1) * usual.std():  # NaN is a difference, too
                return False
            self._shown[kind] += int(told.sum()) - 1
        return True


class _OwnSampling(LogitsProcessor):
    """The tokens of `sample_mix` for ``generate``: all scores but theirs are -inf, so that greedy takes them."""

    def __init__(self, rows: list[int], prompts: Prompts, sampling: dict[str, Any], strategy: _Strategy):
        self.sample_ids, self.sampling, self.strategy = prompts.sample_ids[rows], sampling, strategy
        self.stop_ids = prompts.stop_ids
        self.going_on = torch.ones(len(rows), dtype=torch.bool, device=self.sample_ids.device)
        self.passes = self.tokens_computed = 0
        self.logits: list[Tensor] = []  # a pass: [R, 2], what is compared

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = torch.full_like(self.sample_ids, self.passes)
        self.tokens_computed += len(input_ids) if self.passes and self.strategy.cache else input_ids.numel()
        self.passes += 1
        tokens, _ = kernels.sample_mix(
            scores,
            input_ids[:, -1],
            self.going_on.double(),
            sample_ids=self.sample_ids,
            positions=position,
            **self.sampling,
        )
        self.going_on &= ~torch.isin(tokens, self.stop_ids)
        self.logits.append(_told(scores.float(), tokens))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _told(logits: Tensor, tokens: Tensor) -> Tensor:
    """[R, 2] of ``logits`` [R, V]: those of ``tokens`` [R], and what all others come to."""
    return torch.stack([logits.gather(1, tokens[:, None])[:, 0], logits.logsumexp(1)], dim=1)


def _next_batch(prompts: Prompts, waiting: list[int], strategy: _Strategy, batch_size: int) -> list[int]:
    """Rows that may be computed together, the first one that waits among them."""

    def kind(row: int) -> tuple[int, int]:
        return prompts.limits[row], 0 if strategy.padded else len(prompts.tokens[row])

    alike = [row for row in waiting if kind(row) == kind(waiting[0])]
    return alike[: batch_size if strategy.together else 1]
