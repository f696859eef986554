"""The fast path: mixed contexts as a fixed point, found with the reference as the draft.

With its noise fixed, the self token at every candidate is a function of the tokens before it, and the mixed
context is the one sequence that this function maps to itself. So guess it (first guess: the reference), compute many
positions at once, correct the guess, and repeat. Whatever stands before the first correction in a row is final; it
stays in the KV cache and is never computed again. This is Jacobi iteration on the decoding equations (Song et al. 2021,
arXiv 2002.03629; Santilli et al. 2023, arXiv 2305.10427), exact as each pass makes at least one more token final.

Each pass ends by planning the next one: ``FixedPoint.plan`` chooses its tokens, ``run`` computes them, and ``commit``
writes down what they showed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

import selfgen_kernels as kernels

from .batch import Batch, interleave
from .budget import PassBudget
from .forward import PADDING, Forward, Passes, Size, following, numbers_for, seed_for
from .hidden_states import HiddenStates
from .plan import Speculation, least_log_chance, next_self_slots
from .ragged import RaggedPass

# The operators themselves: what they are given holds by how it is made, and to check it takes dozens of operations.
plan_pass, commit_pass = torch.ops.selfgen.plan_pass, torch.ops.selfgen.commit_pass


@dataclass
class FixedPoint(Passes):
    """The state of one generation, on the model's device. Rows lie one after the other; a token's index is its KV slot.

    ``tokens`` is the guess. K/V before ``final`` is computed under the final context; tokens up to it are final too.
    There may be room for more: rows that are done, and slots that are nobody's, the last one in any case.
    """

    batch: Batch
    row_starts: Tensor  # [R] int64: slots, in the order in which rows are planned for
    positions: Tensor  # [S] int64: counted from the first prompt token of the slot's row
    draws: Tensor  # [3, S] int64: the reference token, the sample id, and the position in the answer
    next_self: Tensor  # [S] int64: slot of the first self position planned for after each slot; see `start`
    ahead: Tensor  # [2, S] int64: tokens up to that, and self positions planned for after each slot in its row
    candidates: Tensor  # [S] bool: where the token may be a self token, so that it has to be sampled
    is_self: Tensor  # [S] bool: where it was one when it was last sampled; fewer where confidence is asked for
    tokens: Tensor  # [S] int64
    drawn: Tensor  # [S] int64: what was last sampled, else the reference token
    final: Tensor  # [R] int64: slots, in the same order
    status: Tensor  # [1] int64: self tokens whose logits were not finite
    seed: Tensor  # [1] int64
    balance: Tensor  # [1] fp64
    slots: Tensor  # [token budget + 1] int64: the next pass, then padding, in the last place always
    sampled_so_far: Tensor  # [token budget] int64: at how many places of the next pass, up to each
    ordinals: Tensor  # [token budget] int64: 1, 2, ...
    cu_seqlens_q: Tensor  # [R + 1] int32
    kv_ranges: Tensor  # [R, 2] int64
    numbers: Tensor  # [2] int64, on the host: tokens of the next pass, and places at which it samples
    speculation: Speculation
    hidden_states: HiddenStates | None  # kept for a training step
    passes: int = 0
    tokens_computed: int = 0

    PLAN: ClassVar = {"slots": PADDING, "sampled_so_far": 0, "cu_seqlens_q": 0, "kv_ranges": 0}

    @classmethod
    def start(
        cls, forward: Forward, batch: Batch, budget: PassBudget, *, keep_hidden_states: bool = False
    ) -> FixedPoint:
        """Everything that can be known before the first pass, which is planned.

        Passes end at the last self position of a row, as nothing after it has a say. Hidden states are wanted up to
        the row's last position, so where they are kept that one is planned for as if it were a candidate, too.

        Rows are planned for in the order of their self positions, most first: these take the most passes, and must not
        be left to the end.
        """
        device = batch.device
        prompt_lengths, lengths = (torch.tensor(x, device=device) for x in (batch.prompt_lengths, batch.lengths))  # [R]
        row_ends = lengths.cumsum(0)
        row_starts = row_ends - lengths
        num_slots = sum(batch.lengths)
        slots = torch.arange(num_slots, device=device)
        row = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=num_slots)  # [S]
        no_prompt = [torch.zeros_like(prompt, dtype=torch.bool) for prompt in batch.prompts]
        positions = slots - row_starts[row]
        reference = torch.cat(interleave(batch.prompts, batch.references))
        may_be_self = torch.cat(interleave(no_prompt, batch.candidates))
        planned = may_be_self.index_fill(0, row_ends - 1, True) if keep_hidden_states else may_be_self
        so_far = planned.cumsum(0)  # [S]
        self_left = so_far[row_ends - 1][row] - so_far
        row_starts = row_starts[self_left[row_starts].argsort(descending=True, stable=True)]

        room, rows = forward.room(num_slots, len(lengths), keeps_hidden_states=keep_hidden_states)

        def of_slots(values: Tensor) -> Tensor:
            return pad(values, (0, room - num_slots))

        row_starts = pad(row_starts, (0, rows - len(lengths)), value=room - 1)
        next_self = next_self_slots(planned, row_ends[row])
        token_budget = min(budget.tokens, room)
        state = cls(
            batch=batch,
            row_starts=row_starts,
            positions=of_slots(positions),
            draws=of_slots(torch.stack([reference, batch.sample_ids[row], positions - prompt_lengths[row]])),
            candidates=of_slots(may_be_self),
            is_self=of_slots(may_be_self),
            ahead=of_slots(torch.stack([next_self - slots, self_left])),
            next_self=torch.cat([next_self, torch.arange(num_slots, room, device=device)]),
            tokens=of_slots(reference),
            drawn=of_slots(reference),
            final=row_starts.clone(),
            status=torch.zeros(1, dtype=torch.int64, device=device),
            seed=seed_for(batch.seed, device),
            balance=torch.full((1,), budget.balance, dtype=torch.float64, device=device),
            slots=slots.new_full((token_budget + 1,), PADDING),
            sampled_so_far=slots.new_empty(token_budget),
            ordinals=torch.arange(1, token_budget + 1, device=device),
            cu_seqlens_q=slots.new_empty(rows + 1, dtype=torch.int32),
            kv_ranges=slots.new_empty(rows, 2),
            numbers=numbers_for(2, device),
            speculation=Speculation(of_slots(may_be_self)),
            hidden_states=HiddenStates(forward.model, num_slots, room) if keep_hidden_states else None,
        )
        state.plan()
        return state

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        return len(self.tokens)

    @property
    def settings(self) -> tuple[Hashable, ...]:
        batch = self.batch
        return batch.temperature, batch.min_reference_prob, batch.vocab_size, self.hidden_states is not None

    def owners(self) -> tuple[object, ...]:
        return self, self.speculation

    def plan(self) -> None:
        """Choose what to compute next: nothing once every row is done."""
        required, self_left = self.ahead[:, self.final]  # [R] each
        slots, cu_seqlens_q, kv_ranges = plan_pass(
            self.final,
            self.row_starts,
            self.next_self,
            self.speculation.log_chance,
            len(self.ordinals),
            least_log_chance(required, self_left, self.balance),
        )
        self.slots[:-1].copy_(slots)
        self.cu_seqlens_q.copy_(cu_seqlens_q)
        self.kv_ranges.copy_(kv_ranges)
        torch.cumsum(following(self.candidates)[slots], 0, out=self.sampled_so_far)
        counts = torch.stack([cu_seqlens_q[-1].long(), self.sampled_so_far[-1]])
        self.numbers.copy_(counts, non_blocking=True)

    def run(self, forward: Forward, size: Size) -> None:
        """Compute the planned pass under the current guess, commit it, and plan the next one."""
        batch, slots = self.batch, self.slots[:-1][: size.tokens]  # [N]
        places = torch.searchsorted(self.sampled_so_far[: len(slots)], self.ordinals[: size.places])  # [M]: N for none
        ragged_pass = RaggedPass(slots, self.positions[slots][None], self.cu_seqlens_q, self.kv_ranges)
        logits = forward.logits(ragged_pass, self.tokens[slots], places.clamp(max=len(slots) - 1))  # [M, V]
        before = self.slots[places]  # [M]: a token is predicted one position before it
        reference, sample_ids, answer_positions = following(self.draws)[:, before]
        following(self.drawn)[before], following(self.is_self)[before] = kernels.sample_mix(
            logits,
            reference,
            following(self.candidates)[before],
            seed=self.seed,
            sample_ids=sample_ids,
            positions=answer_positions,
            temperature=batch.temperature,
            min_reference_prob=batch.min_reference_prob,
            vocab_size=batch.vocab_size,
            status=self.status,
        )
        self.commit(slots)
        self.plan()

    def commit(self, slots: Tensor) -> None:
        """Write what was drawn after ``slots`` [N] into the guess; move each row to its first change."""
        drawn = following(self.drawn)[slots]  # [N]
        changed, observed = commit_pass(self.tokens, self.final, slots, self.cu_seqlens_q, self.next_self, drawn)
        self.speculation.observe(slots, changed, observed)

    @property
    def contexts(self) -> list[Tensor]:
        """The answers' tokens, [T_i] int64 each."""
        return self._answers(self.tokens)

    @property
    def masks(self) -> list[Tensor]:
        """Which of them are self tokens, [T_i] bool each."""
        return self._answers(self.is_self)

    def settled(self, finals: list[Tensor]) -> list[Tensor]:
        """The pass after which each answer token could not change any more, [T_i] int64 each.

        ``finals`` are ``final`` as it was before the first pass and after each one. A token is settled where the last
        candidate at or before it is final; 0 is what the reference gives without a pass.
        """
        lengths = torch.tensor(self.batch.lengths, device=self.tokens.device)
        by_row = torch.stack(finals)[:, self.row_starts[: len(lengths)].argsort()]  # [passes + 1, R]
        last = torch.where(self.candidates, torch.arange(self.num_slots, device=lengths.device), 0).cummax(0).values
        by_row = by_row.repeat_interleave(lengths, dim=1)  # [passes + 1, tokens]
        return self._answers((by_row < last[: by_row.shape[1]]).sum(0))

    def _answers(self, of_slots: Tensor) -> list[Tensor]:
        lengths = self.batch.lengths
        rows = torch.split(of_slots[: sum(lengths)].clone(), lengths)  # the state may serve the next generation
        return [row[prompt:] for row, prompt in zip(rows, self.batch.prompt_lengths, strict=True)]


def fixed_point(
    forward: Forward,
    batch: Batch,
    budget: PassBudget,
    *,
    keep_hidden_states: bool = False,
    finals: list[Tensor] | None = None,
) -> FixedPoint:
    """Iterate passes of at most ``budget.tokens`` tokens until every self token is final.

    To ``finals`` is added what ``FixedPoint.settled`` takes.
    """
    state = FixedPoint.start(forward, batch, budget, keep_hidden_states=keep_hidden_states)
    with forward.over(state):
        if finals is not None:
            finals.append(state.final.clone())
        while (size := Size(*forward.read(state))).tokens:
            state.passes += 1
            state.tokens_computed += size.tokens
            forward.run(state, size)
            if finals is not None:
                finals.append(state.final.clone())
    return state
