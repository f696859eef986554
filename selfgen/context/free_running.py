"""Free-running answers: the model alone, from the prompt on, one token of every row per pass.

The batch is continuous, as in serving engines (Yu et al. 2022, Orca): when a row has ended, the next prompt takes its
*place*, and that prompt is computed in the same pass as the other rows' tokens. A place is a run of K/V slots that is
long enough for any row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import selfgen_kernels as kernels

from .forward import PADDING, Coverage, Forward, Passes, Size, numbers_for, seed_for
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
class FreeRun(Passes):
    """The state of one generation, on the model's device; the host knows only which row has which place.

    A place holds ``computed`` tokens in the cache and ``new`` ones after them that the next pass computes: a prompt,
    then one token per pass, and none where no row is. There may be room for more places, and for more slots, the last
    of which is nobody's in any case.
    """

    prompts: Prompts
    waiting: deque[int]  # rows without a place yet
    rows: list[int | None]  # of each place
    capacity: int  # slots of a place
    how: dict[str, Any]  # tokens are sampled: temperature, filters, vocab_size
    starts: Tensor  # [B] int64: the first slot of each place
    tokens: Tensor  # [S] int64: prompts and answers by slot
    sample_ids: Tensor  # [B] int64, anything where there is no row
    computed: Tensor  # [B] int64
    new: Tensor  # [B] int64
    prompt_lengths: Tensor  # [B] int64
    limits: Tensor  # [B] int64
    ended: Tensor  # [B] bool: by the last pass
    ordinals: Tensor  # [S] int64: 1, 2, ...
    stop_ids: Tensor  # [E] int64
    seed: Tensor  # [1] int64
    status: Tensor  # [1] int64: tokens whose logits were not finite
    numbers: Tensor  # [1] int64, on the host: how many rows the last pass has ended
    passes: int = 0
    tokens_computed: int = 0

    PLAN: ClassVar = {"new": 0}
    hidden_states = None

    @classmethod
    def start(cls, forward: Forward, prompts: Prompts, batch_size: int, sampling: dict[str, Any]) -> FreeRun:
        places = min(batch_size, len(prompts.tokens))
        capacity = max(len(prompt) + limit for prompt, limit in zip(prompts.tokens, prompts.limits, strict=True))
        device = prompts.sample_ids.device
        slots, rows = forward.room(places * capacity, places)
        sample_ids, computed, new, prompt_lengths, limits = torch.zeros(5, rows, dtype=torch.int64, device=device)
        return cls(
            prompts=prompts,
            waiting=deque(range(len(prompts.tokens))),
            rows=[None] * places,
            capacity=capacity,
            how={name: value for name, value in sampling.items() if name not in ("seed", "status")},
            starts=(torch.arange(rows, device=device) * capacity).clamp(max=slots - 1),
            tokens=torch.zeros(slots, dtype=torch.int64, device=device),
            sample_ids=sample_ids,
            computed=computed,
            new=new,
            prompt_lengths=prompt_lengths,
            limits=limits,
            ended=torch.zeros(rows, dtype=torch.bool, device=device),
            ordinals=torch.arange(1, slots + 1, device=device),
            stop_ids=prompts.stop_ids.clone(),  # the caller's may not be written
            seed=seed_for(sampling["seed"], device),
            status=torch.zeros(1, dtype=torch.int64, device=device),
            numbers=numbers_for(1, device),
        )

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        return len(self.tokens)

    @property
    def settings(self) -> tuple[Hashable, ...]:
        return tuple(self.how.items())

    def admit(self) -> Size:
        """Give free places to waiting rows; returns what is new, no token if there is nothing left to do."""
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
            start = place * self.capacity
            self.tokens[start : start + len(prompt)] = prompt
            self.rows[place] = row
            self.sample_ids[place] = self.prompts.sample_ids[row]
            self.computed[place] = 0
            self.new[place] = self.prompt_lengths[place] = len(prompt)
            self.limits[place] = self.prompts.limits[row]
        return Size(going_on + begun, sum(row is not None for row in self.rows))

    def plan(self, ends: Tensor, num_tokens: int) -> RaggedPass:
        """All new tokens of all places, which end at ``ends`` [B], and padding up to ``num_tokens``."""
        ordinal = self.ordinals[:num_tokens]  # [N]
        place = torch.searchsorted(ends, ordinal)  # [N]: one too many for padding
        is_token, place = place < len(ends), place.clamp(max=len(ends) - 1)
        seen = self.computed + self.new  # [B]
        positions = torch.where(is_token, ordinal + (seen - ends - 1)[place], 0)
        return RaggedPass(
            slots=torch.where(is_token, self.starts[place] + positions, PADDING),
            position_ids=positions[None],
            cu_seqlens_q=pad(ends, (1, 0)).int(),
            kv_ranges=torch.stack([self.starts, seen], 1),
        )

    def run(self, forward: Forward, size: Size) -> None:
        """Compute all new tokens, and append the token that follows them to each taken place."""
        ends = self.new.cumsum(0)  # [B]: of each place's tokens in the pass
        ragged_pass = self.plan(ends, size.tokens)
        taken = self.new > 0  # [B]
        taken_so_far = taken.cumsum(0)  # [B]
        place = torch.searchsorted(taken_so_far, self.ordinals[: size.places])  # [M]: one too many for padding
        is_taken, place = place < len(taken), place.clamp(max=len(taken) - 1)
        last = (ends[place] - 1).clamp(min=0)  # [M]: where a token is predicted
        input_ids = self.tokens[ragged_pass.slots]
        sampled, _ = kernels.sample_mix(
            forward.logits(ragged_pass, input_ids, last),  # [M, V]
            input_ids[last],  # what a row gets whose logits are not finite: its last token again
            is_taken,
            seed=self.seed,
            sample_ids=self.sample_ids[place],
            positions=(ragged_pass.kv_ranges[:, 1] - self.prompt_lengths)[place],
            status=self.status,
            **self.how,
        )
        self.commit(sampled[(taken_so_far - 1).clamp(min=0)], taken)

    def commit(self, sampled: Tensor, taken: Tensor) -> None:
        """Append the tokens [B] that were sampled in the ``taken`` places [B]; the rows that end leave theirs."""
        self.computed += self.new
        self.tokens[torch.where(taken, self.starts + self.computed, PADDING)] = sampled
        stops = (sampled[:, None] == self.stop_ids).any(1) | (self.lengths == self.limits)
        torch.logical_and(taken, stops, out=self.ended)
        torch.logical_and(taken, ~stops, out=self.new)
        self.numbers.copy_(self.ended.sum()[None], non_blocking=True)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: of the answers so far."""
        return self.computed + 1 - self.prompt_lengths

    def take_ended(self) -> list[tuple[int, Tensor]]:
        """The rows that the last pass has ended, with their answers; their places are free."""
        ended = self.ended.nonzero()[:, 0]
        first = (self.starts + self.prompt_lengths)[ended]
        answers = []
        for place, begin, length in zip(*torch.stack([ended, first, self.lengths[ended]]).tolist(), strict=True):
            row = self.rows[place]
            assert row is not None
            answers.append((row, self.tokens[begin : begin + length].clone()))
            self.rows[place] = None
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
    state = FreeRun.start(forward, prompts, batch_size, sampling)
    with forward.over(state):
        while (size := state.admit()).tokens:
            state.passes += 1
            state.tokens_computed += size.tokens
            forward.run(state, size)
            if forward.read(state)[0]:
                for row, answer in state.take_ended():
                    finish(row, answer)
    sampling["status"].add_(state.status)
    return Work(state.passes, state.tokens_computed, forward.coverage)
