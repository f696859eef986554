"""The fast path: mixed contexts as a fixed point, found with the reference as the draft.

With its noise fixed, the model's own token at every self position is a function of the tokens before it, and the mixed
context is the one sequence that this function maps to itself. So guess it (first guess: the reference), compute many
positions at once, correct the guess, and repeat. Whatever stands before the first correction in a row is final; it
stays in the KV cache and is never computed again. This is Jacobi iteration on the decoding equations (Song et al. 2021,
arXiv 2002.03629; Santilli et al. 2023, arXiv 2305.10427), exact as each pass makes at least one more token final.

``plan_pass`` chooses the tokens of a pass, ``run_pass`` computes them, ``commit_pass`` writes down what they showed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfgen_kernels import sample_mix

from .batch import Batch
from .packed import packed_linears
from .plan import RowProgress, Speculation, Window, plan_pass
from .ragged import RaggedCache, RaggedPass, ragged_logits, ragged_model


@dataclass
class FixedPoint:
    """The state of one generation. Rows lie one after the other; a token's index is its KV slot."""

    batch: Batch
    row_starts: list[int]
    rows: list[RowProgress]
    reference: Tensor  # [slots] int64: prompts and reference answers
    tokens: Tensor  # [slots] int64: the current guess
    cache: RaggedCache
    status: Tensor  # [1] int64: self tokens whose logits were not finite
    speculation: Speculation
    passes: int = 0
    tokens_computed: int = 0

    @classmethod
    def start(cls, model: PreTrainedModel, batch: Batch, is_self: list[Tensor]) -> FixedPoint:
        row_starts, slots = [], 0
        for length in batch.lengths:
            row_starts.append(slots)
            slots += length
        parts = [part for pair in zip(batch.prompts, batch.references, strict=True) for part in pair]
        rows = [
            RowProgress([prompt + t for t in mask.nonzero()[:, 0].tolist()])
            for prompt, mask in zip(batch.prompt_lengths, is_self, strict=True)
        ]
        return cls(
            batch=batch,
            row_starts=row_starts,
            rows=rows,
            reference=torch.cat(parts),
            tokens=torch.cat(parts),
            cache=RaggedCache(model, slots),
            status=torch.zeros(1, dtype=torch.int64, device=batch.device),
            speculation=Speculation(),
        )

    @property
    def contexts(self) -> list[Tensor]:
        """The answers' tokens, [T_i] int64 each."""
        rows = torch.split(self.tokens, self.batch.lengths)
        return [row[prompt:] for row, prompt in zip(rows, self.batch.prompt_lengths, strict=True)]


def fixed_point(model: PreTrainedModel, batch: Batch, is_self: list[Tensor], token_budget: int) -> FixedPoint:
    """Iterate passes of at most ``token_budget`` tokens until every self token is final."""
    state = FixedPoint.start(model, batch, is_self)
    with ragged_model(model), packed_linears(model):
        while windows := plan_pass(state.rows, token_budget, state.speculation):
            sampled = run_pass(model, state, windows)
            commit_pass(state, windows, sampled)
    return state


@dataclass
class Sampled:
    """What a pass showed: the self positions whose predecessor was computed, in the order of the windows."""

    positions: list[list[int]]  # per window, ascending
    slots: Tensor  # [M] int64
    tokens: Tensor  # [M] int64


def run_pass(model: PreTrainedModel, state: FixedPoint, windows: list[Window]) -> Sampled:
    """Compute the windows under the current guess and sample at their self positions; the guess stays as it is."""
    batch = state.batch
    ragged_pass = RaggedPass(windows, state.row_starts, batch.device)
    state.passes += 1
    state.tokens_computed += ragged_pass.num_tokens

    positions, flat_index, slots, row_of, answer_position = [], [], [], [], []
    offset = 0
    for row, begin, end in windows:
        found = state.rows[row].self_positions_in(begin + 1, end)
        positions.append(found)
        flat_index += [
            offset + position - 1 - begin for position in found
        ]  # a token is predicted one position before it
        slots += [state.row_starts[row] + position for position in found]
        answer_position += [position - batch.prompt_lengths[row] for position in found]
        row_of += [row] * len(found)
        offset += end - begin
    index = torch.tensor([flat_index, slots, answer_position, row_of], dtype=torch.int64, device=batch.device)  # [4, M]

    logits = ragged_logits(model, state.cache, ragged_pass, state.tokens, index[0])  # [M, V]
    tokens, _ = sample_mix(
        logits,
        state.reference[index[1]],
        1.0,
        seed=batch.seed,
        sample_ids=batch.sample_ids[index[3]],
        positions=index[2],
        temperature=batch.temperature,
        status=state.status,
    )
    return Sampled(positions, index[1], tokens)


def commit_pass(state: FixedPoint, windows: list[Window], sampled: Sampled) -> None:
    """Write the sampled tokens into the guess and move each row to its first change."""
    changed = (sampled.tokens != state.tokens[sampled.slots]).tolist()  # waits for the device
    state.tokens[sampled.slots] = sampled.tokens
    first = 0
    for window, positions in zip(windows, sampled.positions, strict=True):
        row_changed = changed[first : first + len(positions)]
        first += len(positions)
        _commit_row(state.rows[window.row], window, positions, row_changed, state.speculation)


def _commit_row(
    row: RowProgress, window: Window, positions: list[int], changed: list[bool], speculation: Speculation
) -> None:
    final = window.end
    for position, wrong in zip(positions, changed, strict=True):
        # Observed under a final context: this is what the chance of a segment is made of.
        (speculation.revised if position < row.sampled else speculation.first).observe(not wrong, 1)
        if wrong:
            final = position
            break
    row.final = final
    if positions:
        row.sampled = max(row.sampled, positions[-1] + 1)
