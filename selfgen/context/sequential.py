"""The oracle: one token at a time, as a language model is run.

This is the definition of a mixed context (scheduled sampling, Bengio et al. 2015; arXiv 2410.14655), written down
literally: sample the next token given the context so far, and put it into the context where a self token may be. The
positions that may hold a self token are drawn beforehand. It works with every causal language model of transformers,
and the fast path is tested against it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from selfgen_kernels import sample_mix

from .batch import Batch, left_pad
from .models import cache_argument


@dataclass
class SequentialResult:
    tokens: list[Tensor]  # [T_i] int64
    is_self: list[Tensor]  # [T_i] bool
    passes: int
    tokens_computed: int
    invalid: int


def sequential(model: PreTrainedModel, batch: Batch, *, isolate_rows: bool = False) -> SequentialResult:
    """Generate mixed contexts token by token.

    Rows are decoded together, left-padded, over transformers' own KV cache. ``isolate_rows`` decodes each row alone and
    recomputes its whole context at every token: for models whose layers are not a function of one row's prefix alone
    once padding or a cache is involved (frequencies that depend on the longest row, recurrent state, ...).
    """
    status = torch.zeros(1, dtype=torch.int64, device=batch.device)
    if isolate_rows:
        parts = [_decode(model, batch.row(i), status, use_cache=False) for i in range(len(batch.prompts))]
        return SequentialResult(
            tokens=[part.tokens[0] for part in parts],
            is_self=[part.is_self[0] for part in parts],
            passes=sum(part.passes for part in parts),
            tokens_computed=sum(part.tokens_computed for part in parts),
            invalid=int(status),
        )
    result = _decode(model, batch, status, use_cache=True)
    result.invalid = int(status)
    return result


def _decode(model: PreTrainedModel, batch: Batch, status: Tensor, *, use_cache: bool) -> SequentialResult:
    rows, steps = len(batch.prompts), max(batch.answer_lengths)
    context = left_pad(batch.prompts)  # [R, L] grows by one column a step
    mask = left_pad([torch.ones_like(prompt) for prompt in batch.prompts])  # [R, L]
    reference = torch.nn.utils.rnn.pad_sequence(batch.references, batch_first=True)  # [R, T]
    may_be_self = torch.nn.utils.rnn.pad_sequence(batch.candidates, batch_first=True)  # [R, T]; padding samples nothing
    last_position = torch.tensor(batch.lengths, device=batch.device) - 1  # [R]
    coins = []  # step x [R] bool

    cache = DynamicCache(config=model.config) if use_cache else None
    accepted = inspect.signature(model.forward).parameters
    new = context
    for step in range(steps):
        # Rows that have ended keep their place; their positions stay inside the model's range.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0).minimum(last_position[:, None])[:, -new.shape[1] :]
        arguments = {
            "input_ids": new,
            "attention_mask": mask,
            "position_ids": position_ids,
            cache_argument(model): cache,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }
        output = model(**{name: value for name, value in arguments.items() if name in accepted})
        logits = output.logits[:, -1]  # [R, V]
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
        new = column[:, None] if use_cache else context

    first = max(batch.prompt_lengths)
    tokens = [context[i, first : first + length] for i, length in enumerate(batch.answer_lengths)]
    is_self = [row[:length] for row, length in zip(torch.stack(coins, dim=1), batch.answer_lengths, strict=True)]
    width = range(first, first + steps)
    tokens_computed = rows * (first + steps - 1 if use_cache else sum(width))
    return SequentialResult(tokens, is_self, passes=steps, tokens_computed=tokens_computed, invalid=0)
