"""Policy: what the next pass had better compute.

A pass is a flat batch of tokens, as serving engines batch them: each unfinished row brings one *window* of consecutive
positions, and all windows together fill a *token budget*. What must be computed comes first, and what is left goes to
speculation, in the order of the chance that it turns out final. ``selfgen_kernels.plan_pass`` does the filling; here is
what it goes by. Everything is a tensor over slots on the model's device, and nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def next_self_slots(is_self: Tensor, row_ends: Tensor) -> Tensor:
    """[S] int64: the first self position behind each slot in its row, or the slot itself if there is none.

    ``is_self`` is bool [S], and ``row_ends`` int64 [S] the slot behind the last one of each slot's row.
    """
    slots = torch.arange(len(is_self), device=is_self.device)
    at_or_behind = torch.where(is_self, slots, len(is_self)).flip(0).cummin(0).values.flip(0)  # [S]
    behind = torch.cat([at_or_behind[1:], at_or_behind.new_full((1,), len(is_self))])[: len(is_self)]
    return torch.where(behind < row_ends, behind, slots)


class Speculation:
    """Chance that a guess is right: at the first visit the guess is the reference, later the model's own last token."""

    def __init__(self, num_slots: int, device: torch.device):
        # [2, 2]: (first visit, later) x (right, seen). The priors count as ten observations, so both rates follow the
        # data after a few passes.
        self.counts = torch.tensor([[6.0, 10.0], [7.0, 10.0]], dtype=torch.float64, device=device)
        self.visited = torch.zeros(num_slots, dtype=torch.bool, device=device)  # sampled at least once

    @property
    def log_chance(self) -> Tensor:
        """[S] fp32."""
        first, later = (self.counts[:, 0] / self.counts[:, 1]).log().float()
        return torch.where(self.visited, later, first)

    def observe(self, slots: Tensor, changed: Tensor, observed: Tensor, is_sampled: Tensor) -> None:
        """Take in a committed pass: what it showed at the place [N] of each computed slot about the slot behind it.

        Only what was ``observed`` under a final context counts: this is what the chance of a segment is made of.
        """
        behind = slots + 1  # [N]
        visited = self.visited[behind]
        seen = torch.stack([observed & ~visited, observed & visited])  # [2, N]
        self.counts += torch.stack([(seen & ~changed).sum(1), seen.sum(1)], 1)
        self.visited[behind] = visited | is_sampled
