"""The fast path: mixed contexts as a fixed point, found with the reference as the draft.

With its noise fixed, the self token at every candidate is a function of the tokens before it, and the mixed
context is the one sequence that this function maps to itself. So guess it (first guess: the reference), compute many
positions at once, correct the guess, and repeat. Whatever stands before the first correction in a row is final; it
stays in the KV cache and is never computed again. This is Jacobi iteration on the decoding equations (Song et al. 2021,
arXiv 2002.03629; Santilli et al. 2023, arXiv 2305.10427), exact as each pass makes at least one more token final.

``FixedPoint.plan`` chooses the tokens of a pass, ``run`` computes them, ``commit`` writes down what they showed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

import selfgen_kernels as kernels

from .batch import Batch
from .budget import PassBudget
from .forward import Forward
from .hidden_states import HiddenStates
from .plan import Speculation, least_log_chance, next_self_slots
from .ragged import RaggedPass


@dataclass
class FixedPoint:
    """The state of one generation, on the model's device. Rows lie one after the other; a token's index is its KV slot.

    ``tokens`` is the guess. K/V before ``final`` is computed under the final context; tokens up to it are final too.
    """

    batch: Batch
    row_starts: Tensor  # [R] int64: slots, in the order in which rows are planned for
    positions: Tensor  # [S] int64: counted from the first prompt token of the slot's row
    answer_positions: Tensor  # [S] int64: counted from the first answer token
    sample_ids: Tensor  # [S] int64
    reference: Tensor  # [S] int64: prompts and reference answers
    next_self: Tensor  # [S] int64: slot of the first self position planned for after each slot; see `start`
    self_left: Tensor  # [S] int64: self positions planned for after each slot in its row
    candidates: Tensor  # [S] bool: where the token may be a self token, so that it has to be sampled
    is_self: Tensor  # [S] bool: where it was one when it was last sampled; fewer where confidence is asked for
    tokens: Tensor  # [S] int64
    final: Tensor  # [R] int64: slots, in the same order
    status: Tensor  # [1] int64: self tokens whose logits were not finite
    speculation: Speculation
    hidden_states: HiddenStates | None  # kept for a training step
    passes: int = 0
    tokens_computed: int = 0

    @classmethod
    def start(cls, model: PreTrainedModel, batch: Batch, *, keep_hidden_states: bool = False) -> FixedPoint:
        """Everything that can be known before the first pass.

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
        reference = torch.cat(_interleave(batch.prompts, batch.references))
        may_be_self = torch.cat(_interleave(no_prompt, batch.candidates))
        planned = may_be_self.index_fill(0, row_ends - 1, True) if keep_hidden_states else may_be_self
        so_far = planned.cumsum(0)  # [S]
        self_left = so_far[row_ends - 1][row] - so_far
        row_starts = row_starts[self_left[row_starts].argsort(descending=True, stable=True)]
        return cls(
            batch=batch,
            row_starts=row_starts,
            positions=positions,
            answer_positions=positions - prompt_lengths[row],
            sample_ids=batch.sample_ids[row],
            reference=reference,
            candidates=may_be_self,
            is_self=may_be_self.clone(),
            self_left=self_left,
            next_self=next_self_slots(planned, row_ends[row]),
            tokens=reference.clone(),
            final=row_starts.clone(),
            status=torch.zeros(1, dtype=torch.int64, device=device),
            speculation=Speculation(may_be_self),
            hidden_states=HiddenStates(model, num_slots) if keep_hidden_states else None,
        )

    def plan(self, budget: PassBudget) -> RaggedPass:
        """Choose what to compute next: nothing once every row is done."""
        required = self.next_self[self.final] - self.final  # [R]
        least = least_log_chance(required, self.self_left[self.final], budget.balance)
        slots, cu_seqlens_q, kv_ranges = kernels.plan_pass(
            self.final,
            self.row_starts,
            self.next_self,
            self.speculation.log_chance,
            min(budget.tokens, len(self.tokens)),
            least_log_chance=least,
        )
        # A look at the device, one of two in a pass. A graph of plan, run and commit would keep the padding in place of
        # this, and be replayed until a look at it now and then finds no planned token.
        slots = slots[: int(cu_seqlens_q[-1])]
        return RaggedPass(slots, self.positions[slots][None], cu_seqlens_q, kv_ranges)

    def run(self, forward: Forward, ragged_pass: RaggedPass) -> tuple[Tensor, Tensor]:
        """Compute the pass under the current guess, which stays as it is.

        Returns [N] int64: at places right before a self position the token that belongs there, anything elsewhere; and
        [N] bool: which places these are.
        """
        batch = self.batch
        self.passes += 1
        self.tokens_computed += ragged_pass.num_tokens

        is_sampled = self.is_sampled(ragged_pass)
        places = is_sampled.nonzero()[:, 0]  # [M]: a token is predicted one position before it
        at = ragged_pass.slots[places] + 1  # [M]
        logits = forward(ragged_pass, self.tokens, places)  # [M, V]
        sampled = self.tokens[(ragged_pass.slots + 1).clamp(max=len(self.tokens) - 1)]  # as is
        sampled[places], self.is_self[at] = kernels.sample_mix(
            logits,
            self.reference[at],
            1.0,
            seed=batch.seed,
            sample_ids=self.sample_ids[at],
            positions=self.answer_positions[at],
            temperature=batch.temperature,
            min_reference_prob=batch.min_reference_prob,
            vocab_size=batch.vocab_size,
            status=self.status,
        )
        return sampled, is_sampled

    def commit(self, ragged_pass: RaggedPass, sampled: Tensor, is_sampled: Tensor) -> None:
        """Write the sampled tokens [N] into the guess and move each row to its first change."""
        slots = ragged_pass.slots
        changed, observed = kernels.commit_pass(
            self.tokens, self.final, slots, ragged_pass.cu_seqlens_q, self.next_self, sampled
        )
        self.speculation.observe(slots, changed, observed & is_sampled, is_sampled)

    def is_sampled(self, ragged_pass: RaggedPass) -> Tensor:
        """[N] bool: the places of a pass that come right before a self position."""
        after = ragged_pass.slots + 1
        return (self.next_self[ragged_pass.slots] == after) & self.candidates[after.clamp(max=len(self.tokens) - 1)]

    @property
    def contexts(self) -> list[Tensor]:
        """The answers' tokens, [T_i] int64 each."""
        return self._answers(self.tokens)

    @property
    def masks(self) -> list[Tensor]:
        """Which of them are self tokens, [T_i] bool each."""
        return self._answers(self.is_self)

    def _answers(self, of_slots: Tensor) -> list[Tensor]:
        rows = torch.split(of_slots, self.batch.lengths)
        return [row[prompt:] for row, prompt in zip(rows, self.batch.prompt_lengths, strict=True)]


def _interleave(prompts: list[Tensor], answers: list[Tensor]) -> list[Tensor]:
    return [part for pair in zip(prompts, answers, strict=True) for part in pair]


def fixed_point(
    forward: Forward,
    batch: Batch,
    budget: PassBudget,
    *,
    keep_hidden_states: bool = False,
) -> FixedPoint:
    """Iterate passes of at most ``budget.tokens`` tokens until every self token is final."""
    state = FixedPoint.start(forward.model, batch, keep_hidden_states=keep_hidden_states)
    with forward.over(len(state.tokens), state.hidden_states):
        while (ragged_pass := state.plan(budget)).num_tokens:
            sampled, is_sampled = state.run(forward, ragged_pass)
            state.commit(ragged_pass, sampled, is_sampled)
    return state
