"""The oracle: one token at a time, as a language model is run.

This is the definition of a mixed context (scheduled sampling, Bengio et al. 2015; arXiv 2410.14655), written down
literally: sample the next token given the context so far, and put it into the context where a self token may be. The
positions that may hold a self token are drawn beforehand. It works with every causal language model of transformers,
and the fast path is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from selfgen_kernels import sample_mix

from .batch import Batch, interleave, left_pad
from .forward import PADDING, Coverage, Forward, Passes, Size, numbers_for, seed_for
from .models import arguments_of, cache_argument, own_logits
from .ragged import RaggedPass


@dataclass
class SequentialResult:
    tokens: list[Tensor]  # [T_i] int64
    is_self: list[Tensor]  # [T_i] bool
    passes: int
    tokens_computed: int
    invalid: int
    coverage: Coverage = field(default_factory=Coverage)


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

    On purpose, nothing here runs over the ragged cache or as a CUDA graph: passes that do are compared with it.
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
            may_be_self[:, step],
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

    ``precision="invariant"`` promises these contexts at any budget and in any batch. What a pass computes does not
    depend on what the one before it has shown, so between two of them the host has nothing to read.
    """
    loop = OneByOne(forward, batch)
    told = torch.cat([row[1:] for row in loop.candidates[: sum(batch.lengths)].split(batch.lengths)])
    passes = told.tolist()  # of each, whether the token that it tells is sampled
    with forward.over(loop):
        for is_sampled in passes:
            forward.run(loop, Size(1, int(is_sampled)))
    return SequentialResult(
        tokens=loop.answers(loop.tokens),
        is_self=loop.answers(loop.is_self),
        passes=len(passes),
        tokens_computed=len(passes),
        invalid=int(loop.status),
        coverage=forward.coverage,
    )


class OneByOne(Passes):
    """The rows of a batch one after the other, of which a pass computes the token in one ``slot``.

    They lie one after the other, and the last slot is nobody's. Of each slot: ``tokens``, their ``reference``,
    ``candidates`` and ``is_self`` as in the answers, ``positions`` counted from the row's first token and
    ``answer_positions`` from the first one of its answer, the ``row_starts`` and ``sample_ids`` of its row, and the
    ``next_slot`` to compute. All are [S], int64 or bool.
    """

    hidden_states = None
    PLAN: ClassVar = {"slot": PADDING}

    def __init__(self, forward: Forward, batch: Batch):
        device, used = batch.device, sum(batch.lengths)
        self.batch = batch
        self.num_slots, _ = forward.room(used, 1)
        prompt_lengths, lengths = (torch.tensor(x, device=device) for x in (batch.prompt_lengths, batch.lengths))  # [R]
        ends = lengths.cumsum(0)  # [R]
        row = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # [used]
        no_prompt = [torch.zeros_like(prompt, dtype=torch.bool) for prompt in batch.prompts]

        def of_slots(values: Tensor) -> Tensor:
            return pad(values, (0, self.num_slots - used))

        self.reference = of_slots(torch.cat(interleave(batch.prompts, batch.references)))
        self.candidates = of_slots(torch.cat(interleave(no_prompt, batch.candidates)))
        self.tokens, self.is_self = self.reference.clone(), torch.zeros_like(self.candidates)
        self.row_starts = of_slots((ends - lengths)[row])
        self.positions = of_slots(torch.arange(used, device=device)) - self.row_starts
        self.answer_positions = (self.positions - of_slots(prompt_lengths[row])).clamp(min=0)
        self.sample_ids = of_slots(batch.sample_ids[row])
        self.next_slot = torch.arange(1, self.num_slots + 1, device=device)
        self.next_slot[ends - 2] += 1  # the last token of a row tells none
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.seed = seed_for(batch.seed, device)
        self.status = torch.zeros(1, dtype=torch.int64, device=device)
        self.numbers = numbers_for(0, device)

    @property
    def settings(self) -> tuple[Hashable, ...]:
        return self.batch.temperature, self.batch.min_reference_prob, self.batch.vocab_size

    def run(self, forward: Forward, size: Size) -> None:
        batch, slot = self.batch, self.slot  # [1]
        slots = pad(slot, (0, size.tokens - 1), value=PADDING)  # [N]
        ragged_pass = RaggedPass(
            slots=slots,
            position_ids=self.positions[slots][None],
            cu_seqlens_q=pad((slot >= 0).int(), (1, 0)),
            kv_ranges=torch.stack([self.row_starts[slot], self.positions[slot] + 1], 1),
        )
        at = slot[: size.places]  # [M]: it, or none
        logits = forward.logits(ragged_pass, self.tokens[slots], torch.zeros_like(at))  # [M, V]
        after = at + 1  # 0 for padding, which is the first token of a prompt
        self.tokens[after], self.is_self[after] = sample_mix(
            logits,
            self.reference[after],
            self.candidates[after],
            seed=self.seed,
            sample_ids=self.sample_ids[after],
            positions=self.answer_positions[after],
            temperature=batch.temperature,
            min_reference_prob=batch.min_reference_prob,
            vocab_size=batch.vocab_size,
            status=self.status,
        )
        self.slot.copy_(self.next_slot[slot])

    def answers(self, of_slots: Tensor) -> list[Tensor]:
        """What ``of_slots`` [S] says of the answers, [T_i] each."""
        rows = of_slots[: sum(self.batch.lengths)].clone().split(self.batch.lengths)  # others may get this memory
        return [row[prompt:] for row, prompt in zip(rows, self.batch.prompt_lengths, strict=True)]
