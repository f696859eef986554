"""Free-running answers: the model alone, from the prompt on, one token of every row per pass.

The batch is continuous, as in serving engines (Yu et al. 2022, Orca): when a row has ended, the next prompt takes its
*place*, and that prompt is computed in the same pass as the other rows' tokens. A place is a run of K/V slots that is
long enough for any row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import selfgen_kernels as kernels

from .forward import Coverage, Forward
from .ragged import RaggedPass

_MOST_TOKENS = 8192  # of the prompts that begin in one pass, or one prompt


@dataclass(frozen=True)
class Prompts:
    """Checked prompts of R rows, on the model's device."""

    tokens: list[Tensor]  # [P_i] int64
    sample_ids: Tensor  # [R] int64
    limits: list[int]  # [R]: most tokens of each answer, at least 1
    stop_ids: Tensor  # [E] int64: an answer ends with the first of these


class Work(NamedTuple):
    """What answers have cost."""

    passes: int
    tokens_computed: int
    coverage: Coverage | None = None  # where passes may be CUDA graphs


@dataclass
class FreeRun:
    """The state of one generation, on the model's device; the host knows only which row has which place.

    A place holds ``computed`` tokens in the cache and ``new`` ones after them that the next pass computes: a prompt,
    then one token per pass, and none where no row is.
    """

    prompts: Prompts
    waiting: deque[int]  # rows without a place yet
    rows: list[int | None]  # of each place
    row: Tensor  # [B] int64: the same, anything where there is none
    taken: Tensor  # [A] int64: the places of rows, in order
    starts: Tensor  # [B] int64: the first slot of each place
    tokens: Tensor  # [S] int64: prompts and answers by slot
    computed: Tensor  # [B] int64
    new: Tensor  # [B] int64
    prompt_lengths: Tensor  # [B] int64
    limits: Tensor  # [B] int64
    passes: int = 0
    tokens_computed: int = 0

    @classmethod
    def start(cls, prompts: Prompts, batch_size: int) -> FreeRun:
        places = min(batch_size, len(prompts.tokens))
        capacity = max(len(prompt) + limit for prompt, limit in zip(prompts.tokens, prompts.limits, strict=True))
        device = prompts.sample_ids.device
        row, computed, new, prompt_lengths, limits = torch.zeros(5, places, dtype=torch.int64, device=device)
        return cls(
            prompts=prompts,
            waiting=deque(range(len(prompts.tokens))),
            rows=[None] * places,
            row=row,
            taken=row[:0],
            starts=torch.arange(places, device=device) * capacity,
            tokens=torch.zeros(places * capacity, dtype=torch.int64, device=device),
            computed=computed,
            new=new,
            prompt_lengths=prompt_lengths,
            limits=limits,
        )

    def admit(self) -> int:
        """Give free places to waiting rows; returns how many tokens are new, none if there is nothing left to do."""
        going_on = sum(row is not None for row in self.rows)  # with a token each
        begun = 0
        for place, taken in enumerate(self.rows):
            if taken is not None or not self.waiting:
                continue
            row = self.waiting[0]
            prompt = self.prompts.tokens[row]
            if begun and begun + len(prompt) > _MOST_TOKENS:
                break
            begun += len(prompt)
            self.waiting.popleft()
            start = place * (len(self.tokens) // len(self.rows))
            self.tokens[start : start + len(prompt)] = prompt
            self.rows[place] = row
            self.row[place] = row
            self.computed[place] = 0
            self.new[place] = self.prompt_lengths[place] = len(prompt)
            self.limits[place] = self.prompts.limits[row]
        if begun or going_on < len(self.taken):
            places = [place for place, one in enumerate(self.rows) if one is not None]
            self.taken = torch.tensor(places, device=self.taken.device)
        return going_on + begun

    def plan(self, num_tokens: int) -> RaggedPass:
        """All new tokens of all places."""
        ends = self.new.cumsum(0)
        places = torch.arange(len(ends), device=ends.device)
        place = places.repeat_interleave(self.new, output_size=num_tokens)  # [N]
        positions = torch.arange(len(place), device=ends.device) + (self.computed - ends + self.new)[place]
        return RaggedPass(
            slots=self.starts[place] + positions,
            position_ids=positions[None],
            cu_seqlens_q=torch.nn.functional.pad(ends, (1, 0)).int(),
            kv_ranges=torch.stack([self.starts, self.computed + self.new], 1),
        )

    def run(self, forward: Forward, ragged_pass: RaggedPass, sampling: dict[str, Any]) -> Tensor:
        """Compute the pass; returns the next token of each taken place, int64 [A]."""
        self.passes += 1
        self.tokens_computed += ragged_pass.num_tokens
        taken = self.taken
        last = ragged_pass.cu_seqlens_q[1:][taken].long() - 1  # [A]: where in the pass a token is predicted
        logits = forward(ragged_pass, self.tokens, last)  # [A, V]
        sampled, _ = kernels.sample_mix(
            logits,
            self.tokens[ragged_pass.slots[last]],  # what a row gets whose logits are not finite: its last token again
            1.0,
            sample_ids=self.prompts.sample_ids[self.row[taken]],
            positions=(self.computed + self.new - self.prompt_lengths)[taken],
            **sampling,
        )
        return sampled

    def commit(self, sampled: Tensor) -> list[tuple[int, Tensor]]:
        """Append the sampled tokens [A]; free the places of ended rows, and return these rows with their answers."""
        taken = self.taken
        self.computed += self.new
        self.tokens[(self.starts + self.computed)[taken]] = sampled
        self.new[taken] = 1
        lengths = self.computed + 1 - self.prompt_lengths  # [B]: of the answers
        ended = taken[torch.isin(sampled, self.prompts.stop_ids) | (lengths[taken] == self.limits[taken])]
        first = (self.starts + self.prompt_lengths)[ended]
        answers = []
        found = torch.stack([ended, first, lengths[ended]]).tolist()  # the one wait
        for place, begin, length in zip(*found, strict=True):
            row = self.rows[place]
            assert row is not None
            answers.append((row, self.tokens[begin : begin + length].clone()))
            self.rows[place] = None
        self.new[ended] = 0
        return answers


def free_running(
    forward: Forward,
    prompts: Prompts,
    sampling: dict[str, Any],
    batch_size: int,
    finish: Callable[[int, Tensor], None],
) -> Work:
    """Run every row to its end, and pass its number and its answer, int64 [T], to ``finish`` when it has ended.

    ``sampling`` is what ``sample_mix`` takes beside rows and positions: seed, temperature, filters, vocab_size, status.
    """
    state = FreeRun.start(prompts, batch_size)
    with forward.over(len(state.tokens)):
        while num_tokens := state.admit():
            ragged_pass = state.plan(num_tokens)
            sampled = state.run(forward, ragged_pass, sampling)
            for row, answer in state.commit(sampled):
                finish(row, answer)
    return Work(state.passes, state.tokens_computed, forward.coverage)
