"""Policy: what the next pass should compute.

A pass is a flat batch of tokens, as serving engines batch them: each unfinished row brings one *window* of consecutive
positions, and all windows together fill a *token budget*. What must be computed comes first, and what is left goes to
speculation, in the order of the chance that it turns out final, as far as that chance is worth its price.
``selfgen_kernels.plan_pass`` fills the budget; this module computes the chances and prices that it uses. Everything is
a tensor on the model's device, and nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward import following


def next_self_slots(is_self: Tensor, row_ends: Tensor) -> Tensor:
    """[S] int64: the first self position after each slot in its row, or the slot itself if there is none.

    ``is_self`` is bool [S], and ``row_ends`` int64 [S] the slot after the last one of each slot's row.
    """
    slots = torch.arange(len(is_self), device=is_self.device)
    at_or_after = torch.where(is_self, slots, len(is_self)).flip(0).cummin(0).values.flip(0)  # [S]
    after = torch.cat([at_or_after[1:], at_or_after.new_full((1,), len(is_self))])[: len(is_self)]
    return torch.where(after < row_ends, after, slots)


def least_log_chance(required: Tensor, self_left: Tensor, balance: float | Tensor) -> Tensor:
    """[R] fp32: the log of the least chance that is worth speculation in each row.

    ``required`` is int64 [R], the tokens that a pass computes of each row anyway, ``self_left`` int64 [R] how many self
    positions are left. A pass over n tokens costs as much as ``balance + n`` tokens alone, so n that turn out final are
    n / (balance + n) for the price of one, and one more pays if its chance is larger. But it shortens the whole
    generation only if all rows that have as much left advance, too. So n counts the tokens of these rows: the longest
    row speculates most, and one that ends before the others hardly at all.
    """
    as_long = self_left >= 0.9 * self_left[:, None]  # [R, R]
    n = (as_long * required).sum(1)
    return (n / (n + balance)).log().float()


class Speculation:
    """Chance that a guess is right, by what is known of it; the rates follow what the passes show.

    The first guess is the reference, later ones are what the model sampled last. A guess that did not change when it
    was computed again is unlikely to change later; one that just changed may well change again. What is given, hence
    right, stays so.
    """

    FIRST, CHANGED, KEPT, KEPT_AGAIN, GIVEN = range(5)
    PRIOR = (0.5, 0.6, 0.8, 0.95, 1.0)  # counts as ten observations of each
    LATER = (  # of each kind: one that was kept, and one that was changed
        (KEPT, CHANGED), (KEPT, CHANGED), (KEPT_AGAIN, CHANGED), (KEPT_AGAIN, CHANGED), (GIVEN, GIVEN)
    )  # fmt: skip

    def __init__(self, is_self: Tensor):
        """``is_self`` is bool [S]; any other token is given."""
        right = 10 * torch.tensor(self.PRIOR, dtype=torch.float64, device=is_self.device)
        self.counts = torch.stack([right, 10 - right], 1)  # [5, 2]: right, wrong
        self.kind = torch.where(is_self, self.FIRST, self.GIVEN)  # [S] int64
        self.later = torch.tensor(self.LATER, device=is_self.device).flatten()  # [10] int64: by kind and outcome

    @property
    def log_chance(self) -> Tensor:
        """[S] fp32."""
        return (self.counts[:, 0] / self.counts.sum(1)).log().float()[self.kind]

    def observe(self, slots: Tensor, changed: Tensor, observed: Tensor) -> None:
        """Take in a committed pass: what it showed at the place [N] of each computed slot about the slot after it.

        Only what was ``observed`` under a final context counts: this is what the chance of a segment is made of.
        """
        kind = following(self.kind)  # of the token that a slot tells
        outcome = torch.add(changed, kind[slots], alpha=2)  # [N]
        self.counts.view(-1).index_add_(0, outcome, observed.double())
        kind[slots] = self.later[outcome]
