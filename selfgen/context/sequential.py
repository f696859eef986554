"""The oracle: one token at a time, as a language model is run.

This is the definition of a mixed context (scheduled sampling, Bengio et al. 2015; arXiv 2410.14655), written down
literally: sample the next token given the context so far, and put it into the context where a self token may be. The
positions that may hold a self token are drawn beforehand. It works with every causal language model of transformers,
and the fast path is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from selfgen_kernels import sample_mix

from .batch import Batch, left_pad
from .forward import Forward, Passes, Size, numbers_for
from .models import arguments_of, cache_argument, own_logits
from .ragged import RaggedPass


@dataclass
class SequentialResult:
    tokens: list[Tensor]  # [T_i] int64
    is_self: list[Tensor]  # [T_i] bool
    passes: int
    tokens_computed: int
    invalid: int


class Strategy(NamedTuple):
    """How rows are decoded."""

    together: bool  # left-padded, with positions that are given
    cache: bool

    def __str__(self) -> str:
        return f"{'together' if self.together else 'row by row'}, {'over a cache' if self.cache else 'without a cache'}"


TOGETHER = Strategy(together=True, cache=True)
ROW_BY_ROW = Strategy(together=False, cache=True)
ALONE = Strategy(together=False, cache=False)  # the model's own forward over each prefix: the definition itself
STRATEGIES = (TOGETHER, ROW_BY_ROW, ALONE)  # the fastest first


def sequential(
    model: PreTrainedModel,
    batch: Batch,
    strategy: Strategy = TOGETHER,
    *,
    observe: Callable[[Tensor], None] | None = None,
) -> SequentialResult:
    """Generate mixed contexts token by token.

    Rows are decoded together, left-padded, over transformers' own KV cache, or each alone: for models whose logits are
    not a function of one row's prefix alone once padding, other rows or a cache are involved (positions that begin
    elsewhere, frequencies that depend on the longest row, recurrent state, ...). ``verification`` finds out which
    strategy is right for a model. ``observe`` gets the logits [rows, V] of each step.
    """
    status = torch.zeros(1, dtype=torch.int64, device=batch.device)
    batches = [batch] if strategy.together else [batch.row(i) for i in range(len(batch.prompts))]
    parts = [_decode(model, part, status, strategy, observe) for part in batches]
    return SequentialResult(
        tokens=[tokens for part in parts for tokens in part.tokens],
        is_self=[is_self for part in parts for is_self in part.is_self],
        passes=sum(part.passes for part in parts),
        tokens_computed=sum(part.tokens_computed for part in parts),
        invalid=int(status),
    )


def _decode(
    model: PreTrainedModel,
    batch: Batch,
    status: Tensor,
    strategy: Strategy,
    observe: Callable[[Tensor], None] | None,
) -> SequentialResult:
    rows, steps = len(batch.prompts), max(batch.answer_lengths)
    context = left_pad(batch.prompts)  # [R, L] grows by one column a step
    mask = left_pad([torch.ones_like(prompt) for prompt in batch.prompts])  # [R, L]
    reference = torch.nn.utils.rnn.pad_sequence(batch.references, batch_first=True)  # [R, T]
    may_be_self = torch.nn.utils.rnn.pad_sequence(batch.candidates, batch_first=True)  # [R, T]; padding samples nothing
    last_position = torch.tensor(batch.lengths, device=batch.device) - 1  # [R]
    coins = []  # step x [R] bool

    cache = DynamicCache(config=model.config) if strategy.cache else None
    new = context
    for step in range(steps):
        if strategy.cache:
            arguments = {
                "input_ids": new.clone(),  # as some models write into it
                "attention_mask": mask,
                cache_argument(model): cache,
                "use_cache": True,
                "logits_to_keep": 1,
            }
            if strategy.together:  # rows that have ended keep their place; their positions stay in the model's range
                positions = (mask.cumsum(-1) - 1).clamp(min=0).minimum(last_position[:, None])
                arguments["position_ids"] = positions[:, -new.shape[1] :]
            logits = model(**arguments_of(model, **arguments)).logits[:, -1]  # [R, V]
        else:
            logits = own_logits(model, context[0], last_position.new_tensor([context.shape[1] - 1]))
        if observe is not None:
            observe(logits)
        column, coin = sample_mix(
            logits,
            reference[:, step],
            may_be_self[:, step].double(),
            seed=batch.seed,
            sample_ids=batch.sample_ids,
            positions=torch.full((rows,), step, device=batch.device),
            temperature=batch.temperature,
            min_reference_prob=batch.min_reference_prob,
            vocab_size=batch.vocab_size,
            status=status,
        )
        coins.append(coin)
        context = torch.cat([context, column[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        new = column[:, None]

    first = max(batch.prompt_lengths)
    tokens = [context[i, first : first + length] for i, length in enumerate(batch.answer_lengths)]
    is_self = [row[:length] for row, length in zip(torch.stack(coins, dim=1), batch.answer_lengths, strict=True)]
    width = range(first, first + steps)
    tokens_computed = rows * (first + steps - 1 if strategy.cache else sum(width))
    return SequentialResult(tokens, is_self, passes=steps, tokens_computed=tokens_computed, invalid=0)


def one_by_one(forward: Forward, batch: Batch) -> SequentialResult:
    """The definition in terms of passes: each row by itself, from its first token on, one token per pass.

    ``precision="invariant"`` promises these contexts at any budget and in any batch.
    """
    rows = [_OneByOne(forward, batch.row(i)) for i in range(len(batch.prompts))]
    for row in rows:
        with forward.over(row):
            for place in range(len(row.tokens) - 1):
                row.place = place
                row.run(forward, Size(1, 1))
    passes = sum(batch.lengths) - len(batch.lengths)
    return SequentialResult(
        tokens=[row.tokens[batch.prompt_lengths[i] :] for i, row in enumerate(rows)],
        is_self=[row.is_self for row in rows],
        passes=passes,
        tokens_computed=passes,
        invalid=sum(int(row.status) for row in rows),
    )


class _OneByOne(Passes):
    """One row, of which a pass computes the token at ``place``, which only the host knows."""

    recordable = False
    hidden_states = None
    settings = ()
    place = 0

    def __init__(self, forward: Forward, row: Batch):
        self.row = row
        (prompt,), (reference,), (candidates,) = row.prompts, row.references, row.candidates
        self.tokens, self.is_self = torch.cat([prompt, reference]), torch.zeros_like(candidates)
        self.num_slots = len(self.tokens) + 1
        self.status = torch.zeros(1, dtype=torch.int64, device=row.device)
        self.numbers = numbers_for(0, row.device)

    def run(self, forward: Forward, size: Size) -> None:
        row, place = self.row, self.place
        step = place + 1 - row.prompt_lengths[0]  # of the answer, whose token this one tells
        index = torch.arange(step >= 0, device=row.device)
        here = slice(place, place + 1)
        logits = forward.logits(RaggedPass.of_windows([(0, place, place + 1)], row.device), self.tokens[here], index)
        if step < 0:
            return
        at = slice(step, step + 1)
        self.tokens[place + 1 : place + 2], self.is_self[at] = sample_mix(
            logits,
            row.references[0][at],
            row.candidates[0][at].double(),
            seed=row.seed,
            sample_ids=row.sample_ids,
            positions=torch.tensor([step], device=row.device),
            temperature=row.temperature,
            min_reference_prob=row.min_reference_prob,
            vocab_size=row.vocab_size,
            status=self.status,
        )
